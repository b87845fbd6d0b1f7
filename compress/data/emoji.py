"""Emoji as 32x32 colour images: python -m compress.data.emoji [FOLDER].

1636 emoji of Unicode 16, each drawn by Noto (Google, Apache-2.0) and by Twemoji (Twitter, Inc. and
other contributors, CC-BY 4.0), on white; flags and skin tones are left out. The images are no part
of this package. The command gets them with `npm pack`, or from FOLDER where the two archives lie,
and writes `emoji.safetensors` into $COMPRESS_CACHE or ~/.cache/compress.
"""

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from compress.common.files import cache_folder, write_bytes

SIZE = 32
PARTS = ("train", "held_out")
GROUPS = (
    *("Smileys & Emotion", "People & Body", "Animals & Nature", "Food & Drink"),
    *("Travel & Places", "Activities", "Objects", "Symbols"),
)
HOLD_OUT_EVERY = 5
VERSION = "16.0.0"
LIST = "package/emoji.json"
# vendor -> the SHA-512 of the package's archive, as the registry has it
PACKAGES = {
    "google": (
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
    ),
    "twitter": (
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ=="
    ),
}
COMMAND = "python -m compress.data.emoji"


def emoji_file() -> Path:
    """Where the prepared images lie."""
    return cache_folder() / "emoji.safetensors"


def emoji(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The emoji that a model is trained on, or those that are held out, each by both vendors.

    Parameters
    ----------
    part : "train" or "held_out".

    Returns
    -------
    images, labels : ``(n, 3, 32, 32)`` float32 in [-1, 1], and indices in `GROUPS`, ``(n,)`` int64.

    Raises
    ------
    FileNotFoundError : until the images are prepared, naming the command.
    ValueError : for another part, or a file that is damaged.
    """
    if part not in PARTS:
        raise ValueError(
            f"emoji come in two parts, 'train' and 'held_out'; got {part!r}; name one of them"
        )
    stored = _stored(emoji_file())
    mine = stored["held_out"] == PARTS.index(part)
    return stored["images"][mine].float() / 127.5 - 1, stored["groups"][mine].long()


@cache
def _stored(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"the images of builtin:emoji are expected in {path}, which does not exist; run "
            f"{COMMAND}"
        )
    try:
        stored = load_file(path)
        count = len(stored["images"])
        if stored["images"].shape != (count, 3, SIZE, SIZE):
            raise ValueError(f"images of shape {tuple(stored['images'].shape)}")
        if {len(stored[name]) for name in ("groups", "held_out")} != {count}:
            raise ValueError("groups and held_out of other lengths")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} should hold the images of builtin:emoji, but has {error}; remove it and run "
            f"{COMMAND}"
        ) from error
    return stored


def chosen(entries: list[dict[str, Any]]) -> list[tuple[dict[str, Any], bool]]:
    """The emoji of a package's `emoji.json` in Unicode's order, each with whether it is held out.

    Every fifth of a subgroup is held out, for both vendors: which images a model has not seen is
    decided by the emoji, or its twin of the other vendor would tell.
    """
    known = (entry for entry in entries if entry["category"] in GROUPS)
    seen: dict[str, int] = {}
    result = []
    for entry in sorted(known, key=lambda entry: entry["sort_order"]):
        number = seen.get(entry["subcategory"], 0)
        seen[entry["subcategory"]] = number + 1
        result.append((entry, number % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2))
    return result


def on_white(png: bytes) -> torch.Tensor:
    """A picture on white at half its size, every pixel the mean of four: ``(3, 32, 32)`` uint8."""
    with Image.open(io.BytesIO(png)) as opened:
        picture = opened.convert("RGBA")
    if picture.size != (2 * SIZE, 2 * SIZE):
        raise ValueError(
            f"pictures of 64x64 pixels are expected in the package; got {picture.size}"
        )
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB").reduce(2)
    return (
        torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        .reshape(SIZE, SIZE, 3)
        .permute(2, 0, 1)
    )


def prepare(folder: Path, target: Path) -> dict[str, torch.Tensor]:
    """Write the images of the packages' archives in a folder into one file.

    Returns
    -------
    What is written: ``images (n, 3, 32, 32)``, ``groups``, ``held_out`` (0 or 1) and ``vendor``
    (an index in `PACKAGES`), each ``(n,)``, all uint8.

    Raises
    ------
    ValueError : for an archive that is not the one whose checksum is known.
    FileNotFoundError : for one that is missing.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("groups", "held_out", "vendor")}
    images = []
    for number, (vendor, checksum) in enumerate(PACKAGES.items()):
        content = (folder / f"{_package(vendor)}-{VERSION}.tgz").read_bytes()
        if base64.b64encode(hashlib.sha512(content).digest()).decode() != checksum:
            raise ValueError(
                f"{_package(vendor)}-{VERSION}.tgz has another checksum than the published "
                "package; fetch it again"
            )
        prefix = f"package/img/{vendor}/64/"
        files: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file and (member.name.startswith(prefix) or member.name == LIST):
                    files[member.name.removeprefix(prefix)] = file.read()
        for entry, held_out in chosen(json.loads(files[LIST])):
            images.append(on_white(files[entry["image"]]))
            columns["groups"].append(GROUPS.index(entry["category"]))
            columns["held_out"].append(held_out)
            columns["vendor"].append(number)
    tensors = {name: torch.tensor(values, dtype=torch.uint8) for name, values in columns.items()}
    tensors["images"] = torch.stack(images)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(
        target, save(tensors, {"packages": f"{', '.join(map(_package, PACKAGES))} {VERSION}"})
    )
    return tensors


def _package(vendor: str) -> str:
    return f"emoji-datasource-{vendor}"


def _fetch(folder: Path) -> None:
    """Have npm put the packages' archives into a folder."""
    names = [f"{_package(vendor)}@{VERSION}" for vendor in PACKAGES]
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), *names]
    try:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(
            f"the packages {' and '.join(names)} are fetched with npm, which failed: {error}; run "
            f"`npm pack {' '.join(names)}` where it works, and {COMMAND} FOLDER with the archives"
        ) from error


def main() -> None:
    """Prepare the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="where the packages' archives lie")
    folder = parser.parse_args().folder
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if folder is None:
                folder = Path(temporary)
                _fetch(folder)
            tensors = prepare(folder, emoji_file())
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    held_out = int(tensors["held_out"].sum())
    count = len(tensors["images"])
    print(f"{emoji_file()}: {count} images, {held_out} of them held out")


if __name__ == "__main__":
    main()

"""Where images come from: `builtin:NAME`, `folder:PATH`, `hub:NAME`."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from compress.common.extras import extra
from compress.common.files import expand, json_lines, walk
from compress.common.foreign import foreign
from compress.data.batches import Examples
from compress.data.digits import HALVES, digits
from compress.data.emoji import PARTS, emoji
from compress.data.pixels import FRAMED, Mode, frame_count, is_image, open_image, upright

logger = logging.getLogger(__name__)

Condition = Literal["caption", "label"]
Size = int | tuple[int, int]  # the side of a square, or height and width

MODES: dict[int, Mode] = {1: "L", 3: "RGB"}  # by the number of channels
# splits of a data set that are held out, in this order, where it has them
HELD_OUT_SPLITS = ("test", "validation", "valid", "val")
# what folders call their splits, as `datasets` has it
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
# where captions of a folder are, as `datasets` has it; paths in it begin at its own folder
METADATA = "metadata.jsonl"


Part = Callable[[str], tuple[torch.Tensor, torch.Tensor]]
BUILTIN: dict[str, tuple[Part, tuple[str, str]]] = {
    "builtin:digits": (digits, HALVES),
    "builtin:emoji": (emoji, PARTS),
}


class Images(Protocol):
    """A data set of known length that yields ``(channels, height, width)`` in [-1, 1]."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image."""
        ...


class FileImages(Dataset[torch.Tensor]):
    """Image files, cut to the size's shape in their middle and resized (bicubic, antialiased)."""

    def __init__(self, files: list[Path], size: Size, channels: int) -> None:
        self.files, self.size, self.channels = files, size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(open_image(self.files[index], MODES[self.channels]), self.size)


class HubImages(Dataset[torch.Tensor]):
    """Rows of a `datasets` split that has one image column."""

    def __init__(self, rows: Any, column: str, size: Size, channels: int) -> None:
        self.rows, self.column, self.size, self.channels = rows, column, size, channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= len(self):
            raise IndexError(index)  # which ends an iteration
        what = f"an image in the column {self.column!r}"
        with foreign(f"row {index}", what, "mend or remove the row"):
            image = upright(self.rows[index][self.column], MODES[self.channels])
        return to_tensor(image, self.size)


@dataclass(frozen=True)
class ImageData:
    """A training set and the held-out images that serve as validation and metric reference.

    ``train`` and ``held_out`` yield ``(channels, height, width)`` float32 in [-1, 1]. The
    conditions say something about each of their images, in the same order: a caption, or a label.
    """

    name: str
    train: Images
    held_out: Images
    train_conditions: Sequence[Any] | None = None
    held_out_conditions: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "held_out"):
            images, described = getattr(self, part), getattr(self, f"{part}_conditions")
            if described is not None and len(described) != len(images):
                raise ValueError(
                    f"one condition is expected for each image; {self.name} has {len(images)} "
                    f"images in {part} and {len(described)} conditions; give as many"
                )

    @classmethod
    def split(
        cls, name: str, images: Images, conditions: Sequence[Any] | None = None
    ) -> "ImageData":
        """Hold out every tenth image of a data set (our own choice: deterministic, spread out)."""
        count = len(images)
        if count < 2:
            raise ValueError(
                f"at least 2 images expected in {name}; found {count}; give it more images"
            )
        parts = [i for i in range(count) if i % 10], list(range(0, count, 10))
        return cls(name, *_subsets(images, parts), *_subsets(conditions, parts))


def _subsets(items: Any, parts: Iterable[Sequence[int]]) -> Iterator[Any]:
    """Those of some images or conditions that each part has; None where there are none."""
    for part in parts:
        yield None if items is None else Subset(items, part)


class Pairs(Dataset[tuple[torch.Tensor, Any]]):
    """Images with what is said about them, None where nothing is."""

    def __init__(self, images: Images, conditions: Sequence[Any] | None) -> None:
        self.images, self.conditions = images, conditions

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        described = None if self.conditions is None else self.conditions[index]
        return self.images[index], described


def stacked(pairs: Iterable[tuple[torch.Tensor, Any]]) -> Examples:
    """Put images of :class:`Pairs` together."""
    images, described = zip(*pairs, strict=True)
    return Examples(torch.stack(images), None if described[0] is None else list(described))


def to_tensor(image: Image.Image, size: Size) -> torch.Tensor:
    """Turn an upright image into ``(channels, *size)`` in [-1, 1].

    What fits the size is taken from the middle, before it is resized: a strip that is resized on
    its short side takes gigabytes.
    """
    from torchvision.transforms import functional as vision

    height, width = _pair(size)
    scale = min(image.width / width, image.height / height)
    across, down = (max(1, round(side * scale)) for side in (width, height))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    fitting = image.crop((left, top, left + across, top + down))
    resized = fitting.resize((width, height), Image.Resampling.BICUBIC)
    return vision.pil_to_tensor(resized).float() / 127.5 - 1


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def load_images(
    source: str,
    size: Size,
    channels: int,
    condition: Condition | None = None,
    column: str | None = None,
) -> ImageData:
    """Open a data source of a recipe.

    Parameters
    ----------
    source : ``builtin:digits``, ``builtin:emoji`` (once it is prepared), ``folder:PATH`` (any
        nesting, whatever Pillow reads) or ``hub:NAME`` (a data set id, or a local folder in its
        layout, read by `datasets`). A test or
        validation split is held out, of a folder by the name of a subfolder beside ``train``;
        without one, every tenth image is.
    size, channels : what the model takes: the side of a square, or height and width.
    condition : what must be known about each image. Captions of a folder are in ``metadata.jsonl``
        (``file_name`` and the column), its labels are the names of the innermost subfolders, in
        alphabetical order, folders of splits left out.
    column : of the captions or labels; "text" or "label" when None.

    Raises
    ------
    ValueError : for an unknown source, an empty folder, a size that the source does not have, or
        captions or labels that are missing.
    MissingExtraError : for the hub without `datasets`.
    """
    kind, _, name = source.partition(":")
    column = column or {"caption": "text", "label": "label", None: ""}[condition]
    if source in BUILTIN:
        return _builtin(source, size, channels, condition)
    if channels not in MODES:
        raise ValueError(
            f"images of a folder or of the hub have 1 or 3 channels; the model takes {channels}; "
            "choose another model, or hand in tensors from Python"
        )
    if kind == "folder" and name:
        return _folder(source, expand(name), size, channels, condition, column)
    if kind == "hub" and name:
        return _hub(source, name, size, channels, condition, column)
    raise ValueError(
        f"data must be {', '.join(BUILTIN)}, folder:PATH or hub:NAME; got {source!r}; name one of "
        "these"
    )


def _builtin(source: str, size: Size, channels: int, condition: Condition | None) -> ImageData:
    if condition == "caption":
        raise ValueError(
            f"the model takes captions, and {source} has only labels; choose a folder with "
            f"{METADATA}, or a data set of the hub with a column of texts"
        )
    (train, train_labels), (held_out, labels) = builtin_parts(source)
    theirs, shape = tuple(train.shape[1:]), (channels, *_pair(size))
    if theirs != shape:
        raise ValueError(
            "{} has {}x{} images with {} channel(s); the model takes {}x{} with {}; choose data "
            "that fits the model".format(source, *theirs[1:], theirs[0], *shape[1:], shape[0])
        )
    conditions = (train_labels.tolist(), labels.tolist()) if condition else ()
    return ImageData(source, train, held_out, *conditions)


def builtin_parts(source: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels that models are trained on, then those that are held out."""
    load, parts = BUILTIN[source]
    return [load(part) for part in parts]


def _folder(
    source: str, folder: Path, size: Size, channels: int, condition: Condition | None, column: str
) -> ImageData:
    if not folder.is_dir():
        raise ValueError(f"data folder expected at {folder}, which does not exist; check the path")
    files = [path for path in walk(folder) if is_image(path)]
    if len(files) < 2:
        raise ValueError(
            f"at least 2 images expected under {folder}; found {len(files)}; point folder: at "
            "images"
        )
    several = [path for path in files if path.suffix.lower() in FRAMED and _has_frames(path)]
    if several:
        logger.warning(
            "of files with several images the first is used: %d, such as %s",
            len(several),
            several[0],
        )
    parts = _folder_splits(folder, files)
    conditions: Sequence[Any] | None = None
    if condition == "caption":
        conditions = _folder_captions(folder, files, column)
    elif condition == "label":
        conditions = _folder_labels(folder, files, parts is not None)
    images = FileImages(files, size, channels)
    if parts is None:
        return ImageData.split(source, images, conditions)
    return ImageData(source, *_subsets(images, parts), *_subsets(conditions, parts))


def _has_frames(path: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):  # which reading the file will say
        return frame_count(path) > 1
    return False


def _folder_splits(folder: Path, files: Sequence[Path]) -> list[list[int]] | None:
    """Files to train on and files to hold out, where folders are called so."""
    splits: dict[str, list[int]] = {}
    for number, path in enumerate(files):
        parts = [part.lower() for part in path.relative_to(folder).parts[:-1]]
        split = next((SPLITS[part] for part in parts if part in SPLITS), "")
        splits.setdefault(split, []).append(number)
    held_out = next((name for name in HELD_OUT_SPLITS if name in splits), "")
    if "train" not in splits or not held_out:
        return None
    used = [splits["train"], splits[held_out]]
    if others := len(files) - sum(map(len, used)):
        logger.warning(
            "%s: %d images are not used, in neither train nor %s", folder, others, held_out
        )
    return used


def _folder_captions(folder: Path, files: Sequence[Path], column: str) -> list[str]:
    known: dict[Path, str] = {}
    tables = [path for path in walk(folder) if path.name == METADATA]
    for table in tables:
        for number, line in json_lines(table):
            try:
                row = json.loads(line)
                known[table.parent / row["file_name"]] = row[column]
                fits = isinstance(row[column], str)
            except (json.JSONDecodeError, KeyError, TypeError):
                fits = False
            if not fits:
                raise ValueError(
                    f"line {number} of {table} should be a JSON object with texts for file_name "
                    f"and {column}; got {line[:80]}; mend it, or name the column with "
                    "columns.caption"
                )
    lacking = [path for path in files if path not in known]
    if lacking:
        where = f"none in {len(tables)} files called {METADATA}" if tables else f"no {METADATA}"
        raise ValueError(
            f"the model takes captions, so each image under {folder} needs a line with file_name "
            f"and {column} in a {METADATA} of its folder or one above; {lacking[0]} and "
            f"{len(lacking) - 1} others have {where}; add them"
        )
    return [known[path] for path in files]


def _folder_labels(folder: Path, files: Sequence[Path], split: bool) -> list[int]:
    names = []
    for path in files:
        above = path.relative_to(folder).parts[:-1]
        kept = [name for name in above if not split or name.lower() not in SPLITS]
        names.append(kept[-1] if kept else folder.name)
    classes = sorted(set(names))
    if len(classes) < 2:
        raise ValueError(
            f"the model takes class labels, so a subfolder for each class is expected in {folder}; "
            f"all {len(files)} images lie in {files[0].parent}; sort them into subfolders"
        )
    return [classes.index(name) for name in names]


def _hub(
    source: str, name: str, size: Size, channels: int, condition: Condition | None, column: str
) -> ImageData:
    datasets = _import_datasets()
    try:
        loaded = datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError) as error:
        raise ValueError(
            f"{source} should be a data set of the hub, or a folder in its layout; it cannot be "
            f"opened: {error}; check the name, or whether the hub can be reached"
        ) from error
    rows = loaded.get("train")
    if rows is None:
        raise ValueError(
            f"{source} must have a split called train; found {', '.join(loaded)}; choose another "
            "data set"
        )
    columns = [c for c, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(
            f"{source} must have exactly one image column; found {columns or 'none'} among "
            f"{list(rows.features)}; choose another data set or export it to a folder"
        )

    def images_of(rows: Any) -> Images:
        return HubImages(rows, columns[0], size, channels)

    def conditions_of(rows: Any) -> Sequence[Any] | None:
        return None if condition is None else _hub_conditions(source, rows, condition, column)

    conditions = conditions_of(rows)
    for split in HELD_OUT_SPLITS:
        if split in loaded:
            held_out = loaded[split]
            return ImageData(
                source, images_of(rows), images_of(held_out), conditions, conditions_of(held_out)
            )
    return ImageData.split(source, images_of(rows), conditions)


def _import_datasets() -> Any:
    with extra("data", "a data set of the hub"):
        import datasets
    return datasets


def _hub_conditions(source: str, rows: Any, condition: Condition, column: str) -> Sequence[Any]:
    datasets = _import_datasets()
    feature = rows.features.get(column)
    kind = getattr(feature, "dtype", None)
    if condition == "caption" and kind in ("string", "large_string"):
        return rows.select_columns([column])[column]  # which is read row by row
    if condition == "label" and isinstance(feature, datasets.ClassLabel | datasets.Value):
        if "int" in str(kind):
            return [int(label) for label in rows[column]]
    what = {"caption": "captions, a column of texts", "label": "labels, a column of integers"}
    raise ValueError(
        f"the model takes {what[condition]}; {source} has {column!r} = {feature} among "
        f"{list(rows.features)}; name the column with columns.{condition}, or choose other data"
    )

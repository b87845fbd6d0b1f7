"""Where images come from: `builtin:digits`, `folder:PATH`, `hub:NAME`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import Dataset, Subset

from compress.data.digits import digits

# recognised without a look into the file; any other file is an image if Pillow says so
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# splits of a data set that are held out, in this order, where it has them
HELD_OUT_SPLITS = ("test", "validation", "valid", "val")


class Images(Protocol):
    """A data set of known length that yields ``(channels, height, width)`` in [-1, 1]."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image."""
        ...


class TensorImages(Dataset[torch.Tensor]):
    """Images that lie in memory: ``(n, channels, height, width)`` in [-1, 1]."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class FileImages(Dataset[torch.Tensor]):
    """Image files, resized (bicubic, antialiased) on their short side and centre-cropped."""

    def __init__(self, files: list[Path], size: int, channels: int) -> None:
        self.files, self.size, self.channels = files, size, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        try:
            with Image.open(self.files[index]) as opened:
                return to_tensor(opened, self.size, self.channels)
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"an image was expected in {self.files[index]}, but it cannot be read ({error}); "
                "mend or remove the file"
            ) from error


class HubImages(Dataset[torch.Tensor]):
    """Rows of a `datasets` split that has one image column."""

    def __init__(self, rows: Any, column: str, size: int, channels: int) -> None:
        self.rows, self.column, self.size, self.channels = rows, column, size, channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return to_tensor(self.rows[index][self.column], self.size, self.channels)


@dataclass(frozen=True)
class ImageData:
    """A training set and the held-out images that serve as validation and metric reference.

    ``train`` and ``held_out`` yield ``(channels, height, width)`` float32 in [-1, 1].
    """

    name: str
    train: Images
    held_out: Images

    @classmethod
    def split(cls, name: str, images: Images) -> "ImageData":
        """Hold out every tenth image of a data set (our own choice: deterministic, spread out)."""
        count = len(images)
        if count < 2:
            raise ValueError(
                f"at least 2 images expected in {name}; found {count}; give it more images"
            )
        train = [i for i in range(count) if i % 10]
        whole = cast(Dataset[torch.Tensor], images)
        held_out = list(range(0, count, 10))
        return cls(name, cast(Images, Subset(whole, train)), cast(Images, Subset(whole, held_out)))


def to_tensor(image, size: int, channels: int) -> torch.Tensor:
    """Turn a PIL image into ``(channels, size, size)`` in [-1, 1]: resized, centre-cropped."""
    from PIL import Image
    from torchvision.transforms import functional as vision

    image = image.convert("L" if channels == 1 else "RGB")
    short = min(image.size)
    wanted = [max(size, round(side * size / short)) for side in image.size]
    image = image.resize((wanted[0], wanted[1]), Image.Resampling.BICUBIC)
    return vision.center_crop(vision.pil_to_tensor(image), [size, size]).float() / 127.5 - 1


def load_images(source: str, size: int, channels: int) -> ImageData:
    """Open a data source of a recipe.

    Parameters
    ----------
    source : ``builtin:digits``, ``folder:PATH`` (any nesting, whatever Pillow reads) or
        ``hub:NAME`` (a data set id, or a local folder in its layout, read by `datasets`). A test or
        validation split is held out; without one, every tenth image is.
    size, channels : what the model takes.

    Raises
    ------
    ValueError : for an unknown source, an empty folder, or a size that the source does not have.
    """
    kind, _, name = source.partition(":")
    if source == "builtin:digits":
        if (size, channels) != (16, 1):
            raise ValueError(
                "builtin:digits has 16x16 images with 1 channel; the model takes "
                f"{size}x{size} with {channels}; choose data that fits the model"
            )
        return ImageData(source, TensorImages(digits("a")[0]), TensorImages(digits("b")[0]))
    if kind == "folder" and name:
        return _folder(source, Path(name), size, channels)
    if kind == "hub" and name:
        return _hub(source, name, size, channels)
    raise ValueError(
        f"data must be builtin:digits, folder:PATH or hub:NAME; got {source!r}; name one of these"
    )


def _folder(source: str, folder: Path, size: int, channels: int) -> ImageData:
    if not folder.is_dir():
        raise ValueError(f"data folder expected at {folder}, which does not exist; check the path")
    files = sorted(path for path in folder.rglob("*") if _is_image(path))
    if len(files) < 2:
        raise ValueError(
            f"at least 2 images expected under {folder}; found {len(files)}; point folder: at "
            "images"
        )
    return ImageData.split(source, FileImages(files, size, channels))


def _is_image(path: Path) -> bool:
    """Whether a file is an image: by its suffix, or else by its header."""
    if path.name.startswith(".") or not path.is_file():
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    from PIL import Image

    try:
        with Image.open(path):
            return True
    except OSError:
        return False


def _hub(source: str, name: str, size: int, channels: int) -> ImageData:
    import datasets

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
    images = HubImages(rows, columns[0], size, channels)
    for split in HELD_OUT_SPLITS:
        if split in loaded:
            return ImageData(source, images, HubImages(loaded[split], columns[0], size, channels))
    return ImageData.split(source, images)

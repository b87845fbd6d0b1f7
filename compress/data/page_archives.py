"""Pages in archives and data sets: WebDataset shards and data sets of the hub, read where they are.

Nothing is extracted: a page is a place in a file, or the bytes of a row.
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

from compress.common.extras import extra
from compress.common.files import is_litter
from compress.common.foreign import ForeignFileError, foreign, one_line

HUB = "hub:"


@dataclass(frozen=True)
class Member:
    """A file in an archive that is not compressed, in place of its path.

    Parameters
    ----------
    archive : where it lies.
    name : in the archive.
    offset, size : of its bytes.
    """

    archive: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """End of the name, with the dot."""
        return PurePosixPath(self.name).suffix

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Its bytes, which fit into memory as those of any page do."""
        with self.archive.open(mode) as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


@dataclass(frozen=True)
class Row:
    """The encoded image of a row of a data set, in place of its path.

    Parameters
    ----------
    name : of the page.
    content : of the image; None where the data set says where it lies.
    path : as `datasets` writes it: of this machine, a URL, or within an archive.
    """

    name: str
    content: bytes | None
    path: str | None = None
    suffix: str = ""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Its bytes."""
        if self.content is not None or not self.path:
            return io.BytesIO(self.content or b"")
        from datasets.utils.file_utils import xopen

        with xopen(self.path, mode) as file:
            return io.BytesIO(file.read())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Damaged:
    """What cannot be opened, in place of its path."""

    name: str
    problem: str
    suffix: str = ""

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Raise what is wrong."""
        raise ForeignFileError(self.problem)

    def __str__(self) -> str:
        return self.name


def members(archive: Path) -> Iterator[Member | Damaged]:
    """The files of a tar archive, in its order; hidden ones are passed over.

    Links and others that hold no bytes of their own, which no data set needs, are damaged.

    Raises
    ------
    ForeignFileError : when it is damaged, after the files before the damage, and for names that
        lead out of it.
    """
    with foreign(archive, "a tar archive that is not compressed", "write it again"):
        with tarfile.open(archive, "r:") as tar:
            for entry in tar:
                path = PurePosixPath(entry.name)
                if path.is_absolute() or ".." in path.parts or "\0" in entry.name:
                    raise ValueError(f"{one_line(entry.name)} leads out of it")
                tar.members = []  # type: ignore[attr-defined]  # it would grow with the archive
                if entry.isdir() or any(map(is_litter, path.parts)):
                    continue
                if entry.isreg() and not entry.issparse():
                    yield Member(archive, path.as_posix(), entry.offset_data, entry.size)
                else:
                    name = f"{archive}/{path}"
                    problem = (
                        f"{name} should be a file with its bytes; it is a link or of another kind; "
                        "write the archive again with tar --dereference --hard-dereference"
                    )
                    yield Damaged(name, problem, path.suffix)


def hub_rows(source: str) -> Iterator[Row]:
    """The images of a data set of the hub (or a folder in its layout), streamed and not decoded.

    Raises
    ------
    ValueError : for a data set that cannot be opened, or has not exactly one column of images.
    MissingExtraError : without `datasets`.
    """
    with extra("data", "a data set of the hub"):
        import datasets
    name = source.removeprefix(HUB)
    with foreign(source, "a data set with a split called train", "check the name, or the hub"):
        rows = datasets.load_dataset(name, split="train", streaming=True)
        features: dict[str, Any] = dict(rows.features or {})
        columns = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        if len(columns) != 1:
            raise ValueError(f"it has {len(columns)} columns of images, and one is read")
        [column] = columns
        rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for number, row in enumerate(rows):
            stored = row[column] or {}
            yield Row(f"{source}/{number:08d}", stored.get("bytes"), stored.get("path"))

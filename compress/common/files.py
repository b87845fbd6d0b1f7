"""Atomic writes, hashes and JSON: what every part that touches the disk shares."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from compress.common.foreign import foreign

if TYPE_CHECKING:
    from PIL import Image

# what archives, file servers and desktops leave in folders, beside what is hidden
LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN"}
# an unfinished write is called by the name that it was to get, what tempfile draws, and whose it is
_SUFFIX = ".compress-tmp"
_UNFINISHED = re.compile(rf"\.(.+)\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")


def unfinished(name: str) -> str | None:
    """The name that an unfinished write was to get; None for what is none.

    >>> unfinished(".report.html.a1b2c3d4.compress-tmp"), unfinished(".report.html.swp")
    ('report.html', None)
    """
    match = _UNFINISHED.fullmatch(name)
    return match and match[1]


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # not known to every file system
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Let what the disk says within the context name what is written.

    Parameters
    ----------
    target : the file or folder; of a failed write, the system does not say which it was.
    temporary : what it is called while it is incomplete.

    Raises
    ------
    OSError : naming the file at its final place.
    """
    try:
        yield
    except SafetensorError as error:  # how safetensors says that a disk is full
        match = re.search(r"os error (\d+)", str(error))
        if not match:
            raise OSError(f"{target} cannot be written: {error}") from error
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(target)) from error
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):
            raise
        # of two files, as of a copy, the second is the one that is written
        name = str(error.filename2 or error.filename or target)
        if temporary is not None:
            name = name.replace(str(temporary), str(target))
        raise OSError(error.errno, error.strerror, name) from error


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``target`` on success and vanishes on failure.

    An existing ``target`` is replaced only once its successor is complete.

    Raises
    ------
    OSError : when the parent cannot be written or the disk is full; ``target`` is untouched then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(_SUFFIX, f".{target.name}.", target.parent))
    try:
        # mkdtemp makes the folder private; a checkpoint has the permissions of any other folder
        temporary.chmod(0o777 & ~_umask())
        with writing(target, temporary):
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                if path.is_file():
                    # safetensors makes them private, too
                    path.chmod(0o666 & ~_umask())
                sync(path)
        if os.path.lexists(target):
            old = Path(tempfile.mkdtemp(_SUFFIX, f".{target.name}.", target.parent))
            try:
                os.replace(target, old / target.name)
                try:
                    os.replace(temporary, target)
                except OSError:
                    os.rename(old / target.name, target)
                    raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises
    ------
    OSError : naming the file; a full disk, too. The old content is untouched then.
    """
    handle, name = tempfile.mkstemp(_SUFFIX, f".{path.name}.", path.parent)
    try:
        with writing(path, Path(name)):
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
            sync(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, content: str) -> None:
    """Atomic counterpart of ``Path.write_text`` (UTF-8)."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON with sorted, stable formatting, atomically."""
    write_bytes(path, as_json(content, indent=2))


def as_json(content: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8, with a line feed at its end.

    What Python makes of names of files that are not UTF-8 is escaped, and read back as it was.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace")


def expand(path: str | Path) -> Path:
    """A path with ``~`` written out.

    Raises
    ------
    ValueError : for the home of a user who does not exist.
    """
    with foreign(path, "a path", "name the folder in full"):
        return Path(path).expanduser()


def cache_folder() -> Path:
    """Where what can be made again is kept: $COMPRESS_CACHE, or ~/.cache/compress."""
    return Path(os.environ.get("COMPRESS_CACHE") or Path.home() / ".cache" / "compress")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises
    ------
    ValueError : naming the file, when it is not JSON.
    FileNotFoundError : naming the file.
    """
    with foreign(path, "JSON"):
        return json.loads(path.read_text(encoding="utf-8-sig"))


def read_text(path: Path) -> str:
    """Read UTF-8, without the byte order mark that some editors put first.

    Raises
    ------
    ValueError : naming the file and the place, when it is not UTF-8.
    FileNotFoundError : naming the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} should be UTF-8 text; decoding fails at byte {error.start}; write it again"
        ) from error


def json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank.

    Lines end at a line feed alone: JSON may hold U+2028 and other characters at which
    ``str.splitlines`` would cut.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line


def append_rows(path: Path, *rows: Any) -> None:
    """Append rows as lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("ab") as file:
        file.write(b"".join(map(as_json, rows)))


def drop_torn_line(path: Path) -> None:
    """Remove a last line that a kill cut off."""
    with path.open("rb") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    if whole < path.stat().st_size:  # a file that is whole may be one to read only
        os.truncate(path, whole)


def walk(folder: Path) -> list[Path]:
    """Files below a folder, page 2 before page 10; none where there is no folder.

    Hidden entries and what systems leave behind are passed over. Links to folders are followed;
    a folder that is reached twice counts once, where it really is if that is below ``folder``.
    """
    paths: list[Path] = []
    seen: set[Path] = set()
    left, linked = [folder] if folder.is_dir() else [], list[Path]()
    while left or linked:
        at = left.pop() if left else linked.pop(0)
        real = at.resolve()
        if real in seen:
            continue
        seen.add(real)
        for entry in sorted(at.iterdir()):
            if is_litter(entry.name):
                continue
            if entry.is_dir():
                (linked if entry.is_symlink() else left).append(entry)
            elif entry.is_file():
                paths.append(entry)
    return sorted(paths, key=lambda path: natural(path.relative_to(folder).as_posix()))


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by a system: no data of a user."""
    return name.startswith(".") or name in LITTER


def natural(text: str) -> tuple[Any, ...]:
    """A key that sorts numbers in names by their value.

    >>> sorted(["page 10", "page 9", "cover"], key=natural)
    ['cover', 'page 9', 'page 10']
    """
    parts = re.split(r"([0-9]+)", text)
    return tuple(int(p) if k % 2 else p for k, p in enumerate(parts)), text


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """One SHA-256 over the names and contents of a folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted(walk(folder)):
        if path.suffix in (".safetensors", ".json"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(sha256(path).encode())
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def image_png(image: "Image.Image", **options: Any) -> bytes:
    """A picture as a PNG file; ``options`` are Pillow's."""
    target = io.BytesIO()
    image.save(target, format="PNG", **options)
    return target.getvalue()

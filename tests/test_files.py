"""Files and folders appear complete or not at all, and a failure leaves what was there before."""

import contextlib
import errno
import hashlib
import json
import os
import stat

import pytest
from safetensors import SafetensorError

from compress.common import files

FULL = OSError(28, "No space left on device")


@pytest.fixture
def umask():
    """A known umask, so that permissions can be compared."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def failing(real, at: int):
    """``real``, but its ``at``-th call finds the disk full."""
    calls = iter(range(1, 1000))

    def call(*args, **kwargs):
        if next(calls) == at:
            raise FULL
        return real(*args, **kwargs)

    return call


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.rglob("*"))


@pytest.mark.parametrize(
    ("write", "content", "expected"),
    [
        (files.write_bytes, b"\0new\xff", b"\0new\xff"),
        (files.write_text, "neu \N{SNOWMAN}\n", "neu \N{SNOWMAN}\n".encode()),
        (files.write_json, {"b": [1, None], "a": "\N{SNOWMAN}"}, None),
    ],
)
@pytest.mark.parametrize("old", [None, b"old content, longer than the new"])
def test_writing_replaces_the_whole_content(tmp_path, umask, write, content, expected, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    write(path, content)
    if expected is None:
        assert json.loads(path.read_text(encoding="utf8")) == content
        assert files.read_json(path) == content
        assert path.read_bytes().endswith(b"}\n")
    else:
        assert path.read_bytes() == expected
    assert names(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("broken", ["write", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, broken, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    if broken == "write":

        class Full:
            """A file on a disk that fills up after three bytes."""

            def __init__(self, handle, mode) -> None:
                self.handle = handle

            def __enter__(self):
                return self

            def __exit__(self, *_) -> None:
                os.close(self.handle)

            def write(self, content) -> None:
                os.write(self.handle, content[:3])
                raise FULL

        monkeypatch.setattr(files.os, "fdopen", Full)
    else:
        monkeypatch.setattr(files.os, broken, failing(getattr(os, broken), 1))
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_bytes(path, b"new content")
    assert caught.value.filename == str(path)
    assert names(tmp_path) == ([] if old is None else ["file"])
    if old is not None:
        assert path.read_bytes() == old


def test_a_full_disk_names_the_file_that_a_library_wrote(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"

    def message(error):
        with pytest.raises(OSError) as caught, files.atomic_folder(folder) as temporary:
            error.filename = error.filename and error.filename.format(temporary)
            raise error
        return str(caught.value)

    full = (errno.ENOSPC, "No space left on device")
    assert message(OSError(*full)).endswith(f"'{folder}'")
    assert message(OSError(*full, "{}/unet")).endswith(f"'{folder / 'unet'}'")
    assert message(OSError(*full, str(source), None, str(folder))).endswith(f"device: '{folder}'")
    for said in ("I/O error: No space left on device (os error 28)", "no number"):
        with pytest.raises(OSError, match=str(folder)), files.atomic_folder(folder):
            raise SafetensorError(said)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_the_old_content_too(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(path, b"new")
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_content_that_is_no_json_value_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    files.write_json(path, [1])
    with pytest.raises(TypeError):
        files.write_json(path, {"x": object()})
    assert files.read_json(path) == [1] and names(tmp_path) == ["file.json"]


# ---- folders -------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_appears_complete(tmp_path, umask, old):
    target = tmp_path / "above" / "target"
    if old:
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "old").write_text("old")
    with files.atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
        # until the end readers see what was there before
        assert names(target) == (["old", "sub"] if old else [])
    assert names(tmp_path) == ["above", "new", "target"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_a_failure_inside_leaves_the_old_folder_and_no_litter(tmp_path, old, error):
    target = tmp_path / "target"
    if old:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(type(error)), files.atomic_folder(target) as temporary:
        (temporary / "half").write_text("half")
        raise error
    assert names(tmp_path) == (["old", "target"] if old else [])


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda h: order.append(os.readlink(f"/proc/self/fd/{h}")) or fsync(h)
    )
    monkeypatch.setattr(files.os, "replace", lambda *p: order.append("renamed") or replace(*p))
    with files.atomic_folder(tmp_path / "target") as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "weights").write_text("new")  # as safetensors writes: without fsync
    at = order.index("renamed")
    expected = {str(temporary / name) for name in ("unet/weights", "unet", "")}
    assert {path.rstrip("/") for path in order[:at]} == {path.rstrip("/") for path in expected}
    assert order[at + 1 :] == [str(tmp_path)]
    order.clear()
    files.write_bytes(tmp_path / "file", b"new")
    assert order[1:] == ["renamed", str(tmp_path)] and len(order) == 3


@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_rename_leaves_the_old_folder_and_no_litter(tmp_path, monkeypatch, at):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    monkeypatch.setattr(files.os, "replace", failing(os.replace, at))
    with pytest.raises(OSError, match="No space left"), files.atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    monkeypatch.undo()
    assert names(tmp_path) == ["old", "target"]
    assert (target / "old").read_text() == "old"


def test_a_failed_rename_to_a_fresh_place_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "replace", failing(os.replace, 1))
    with pytest.raises(OSError), files.atomic_folder(tmp_path / "target") as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == []


# ---- reading and hashing -------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe{}"])
def test_what_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"facts\.json should hold JSON"):
        files.read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"facts\.json"):
        files.read_json(path)


def test_sha256_is_that_of_the_content(tmp_path):
    for content in (b"", b"a", os.urandom(200_000)):
        (tmp_path / "file").write_bytes(content)
        assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_folder_hash_sees_names_and_contents_of_weights_and_configuration(tmp_path):
    def make(folder, **contents) -> str:
        for name, content in contents.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return files.folder_hash(folder)

    same = {"unet__config_json": "1", "unet__w_safetensors": "2", "index_json": "3"}
    base = make(tmp_path / "base", **same)
    assert make(tmp_path / "again", **dict(reversed(same.items()))) == base
    assert make(tmp_path / "readme", **same, README_md="x", train_jsonl="y") == base
    others = [
        make(tmp_path / "content", **(same | {"unet__config_json": "4"})),
        make(tmp_path / "more", **same, vae__config_json="1"),
        make(tmp_path / "moved", **{k.replace("unet", "net"): v for k, v in same.items()}),
        make(
            tmp_path / "swapped", **(same | {"unet__config_json": "2", "unet__w_safetensors": "1"})
        ),
    ]
    assert len({base, *others}) == 5


def test_the_umask_is_read_without_being_changed(umask):
    with contextlib.ExitStack() as stack:
        stack.callback(os.umask, os.umask(0o027))
        assert files._umask() == 0o027
        assert files._umask() == 0o027

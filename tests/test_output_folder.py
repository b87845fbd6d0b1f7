"""What compress did not write is never removed, replaced or written into."""

import json
import os
import shutil

import pytest

from compress.common.files import write_json
from compress.common.output_folder import (
    PAGES,
    check_apart,
    check_new_file,
    check_replaceable,
    check_target,
    claim,
    locked,
    new_folder,
    not_ours,
)

pytestmark = pytest.mark.usefixtures("quick_runs")

FRESH = {"resume": False, "overwrite": False}
OVERWRITE = {"resume": False, "overwrite": True}
RESUME = {"resume": True, "overwrite": False}
WRITTEN = (
    *("recipe.yaml", "log.jsonl", "metrics.json", "report.html", "model.json", "calibration.json"),
    *("state/state.safetensors", "state/state-1.safetensors", "samples.safetensors"),
    *("predictions/dense.jsonl", "predictions/fastocr keep_visual=0.2 #2.jsonl"),
    *("trace.safetensors", "figures/kept.png", "trackers/compress/events.out.tfevents.1"),
    *("checkpoint/unet/config.json", "checkpoint/README.md"),
)
# what a kill leaves
LEFT = (
    *(".lock", "..compress.a1b2c3d4.compress-tmp", ".report.html.abcdefg_.compress-tmp"),
    *("state/.state.safetensors.01234567.compress-tmp", ".checkpoint.zzzzzzzz.compress-tmp/a"),
)


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("" if name == ".lock" else name)


def tree(folder):
    paths = (path for path in folder.rglob("*") if path.name != ".lock")
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in paths}


@pytest.fixture
def used(tmp_path):
    """The folder of a run, with everything that a run may leave."""
    with claim(tmp_path / "run", "run", **FRESH):
        put(tmp_path / "run", *WRITTEN)
        facts = {"format": 1, "files": {"unet/config.json": "0", "README.md": "0"}}
        write_json(tmp_path / "run" / "checkpoint" / "compress.json", facts)
    put(tmp_path / "run", *LEFT)
    return tmp_path / "run"


def enter(folder, **options):
    with claim(folder, "run", **options):
        return sorted(p.name for p in folder.iterdir())


def test_what_compress_wrote_is_replaced_and_links_are_not_followed(used, tmp_path):
    put(tmp_path / "elsewhere", "deep/data", "report.html")
    for name in ("figures", "checkpoint", "state"):
        shutil.rmtree(used / name)
        (used / name).symlink_to(tmp_path / "elsewhere")
    (used / "report.html").unlink()
    (used / "report.html").symlink_to(tmp_path / "elsewhere" / "report.html")
    (used / "predictions" / "link.jsonl").symlink_to(tmp_path / "elsewhere" / "deep")
    assert not_ours(used) == []
    assert enter(used, **OVERWRITE) == [".compress", ".lock"]
    assert {*tree(tmp_path / "elsewhere")} == {"deep", "deep/data", "report.html"}


def test_without_a_kill_or_a_link_nothing_is_foreign_either(used):
    assert not_ours(used) == []
    assert enter(used, **OVERWRITE) == [".compress", ".lock"]
    assert [p.name for p in used.iterdir()] == [".compress"]


@pytest.mark.parametrize(
    "name",
    [
        *("thesis.tex", ".git/config", "data/a.png", "notes/recipe.yaml", "a.png", "log.jsonl.bak"),
        *(".recipe.yaml.swp", ".checkpoint-backup/weights", ".report.html.abcdefgh.tmp"),
        *(".thesis.tex.abcdefgh.compress-tmp", ".checkpoint.ABCDEFGH.compress-tmp/a"),
        *("checkpoint/thesis.tex", "checkpoint/unet/more", "checkpoint/.git/config", "state/mine"),
        *("predictions/deep/notes.md", "figures/mine.svg", "recipe.yaml/mine"),
    ],
)
def test_what_is_foreign_is_named_and_kept(used, name):
    if name.startswith("recipe.yaml/"):
        (used / "recipe.yaml").unlink()
    put(used, name)
    before = tree(used)
    for check in (check_target, enter):
        with pytest.raises(FileExistsError, match=r"only what compress wrote.*choose another") as e:
            check(used, **OVERWRITE)
        named = {name[: i + 1 or None] for i, c in enumerate(name + "/") if c == "/"}
        assert any(part.strip("/") in str(e.value) for part in named)
        assert tree(used) == before
    # no advice that would be refused
    with pytest.raises(FileExistsError, match="holds a finished run; choose another --output$"):
        check_target(used, **FRESH)
    # going on touches nothing of it
    enter(used, **RESUME)
    assert (used / name).read_text() == name


@pytest.mark.parametrize("options", [FRESH, OVERWRITE, RESUME])
@pytest.mark.parametrize(
    "names",
    [
        ("recipe.yaml", ".git/config", "data/a.png", "thesis.tex"),
        ("a.html", "report.html", "metrics.json", "checkpoint/compress.json"),
        (".recipe.yaml.swp",),
        (".checkpoint-backup/weights",),
        (".compress", "mine"),
    ],
)
def test_a_folder_without_our_marker_is_left_alone(tmp_path, names, options):
    put(tmp_path / "p", *names)
    before = tree(tmp_path)
    for check in (check_target, enter):
        with pytest.raises(FileExistsError, match="is no run of compress: .*choose another") as e:
            check(tmp_path / "p", **options)
        assert "--overwrite" not in str(e.value) and names[0].split("/")[0] in str(e.value)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("options", [FRESH, OVERWRITE, RESUME])
def test_a_run_that_lacks_its_marker_is_told_how_to_get_it_back(used, tmp_path, options):
    shutil.copytree(used, tmp_path / "copy", ignore=lambda *_: [".compress"])
    with pytest.raises(FileExistsError, match=r"lacks the marker \.compress .*copy \.compress too"):
        check_target(tmp_path / "copy", **options)
    shutil.copy(used / ".compress", tmp_path / "copy")
    check_target(tmp_path / "copy", **RESUME)


def test_what_a_kill_at_the_first_file_leaves_is_ours(tmp_path):
    put(tmp_path / "run", ".lock", "..compress.a1b2c3d4.compress-tmp")
    assert enter(tmp_path / "run", **FRESH) == [".compress", ".lock"]


def test_a_resumed_run_keeps_everything_but_what_a_kill_left(used):
    (used / "report.html").unlink()
    names = enter(used, **RESUME)
    tops = {name.split("/")[0] for name in WRITTEN} - {"report.html"}
    assert set(names) == tops | {".compress", ".lock"}


@pytest.mark.parametrize("mine", [(), ("thesis.tex",)])
def test_a_failure_at_the_start_takes_back_what_it_wrote_and_no_more(tmp_path, mine):
    with pytest.raises(ValueError), claim(tmp_path / "run", "run", **FRESH):
        put(tmp_path / "run", "recipe.yaml", "log.jsonl", *mine)
        raise ValueError
    assert list(tree(tmp_path)) == (["run", "run/thesis.tex"] if mine else [])


def test_a_loser_of_a_race_removes_nothing(tmp_path, monkeypatch):
    with claim(tmp_path / "run", "run", **FRESH):
        put(tmp_path / "run", "recipe.yaml")
        monkeypatch.setattr(type(tmp_path), "exists", lambda path: path.name != "run")
        with pytest.raises(FileExistsError, match="in use by another process"):
            enter(tmp_path / "run", **FRESH)
        monkeypatch.undo()
        assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.parametrize(
    ("output", "given"),
    [
        *(("R", "R/checkpoint"), ("R", "folder:R/imgs"), ("R", "R"), ("imgs/run", "folder:imgs")),
        *(("R", "link"), ("link-to-R", "R/imgs"), ("R", "R/imgs/weights.pth"), ("R/..", "R/imgs")),
    ],
)
def test_inputs_and_output_lie_apart(tmp_path, monkeypatch, output, given):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "R/imgs/weights.pth", "R/checkpoint/a", "imgs/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "R" / "imgs")
    (tmp_path / "link-to-R").symlink_to(tmp_path / "R")
    with pytest.raises(ValueError, match=f"data is {given.removeprefix('folder:')}, the output"):
        check_apart(tmp_path / output, {"model": "builtin:x", "data": given})
    check_apart(tmp_path / "R2", {"model": "builtin:x", "data": given, "other": "~nobody/R2"})


def test_what_an_input_leads_to_lies_apart_from_the_output_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(
        tmp_path, "R/checkpoint/weights", "R/imgs/a.png", "D/b.png", "deep/c.png", "M/compress.json"
    )
    (tmp_path / "D" / "loop").symlink_to(tmp_path / "D")
    (tmp_path / "D" / "self").symlink_to(tmp_path / "D" / "self")
    (tmp_path / "M2").symlink_to(tmp_path / "M")
    write_json(tmp_path / "M" / "compress.json", {"weights": {"model": "R/checkpoint"}})
    for model in ("M", "M2"):
        with pytest.raises(ValueError, match=f"is {model}, which reads .*R/checkpoint, the output"):
            check_apart(tmp_path / "R", {"model": model})
        check_apart(tmp_path / "R2", {"model": model})
    # through two links, the second of which is a file
    (tmp_path / "D" / "more").symlink_to(tmp_path / "deep")
    check_apart(tmp_path / "R", {"data": "folder:D"})
    (tmp_path / "deep" / "a.png").symlink_to(tmp_path / "R" / "imgs" / "a.png")
    with pytest.raises(ValueError, match="data is D, which reads .*R/imgs/a.png"):
        check_apart(tmp_path / "R", {"data": "folder:D"})


def test_every_input_of_a_recipe_is_found():
    from compress.common.settings import inputs_of
    from compress.runs.recipe import load_recipe

    changes = ["evaluate.inception_weights=w.pth", "data=folder:imgs"]
    assert inputs_of(load_recipe("ddpm_gradflow", changes)) == {
        "model": "builtin:ddpm-digits",
        "data": "folder:imgs",
        "evaluate.inception_weights": "w.pth",
    }
    assert {*inputs_of(load_recipe("reader_rtprune"))} == {"model", "data"}


def test_a_run_that_fails_says_what_is_kept_and_how_to_go_on(tmp_path):
    from compress.runs.recipe import load_recipe
    from compress.runs.run import _next_step

    def told(message="the disk is gone"):
        return _next_step(OSError(message), recipe, tmp_path)

    recipe = load_recipe("ddpm_gradflow")
    assert told() == ""
    put(tmp_path, "state/state.safetensors")
    assert told().startswith(f"what was done is kept in {tmp_path}; once")
    assert told("start again with a lower recover.lr and --overwrite") == ""
    put(tmp_path, "checkpoint/compress.json")
    assert "is complete; go on with --resume, which takes changes of evaluate, or measure" in told()
    assert told().endswith(f"compress eval {tmp_path}/checkpoint --data builtin:digits")
    put(tmp_path, "predictions/dense.jsonl")
    assert "takes changes of evaluate.metrics, evaluate.strict, or measure" in told("--resume")


# ---- what is written at once ---------------------------------------------------------------


def make(folder, **options):
    with new_folder(folder, PAGES, **options) as temporary:
        put(temporary, "images/0.png", "OmniDocBench.json")


def test_pages_are_replaced_by_pages_alone(tmp_path):
    folder = tmp_path / "made"
    make(folder)
    with pytest.raises(FileExistsError, match="holds a set of pages of compress already.*--over"):
        make(folder)
    make(folder, overwrite=True)
    with pytest.raises(FileExistsError, match="is no checkpoint of compress; choose another"):
        check_replaceable(folder, "checkpoint", overwrite=True)
    put(folder, "images/mine.png")
    before = tree(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"and also images/mine.png; move") as e:
            make(folder, overwrite=overwrite)
        assert "--overwrite" not in str(e.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("facts", ["[]", "{", "{}", '{"format": 1}', '{"files": {}}'])
def test_what_is_no_list_of_ours_is_no_checkpoint(tmp_path, facts):
    put(tmp_path / "c", "compress.json")
    (tmp_path / "c" / "compress.json").write_text(facts)
    with pytest.raises(FileExistsError, match="no checkpoint of compress"):
        check_replaceable(tmp_path / "c", "checkpoint", overwrite=True)


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_files_and_links_are_not_replaced(tmp_path, kind):
    make(tmp_path / "real")
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    else:
        os.symlink(tmp_path / ("real" if kind == "link" else "nowhere"), target)
    with pytest.raises(FileExistsError, match="new or empty folder is expected"):
        make(target, overwrite=True)
    with pytest.raises(FileExistsError, match=r"name another, or move it"):
        check_new_file(target)


def test_a_folder_to_be_is_held_by_one_process(tmp_path):
    with locked(tmp_path / "above" / "made"):
        with pytest.raises(FileExistsError, match="in use by another process"):
            with locked(tmp_path / "above" / "made"):
                pass
        assert [p.name for p in (tmp_path / "above").iterdir()] == [".made.lock"]
    assert list((tmp_path / "above").iterdir()) == []
    (tmp_path / ".made.lock").write_text("mine")
    with locked(tmp_path / "made"):
        pass
    assert (tmp_path / ".made.lock").read_text() == "mine"


def test_the_marker_says_what_it_marks(used, tmp_path):
    make(tmp_path / "made")
    marks = [json.loads((folder / ".compress").read_text()) for folder in (used, tmp_path / "made")]
    assert [mark["kind"] for mark in marks] == ["run", PAGES]
    assert marks[1]["files"] == ["OmniDocBench.json", "images/0.png"]

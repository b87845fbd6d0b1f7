"""Runs on a reader, from the recipe to the checkpoint, and methods applied in memory."""

import copy
import gc
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import compress
from compress import FastOCR, RTPrune
from compress.cli import app
from compress.data.pages import page
from compress.eval.ocr import read_predictions
from compress.models.builtin import train_reader_deepseek, train_reader_qwen
from compress.models.builtin.reader_training import LEVELS
from compress.models.reading import read_pages
from compress.models.vlm import load_vlm
from compress.patched import load_patched, save_patched
from compress.pipeline import run_events
from compress.reader_run import counted, variant_name, variants
from compress.recipe import load_recipe

SMALL = LEVELS[1].difficulty
SQUARE = train_reader_deepseek.LEVELS[2].difficulty


def folder_of(module, path):
    """An untrained reader whose weights are large enough that its text depends on the page."""
    torch.manual_seed(0)
    reader = module.build()
    with torch.no_grad():
        for parameter in reader.model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    reader.model.generation_config.max_new_tokens = 6
    reader.save(reader.model, path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return folder_of(train_reader_qwen, tmp_path_factory.mktemp("qwen") / "reader")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return folder_of(train_reader_deepseek, tmp_path_factory.mktemp("deepseek") / "reader")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "pages"
    folder.mkdir()
    for index in range(3):
        made = page(0, index, SMALL, "test")
        made.image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(made.text)
    return folder


def recipe_of(tmp_path, model, pages, method, **extra):
    path = tmp_path / "mine.yaml"
    content = {
        "model": str(model),
        "data": str(pages),
        "method": method,
        "calibrate": {"pages": 2, "max_new_tokens": 4},
        "evaluate": {"suite": "ocr", "batch": 2},
        "output": str(tmp_path / "out"),
        **extra,
    }
    path.write_text(json.dumps(content))
    return path


def finish(events):
    while True:
        try:
            next(events)
        except StopIteration as stop:
            return stop.value


FAST = {"name": "fastocr", "keep_visual": 0.2}


@pytest.fixture(scope="module")
def finished(qwen, pages, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    compare = [FAST | {"fixation": "random"}, FAST | {"keep_visual": 1.0}]
    recipe = recipe_of(tmp_path, qwen, pages, FAST, compare=compare)
    return finish(run_events(recipe, device="cpu"))


def test_a_run_leaves_what_a_run_leaves(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"recipe.yaml", "metrics.json", "report.html", "checkpoint", "predictions"} <= names
    assert {"comparison.png", "recall.png", "strip.png"} <= names
    report = (finished.folder / "report.html").read_text()
    assert "data:image/gif;base64" in report and report.count("data:image/png") >= 6
    stored = json.loads((finished.folder / "metrics.json").read_text())
    assert stored["calibration"]["focal_layers"] and len(stored["calibration"]["recall"]) == 8
    assert compress.recipe.load_recipe(finished.folder / "recipe.yaml").method[0].name == "fastocr"
    shown = CliRunner().invoke(app, ["show", str(finished.folder)])
    assert shown.exit_code == 0 and "accuracy_retention" in shown.stdout


def test_every_variant_read_the_same_pages_and_was_counted(finished):
    rows = finished.metrics["comparison"]
    names = [row["variant"] for row in rows]
    assert names[:2] == ["dense", "compressed"] and len(set(names)) == 4
    for row in rows:
        read = read_predictions(finished.folder / f"predictions/{row['variant']}.jsonl")
        assert [p.page for p in read] == ["0.png", "1.png", "2.png"]
        assert ("attended" in row) == (row["variant"] != "dense")
    by_name = dict(zip(names, rows, strict=True))
    everything = by_name["fastocr keep_visual=1.0"]
    assert everything["attended"] == 1
    # one focal layer of eight, the others at a fifth, the first step dense
    assert 0.3 < by_name["compressed"]["attended"] < 0.6
    dense = read_predictions(finished.folder / "predictions/dense.jsonl")
    all_kept = read_predictions(finished.folder / "predictions/fastocr keep_visual=1.0.jsonl")
    assert [p.text for p in dense] == [p.text for p in all_kept]
    assert everything["accuracy_retention"]["value"] == 1


def test_the_checkpoint_gives_the_run_s_own_predictions(finished, pages, qwen):
    from PIL import Image

    folder = finished.folder / "checkpoint"
    images = [Image.open(pages / f"{k}.png") for k in range(3)]
    model, processor, applied = load_patched(folder)
    [method] = applied.methods
    assert method.focal_layers == tuple(finished.metrics["calibration"]["focal_layers"])
    again = read_pages(model, processor, images[:2])
    again += read_pages(model, processor, images[2:])
    stored = read_predictions(finished.folder / "predictions/compressed.jsonl")
    assert [r.text for r in again] == [p.text for p in stored]
    # plain transformers sees the dense model, which knows nothing of the method
    assert "fastocr" not in (folder / "config.json").read_text().lower()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    dense, dense_processor = load_vlm(qwen)
    expected = read_pages(dense, dense_processor, images)
    assert [r.text for r in read_pages(plain, dense_processor, images)] == [
        r.text for r in expected
    ]


def test_a_killed_run_goes_on_to_the_same_end(finished, qwen, pages, tmp_path):
    compare = [FAST | {"fixation": "random"}, FAST | {"keep_visual": 1.0}]
    recipe = recipe_of(tmp_path, qwen, pages, FAST, compare=compare)
    events = run_events(recipe, device="cpu")
    for event in events:
        if event.stage == "compressed" and event.step == 2:
            break
    events.close()
    with pytest.raises(FileExistsError, match="--resume"):
        finish(run_events(recipe, device="cpu"))
    with pytest.raises(ValueError, match="method changed"):
        finish(run_events(recipe, overrides=["method.keep_visual=0.5"], resume=True, device="cpu"))
    result = finish(run_events(recipe, resume=True, device="cpu"))
    assert result.metrics["comparison"] == finished.metrics["comparison"]


def test_rtprune_runs_on_reader_deepseek(deepseek, tmp_path, monkeypatch):
    folder = tmp_path / "squares"
    folder.mkdir()
    for index in range(2):
        made = page(0, index, SQUARE, "test")
        made.image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(made.text)
    pruning = {"name": "rtprune", "keep_tokens": 0.5}
    both = [pruning, FAST | {"focal_layers": [2]}]
    evaluate = {"suite": "ocr", "batch": 2, "prompt": "all of it"}
    recipe = recipe_of(
        tmp_path, deepseek, folder, both, compare=[pruning], weights="reference", evaluate=evaluate
    )
    asked = []
    for name, place in (("read_pages", 3), ("build_prompt", 3)):
        made = getattr(compress.reader_report, name)

        def spy(*args, made=made, place=place, **kwargs):
            asked.append(args[place])
            return made(*args, **kwargs)

        monkeypatch.setattr(compress.reader_report, name, spy)
    result = finish(run_events(recipe, device="cpu"))
    assert asked == ["all of it", ["all of it"]]  # of the two pictures
    report = (result.folder / "report.html").read_text()
    assert "on the tokens that rtprune left of it; on the first page" in report
    assert "98 of 196 visual tokens stay (green), the others (orange) are merged" in report
    row = result.metrics["comparison"][1]
    # half of 196 tokens, and at most 15 newlines and separators
    assert 98 / 211 <= row["tokens_kept"] <= (98 + 15) / 211
    assert "accuracy_retention" not in row and "nothing right" in result.metrics["warnings"][0]
    assert result.metrics["calibration"] is None and 0 < row["attended"] < 0.5
    assert (result.folder / "kept.png").is_file()
    assert not list((result.folder / "checkpoint").glob("*.safetensors"))
    assert "cannot load it" in (result.folder / "checkpoint" / "README.md").read_text()
    _, processor, applied = load_patched(result.folder / "checkpoint")
    assert [m.name for m in applied.methods] == ["rtprune", "fastocr"]
    assert processor.mode.side == 224


# ---- in memory -----------------------------------------------------------------------------


def test_apply_is_a_context_and_lasts_without_one(deepseek):
    model, processor = load_vlm(deepseek)
    images = [page(0, 0, SQUARE, "test").image]
    dense = read_pages(model, processor, images)
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    applied = compress.apply(model, RTPrune(keep_tokens=0.3))
    pruned = read_pages(model, processor, images)
    assert applied.facts()["rtprune"]["total"]["kept"] == int(196 * 0.3)
    applied.remove()
    applied.remove()
    assert read_pages(model, processor, images) == dense
    with compress.apply(model, [RTPrune(keep_tokens=0.3)]) as again:
        assert read_pages(model, processor, images) == pruned
        assert again.model is model
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
    assert read_pages(model, processor, images) == dense


def test_methods_that_cannot_be_applied_leave_the_model_as_it_was(qwen):
    model, _ = load_vlm(qwen)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    for methods, match in (
        ([FastOCR(), RTPrune()], "RTPrune prunes DeepSeek-OCR"),
        ([FastOCR(), FastOCR(keep_visual=0.5)], "each method can be applied once"),
        ([FastOCR(focal_layers=(99,))], "focal_layers"),
        ([], "at least one method"),
    ):
        with pytest.raises(ValueError, match=match):
            compress.apply(model, methods)
        assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_a_patched_model_is_patched_once_and_not_copied(qwen):
    model, _ = load_vlm(qwen)
    with compress.apply(model, FastOCR()):
        with pytest.raises(ValueError, match="has fastocr on it already"):
            compress.apply(model, FastOCR())
        with pytest.raises(ValueError, match="cannot be copied"):
            copy.deepcopy(model)
    assert type(copy.deepcopy(model)) is type(model)


def test_apply_says_what_a_method_has_no_use_for(qwen):
    model, _ = load_vlm(qwen)
    with pytest.raises(ValueError, match="got data, device; leave them out"):
        compress.apply(model, FastOCR(), data="builtin:digits", device="cpu")
    with pytest.raises(ValueError, match="trains and measures on data"):
        compress.apply(model, compress.GradFlow())
    with pytest.raises(ValueError, match="are applied alone; got gradflow, fastocr"):
        compress.apply(model, [compress.GradFlow(), FastOCR()])


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["qwen", "deepseek"])
def test_saved_and_loaded_a_model_is_patched_again(which, request, tmp_path):
    model, processor = load_vlm(request.getfixturevalue(which))
    methods = [FastOCR(keep_visual=0.3, focal_layers=(1,))]
    if which == "deepseek":
        methods.insert(0, RTPrune(keep_tokens=0.6, select="norm"))
    with compress.apply(model, methods) as applied:
        applied.save(tmp_path / "patched", processor)
        image = page(0, 0, SQUARE if which == "deepseek" else SMALL, "test").image
        expected = read_pages(model, processor, [image])
    loaded = compress.load(tmp_path / "patched")
    gc.collect()  # nobody holds what was applied but the model
    again = compress.load_processor(tmp_path / "patched")
    assert read_pages(loaded, again, [image]) == expected
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    assert type(plain) is type(model)
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_changed_checkpoint_is_refused(qwen, tmp_path):
    model, processor = load_vlm(qwen)
    folder = save_patched(model, processor, [FastOCR()], tmp_path / "patched")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not what was saved"):
        compress.load(folder)


def test_a_reference_to_another_model_is_refused(qwen, tmp_path):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    model, processor = load_vlm(base)
    folder = save_patched(model, processor, [FastOCR()], tmp_path / "p", reference=str(base))
    assert type(compress.load(folder)) is type(model)
    config = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(config | {"max_new_tokens": 5}))
    with pytest.raises(ValueError, match="refers to .* with hash"):
        compress.load(folder)


def test_weights_of_a_patched_checkpoint_are_those_of_the_base(qwen, finished):
    ours = load_file(finished.folder / "checkpoint" / "model.safetensors")
    base = load_file(qwen / "model.safetensors")
    assert ours.keys() == base.keys()
    assert all(torch.equal(ours[name], base[name].float()) for name in base)


# ---- small parts ---------------------------------------------------------------------------


def test_variants_have_names_of_their_own(tmp_path, qwen, pages):
    methods = [FAST, FAST, {"name": "rtprune", "select": "norm", "keep_tokens": 0.5}]
    recipe = load_recipe(recipe_of(tmp_path, qwen, pages, FAST, compare=methods))
    assert [v.name for v in variants(recipe)] == [
        "dense",
        "compressed",
        "fastocr keep_visual=0.2",
        "fastocr keep_visual=0.2 #2",
        "rtprune keep_tokens=0.5 select=norm",
    ]
    assert variant_name(RTPrune()) == "rtprune"


def test_counts_of_batches_are_weighed_by_what_they_saw(finished):
    first = read_predictions(finished.folder / "predictions/compressed.jsonl")
    facts = [p.facts["fastocr"] for p in first if p.facts]
    assert len(facts) == 2  # two batches
    offered = [f["steps"] * f["visual_tokens"] for f in facts]
    expected = sum(f["attended"] * o for f, o in zip(facts, offered, strict=True)) / sum(offered)
    assert counted(first)["attended"] == pytest.approx(expected)
    assert counted([]) == {}


def test_a_dry_run_reads_nothing(qwen, pages, tmp_path):
    recipe = recipe_of(tmp_path, qwen, pages, FAST)
    found = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["pages"] == 3 and facts["readings"] == 6 and facts["family"] == "Qwen2.5-VL"
    assert facts["problems"] == [] and not (tmp_path / "out").exists()
    wrong = recipe_of(tmp_path, qwen, pages, {"name": "rtprune"})
    refused = CliRunner().invoke(app, ["run", str(wrong), "--dry-run", "--json"])
    assert refused.exit_code == 2 and "RTPrune prunes" in json.loads(refused.stdout)["problems"][0]


def test_calibrate_writes_a_checkpoint_that_knows_its_focal_layers(qwen, pages, tmp_path):
    def calibrate(*more):
        arguments = ["calibrate", str(qwen), "--output", str(tmp_path / "c"), "--data", str(pages)]
        return CliRunner().invoke(app, [*arguments, "--pages", "2", "--max-new-tokens", "4", *more])

    found = calibrate("--keep-visual", "0.2", "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert len(facts["curve"]) == 8 and facts["curve"] == sorted(facts["curve"])
    _, _, applied = load_patched(tmp_path / "c")
    assert applied.methods[0] == FastOCR(keep_visual=0.2, focal_layers=tuple(facts["focal_layers"]))
    stored = json.loads((tmp_path / "c" / "compress.json").read_text())
    assert stored["calibration"] == facts
    again = calibrate()
    assert again.exit_code == 2 and "holds files" in again.stderr

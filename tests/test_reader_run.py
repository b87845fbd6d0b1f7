"""Runs on a reader, from the recipe to the checkpoint, and methods applied in memory."""

import copy
import gc
import importlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import compress
from builders.tiers import few
from compress import FastOCR, RTPrune
from compress.checkpoints.applied import HOLDER
from compress.checkpoints.facts import _own_hash, plain
from compress.checkpoints.load import load_reader
from compress.checkpoints.runtime import save_runtime
from compress.cli import app
from compress.common.events import drain
from compress.common.output_folder import not_ours
from compress.data.page_files import find_pages
from compress.data.page_folders import write_pages_as_olmocr_bench, write_pages_as_omnidocbench
from compress.data.pages import PAGE, page
from compress.eval.ocr import read_predictions
from compress.eval.settings import OcrEvaluation, ReadSettings
from compress.eval.text_metrics import edit_distance, normalise
from compress.methods.base import Calibrated
from compress.models.builtin import train_reader_deepseek, train_reader_qwen
from compress.models.builtin.reader_training import LEVELS
from compress.models.locate import locate
from compress.models.reading import Reading, read_pages
from compress.models.vlm import load_vlm
from compress.runs.counting import counted
from compress.runs.evaluation import evaluate_events
from compress.runs.reader import ReaderRun, calibrated_checkpoint, variant_name, variants
from compress.runs.reading import read_files
from compress.runs.recipe import load_recipe
from compress.runs.run import run_events

pytestmark = pytest.mark.usefixtures("quick_runs")

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
        "evaluate": {"batch": 2},
        "output": str(tmp_path / "out"),
        **extra,
    }
    path.write_text(json.dumps(content))
    return path


FAST = {"name": "fastocr", "keep_visual": 0.2, "min_fixation": 0, "dense_layers": "none"}
CALIBRATED = [f"fastocr keep_visual={keep} min_fixation=0 dense_layers=none" for keep in (0.2, 1.0)]


@pytest.fixture(scope="module")
def finished(qwen, pages, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("run")
    compare = [FAST | {"fixation": "random"}, FAST | {"keep_visual": 1.0}]
    recipe = recipe_of(tmp_path, qwen, pages, FAST, compare=compare)
    return drain(run_events(recipe, device="cpu"))


def test_a_run_leaves_what_a_run_leaves(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert {"recipe.yaml", "metrics.json", "report.html", "checkpoint", "predictions"} <= names
    assert not_ours(finished.folder) == []
    figures = {path.name for path in (finished.folder / "figures").iterdir()}
    assert {"comparison.png", "recall.png", "recall1.png", "strip.png"} <= figures
    report = (finished.folder / "report.html").read_text()
    assert "data:image/gif;base64" in report and report.count("data:image/png") >= 6
    stored = json.loads((finished.folder / "metrics.json").read_text())
    # the random fixation shares what the method found
    assert list(stored["calibration"]) == CALIBRATED
    assert [facts["keep_visual"] for facts in stored["calibration"].values()] == [0.2, 1.0]
    calibration = stored["calibration"][CALIBRATED[0]]
    assert calibration["focal_layers"] and len(calibration["recall"]) == 8
    assert (
        compress.runs.recipe.load_recipe(finished.folder / "recipe.yaml").method[0].name
        == "fastocr"
    )
    shown = CliRunner().invoke(app, ["show", str(finished.folder)])
    assert shown.exit_code == 0 and "accuracy_retention" in shown.stdout


def test_the_terminal_shows_every_variant_and_what_it_used(finished):
    shown = CliRunner().invoke(app, ["show", str(finished.folder)], terminal_width=200).stdout
    rows = finished.metrics["comparison"]
    [line] = [line for line in shown.splitlines() if line.startswith("compressed")]
    assert line.split()[:3] == ["compressed", "fastocr", "20%"]
    kept = rows[1]["accuracy_retention"]
    share = f"{rows[1]['attended']:.2%}"
    assert f"{share} (attended {share}, refreshes {rows[1]['refreshes']:.2%})" in line
    assert f"{kept['value']:.4g} [{kept['ci95'][0]:.4g}, {kept['ci95'][1]:.4g}]" in line
    assert f"{rows[1]['metrics']['cer_corpus']['value']:.4g}" in line
    assert "retention (1 - CER)" in shown and "random" in shown
    # of the page before any method, so of both the same: no metric that tells the two apart
    assert "visual_tokens " not in shown
    assert finished.metrics["metrics"]["pages_per_second"]["ratio"] > 0
    assert finished.metrics["metrics"]["attended"]["dense"]["value"] == 1
    assert finished.metrics["metrics"]["attended"]["compressed"]["value"] == rows[1]["attended"]


def test_the_report_shows_what_each_layer_attended_to(finished):
    report = (finished.folder / "report.html").read_text()
    row = finished.metrics["comparison"][2]
    layers = ", ".join(f"{share:.0%}" for share in row["attended_by_layer"])
    assert layers.count("%") == 8 and f"<td>{layers}</td>" in report
    assert "Refreshed steps" in report and f"<td>{row['refreshes']:.2%}</td>" in report


def test_the_worst_page_against_the_dense_model_is_named(finished):
    [dense, pruned] = (
        {p.page: p.text for p in read_predictions(finished.folder / f"predictions/{name}.jsonl")}
        for name in ("dense", "compressed")
    )
    texts = {f"{i}.png": page(0, i, SMALL, "test").text for i in range(3)}
    rise = {
        name: edit_distance(normalise(pruned[name]), normalise(text)).rate
        - edit_distance(normalise(dense[name]), normalise(text)).rate
        for name, text in texts.items()
    }
    found = finished.metrics["metrics"]["worst_page_delta"]
    assert found["compressed"]["value"] == max(rise.values()) and found["dense"]["value"] == 0
    assert f"page {max(rise, key=rise.get)}," in found["how"]


@pytest.fixture(scope="module")
def read_for_real(tmp_path_factory):
    """A run with the built-in reader, whose texts the method changes; its pages and its folder."""
    tmp_path = tmp_path_factory.mktemp("real")
    (tmp_path / "pages").mkdir()
    for index in range(2):
        made = page(0, index, PAGE, "test")
        made.image.save(tmp_path / "pages" / f"{index}.png")
        (tmp_path / "pages" / f"{index}.txt").write_text(made.text[:24])
    method = FAST | {"keep_visual": 0.03, "focal_layers": [1]}
    asked = {"batch": 2, "max_new_tokens": 24}
    recipe = recipe_of(tmp_path, "builtin:reader-qwen", tmp_path / "pages", method, evaluate=asked)
    return tmp_path / "pages", drain(run_events(recipe, device="cpu"))


@pytest.mark.slow  # beside test_the_checkpoint_gives_the_run_s_own_predictions
@pytest.mark.parametrize("weights", ["copy", "reference"])
def test_eval_and_read_apply_the_methods_of_a_checkpoint(
    weights, read_for_real, tmp_path, monkeypatch
):
    pages, run = read_for_real
    folder = run.folder / "checkpoint"
    if weights == "reference":
        model, processor, applied = load_reader(folder)
        applied.remove()
        folder = tmp_path / "reference"
        base = locate("builtin:reader-qwen")
        save_runtime(model, processor, applied.methods, folder, base=base, reference=True)

    def evaluated(output):
        settings = OcrEvaluation(batch=2, max_new_tokens=24)
        return drain(evaluate_events(folder, output, settings, data=str(pages), device="cpu"))

    found = evaluated(tmp_path / "out")
    dense, row = run.metrics["comparison"]
    for name in ("cer_corpus", "ned", "new_tokens"):
        assert found["metrics"][name]["value"] == row["metrics"][name]["value"]
    # where the method does something
    assert row["metrics"]["cer_corpus"]["value"] > dense["metrics"]["cer_corpus"]["value"] + 0.1
    assert found["metrics"]["attended"]["value"] == row["attended"]
    assert found["counted"]["attended_by_layer"] == row["attended_by_layer"]
    assert found["methods"][0]["name"] == "fastocr"
    assert "2 pages" in (tmp_path / "out" / "report.html").read_text()
    stored = [p.text for p in read_predictions(tmp_path / "out" / "predictions.jsonl")]
    image = find_pages([pages / "1.png"])
    ((_, reading),) = read_files(folder, image, ReadSettings(max_new_tokens=24), device="cpu")
    assert [reading.text] == stored[1:]
    if weights == "reference":
        monkeypatch.setattr("compress.models.locate.folder_hash", lambda folder: "0" * 64)
        with pytest.raises(ValueError, match="refers to .* what is there now has 000000"):
            evaluated(tmp_path / "again")


def test_methods_are_not_put_on_a_checkpoint_that_has_some(finished, qwen, pages, tmp_path):
    checkpoint = finished.folder / "checkpoint"
    recipe = recipe_of(tmp_path, checkpoint, pages, FAST)
    with pytest.raises(ValueError, match="is a runtime checkpoint with methods of its own") as said:
        drain(run_events(recipe, device="cpu"))
    assert str(qwen) in str(said.value) and '"keep_visual": 0.2' in str(said.value)
    dry = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--json"])
    assert dry.exit_code == 2 and "runtime checkpoint" in json.loads(dry.stdout)["problems"][0]
    with pytest.raises(ValueError, match="is a runtime checkpoint"):
        calibrated_checkpoint(
            str(checkpoint), tmp_path / "c", FastOCR(), data=str(pages), device="cpu"
        )


def test_pages_that_say_nothing_are_refused_before_any_is_read(qwen, pages, tmp_path):
    empty = tmp_path / "empty"
    shutil.copytree(pages, empty)
    for path in empty.glob("*.txt"):
        path.write_text(" \n")
    recipe = recipe_of(tmp_path, qwen, empty, FAST)
    with pytest.raises(ValueError, match="of all 3 pages of .* are empty"):
        drain(run_events(recipe, device="cpu"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", few(["omnidocbench", "olmocr"], "omnidocbench"))
def test_a_benchmark_folder_gives_retention_of_its_own_score(layout, qwen, tmp_path, monkeypatch):
    made = [page(0, index, SMALL, "test") for index in range(2)]
    write = write_pages_as_olmocr_bench if layout == "olmocr" else write_pages_as_omnidocbench
    write(tmp_path / "bench", made)
    # a reader that was never trained scores nothing: dense, the lines are read right
    texts = {made.image.convert("RGB").tobytes(): made.text for made in made}

    def read(model, processor, pages, **generation):
        share = 4 if hasattr(model, HOLDER) else 1
        found = [texts[page.open().convert("RGB").tobytes()] for page in pages]
        return [Reading(text[: len(text) // share], 3, 312, True) for text in found]

    monkeypatch.setattr("compress.runs.evaluation.try_pages", read)
    compare = [FAST | {"focal_layers": [1], "fixation": "static"}]
    method = FAST | {"focal_layers": [1]}
    recipe = recipe_of(tmp_path, qwen, tmp_path / "bench", method, compare=compare)
    result = drain(run_events(recipe, device="cpu"))
    name = "score" if layout == "olmocr" else "overall_proxy"
    assert result.metrics["accuracy"] == name and result.metrics["warnings"] == []
    for row in result.metrics["comparison"]:
        kept, whole = row["accuracy_retention"], row["metrics"][name]["value"]
        dense = result.metrics["comparison"][0]["metrics"][name]["value"]
        assert kept["value"] == pytest.approx(whole / dense)
        assert (kept["value"] < 1) == (row["variant"] != "dense")
    assert result.metrics["metrics"]["accuracy_retention"]["compressed"]["value"] == kept["value"]
    assert ("worst_page_delta" in result.metrics["metrics"]) == (layout == "omnidocbench")
    report = (result.folder / "report.html").read_text()
    assert f"Accuracy retention ({name})" in report and f"{name} over that of the dense" in report
    shown = CliRunner().invoke(app, ["show", str(result.folder)]).stdout
    assert f"retention ({name})" in shown


def test_every_variant_read_the_same_pages_and_was_counted(finished):
    rows = finished.metrics["comparison"]
    names = [row["variant"] for row in rows]
    assert names[:2] == ["dense", "compressed"] and len(set(names)) == 4
    for row in rows:
        read = read_predictions(finished.folder / f"predictions/{row['variant']}.jsonl")
        assert [p.page for p in read] == ["0.png", "1.png", "2.png"]
        assert ("attended" in row) == (row["variant"] != "dense")
    by_name = dict(zip(names, rows, strict=True))
    name = "fastocr keep_visual=1.0 min_fixation=0 dense_layers=none"
    everything = by_name[name]
    assert everything["attended"] == 1
    # one focal layer of eight, the others at a fifth, the first step dense
    assert 0.3 < by_name["compressed"]["attended"] < 0.6
    dense = read_predictions(finished.folder / "predictions/dense.jsonl")
    all_kept = read_predictions(finished.folder / f"predictions/{name}.jsonl")
    assert [p.text for p in dense] == [p.text for p in all_kept]
    assert everything["accuracy_retention"]["value"] == 1


def test_the_checkpoint_gives_the_run_s_own_predictions(finished, pages, qwen):
    from PIL import Image

    folder = finished.folder / "checkpoint"
    images = [Image.open(pages / f"{k}.png") for k in range(3)]
    model, processor, applied = load_reader(folder)
    [method] = applied.methods
    found = finished.metrics["calibration"][CALIBRATED[0]]
    assert method.focal_layers == tuple(found["focal_layers"])
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
        drain(run_events(recipe, device="cpu"))
    with pytest.raises(ValueError, match="method changed"):
        drain(run_events(recipe, overrides=["method.keep_visual=0.5"], resume=True, device="cpu"))
    # what was read does not depend on what is measured of it
    asked, names = "evaluate.metrics=[cer_corpus, new_tokens]", ["cer_corpus", "new_tokens"]
    result = drain(run_events(recipe, overrides=[asked], resume=True, device="cpu"))
    expected = [
        row | {"metrics": {name: row["metrics"][name] for name in names}}
        for row in finished.metrics["comparison"]
    ]
    assert result.metrics["comparison"] == expected
    assert [*result.metrics["metrics"]] == ["attended", *names]
    assert (result.folder / "report.html").is_file()


def test_rtprune_runs_on_reader_deepseek(deepseek, tmp_path, monkeypatch):
    folder = tmp_path / "squares"
    folder.mkdir()
    for index in range(2):
        made = page(0, index, SQUARE, "test")
        made.image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(made.text)
    pruning = {"name": "rtprune", "keep_tokens": 0.5}
    both = [pruning, FAST | {"focal_layers": [2]}]
    evaluate = {"batch": 2, "prompt": "all of it"}
    recipe = recipe_of(
        tmp_path, deepseek, folder, both, compare=[pruning], weights="reference", evaluate=evaluate
    )
    asked = []
    for method, name in (("rtprune", "read_pages"), ("fastocr", "build_prompt")):
        module = importlib.import_module(f"compress.methods.{method}.figures")
        original = getattr(module, name)

        def spy(*args, original=original, **kwargs):
            asked.append(args[3])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    result = drain(run_events(recipe, device="cpu"))
    assert asked == ["all of it", ["all of it"]]  # of the two pictures
    report = (result.folder / "report.html").read_text()
    assert "on the tokens that rtprune left of it; on the first page" in report
    assert "98 of 196 visual tokens stay (green), the others (orange) are merged" in report
    row = result.metrics["comparison"][1]
    # half of 196 tokens, and at most 15 newlines and separators
    assert 98 / 211 <= row["tokens_kept"] <= (98 + 15) / 211
    assert "accuracy_retention" not in row and "nothing right" in result.metrics["warnings"][0]
    assert result.metrics["calibration"] is None and 0 < row["attended"] < 0.5
    assert (result.folder / "figures" / "kept.png").is_file()
    assert not list((result.folder / "checkpoint").glob("*.safetensors"))
    assert "cannot load it" in (result.folder / "checkpoint" / "README.md").read_text()
    _, processor, applied = load_reader(result.folder / "checkpoint")
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
    with pytest.raises(ValueError, match="no use for data, device; leave them out"):
        compress.apply(model, FastOCR(), data="builtin:digits", device="cpu")
    with pytest.raises(ValueError, match="gradflow compresses a diffusers pipeline; got Qwen"):
        compress.apply(model, compress.GradFlow())
    with pytest.raises(ValueError, match="are applied alone; got gradflow, fastocr"):
        compress.apply(model, [compress.GradFlow(), FastOCR()])


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.mark.slow  # as test_method_contract.py does with each method
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
    loaded, again, _ = compress.load(tmp_path / "patched")
    gc.collect()  # the model alone holds what was applied
    assert read_pages(loaded, again, [image]) == expected
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "patched", dtype=torch.float32)
    assert type(plain) is type(model)
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_card_has_the_licence_of_the_base_and_what_was_measured(finished, qwen, tmp_path):
    card = (finished.folder / "checkpoint" / "README.md").read_text()
    metrics = finished.metrics["metrics"]
    assert f"| cer_corpus | {metrics['cer_corpus']['dense']['value']:.5g} [" in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    assert "accuracy_retention" in card
    where = plain(f"look where {qwen} came from")
    assert f"stated neither in its README.md nor in a LICENSE; {where}" in card

    def card_of(model, **options):
        network, processor = load_vlm(model)
        folder = save_runtime(
            network, processor, [FastOCR()], tmp_path / "p", overwrite=True, **options
        )
        return folder, (folder / "README.md").read_text()

    _, built_in = card_of("builtin:reader-qwen")
    assert "`builtin:reader-qwen`" in built_in
    assert "Licence of the base model: Apache-2.0, that of compress" in built_in
    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine-1.0\n---\n# A reader\n"
    )
    (base / "LICENSE.txt").write_text("Do as you like.")
    folder, named = card_of(base)
    assert "Licence of the base model: other; mine-1.0; see LICENSE.txt" in named
    assert (folder / "LICENSE.txt").read_text() == "Do as you like."
    # made from what was made from it, it is the same licence
    model, processor, applied = load_reader(folder)
    again = applied.save(tmp_path / "again", processor)
    assert "other; mine-1.0" in (again / "README.md").read_text()
    folder, refers = card_of(base, reference=True)
    assert "other; mine-1.0" in refers and not (folder / "LICENSE.txt").exists()


def test_a_run_is_not_resumed_with_other_weights(qwen, pages, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    recipe = recipe_of(tmp_path, base, pages, FAST | {"focal_layers": [1]})
    events = run_events(recipe, device="cpu")
    for event in events:
        if event.stage == "dense" and event.step == 2:
            break
    events.close()
    tensors = load_file(base / "model.safetensors")
    first = min(tensors)
    save_file(tensors | {first: tensors[first] + 1}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="read with .* of hash .*--overwrite"):
        drain(run_events(recipe, resume=True, device="cpu"))


def test_a_changed_checkpoint_is_refused(qwen, tmp_path):
    model, processor = load_vlm(qwen)
    folder = save_runtime(model, processor, [FastOCR()], tmp_path / "patched")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not what was saved"):
        compress.load(folder)


def test_a_reference_to_another_model_is_refused(qwen, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    model, processor = load_vlm(base)
    folder = save_runtime(model, processor, [FastOCR()], tmp_path / "p", reference=True)
    assert type(compress.load(folder).model) is type(model)
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
        "fastocr keep_visual=0.2 min_fixation=0 dense_layers=none",
        "fastocr keep_visual=0.2 min_fixation=0 dense_layers=none #2",
        "rtprune keep_tokens=0.5 select=norm",
    ]
    assert variant_name(RTPrune()) == "rtprune"


def test_counts_of_batches_are_weighed_by_what_they_saw(finished):
    first = read_predictions(finished.folder / "predictions/compressed.jsonl")
    facts = [p.facts["fastocr"] for p in first if p.facts]
    assert len(facts) == 2  # two batches
    offered = [f["steps"] * f["visual_tokens"] for f in facts]
    expected = sum(f["attended"] * o for f, o in zip(facts, offered, strict=True)) / sum(offered)
    assert counted([FastOCR()], first)["attended"] == pytest.approx(expected)
    assert counted([FastOCR(), RTPrune()], []) == {}


def test_every_variant_gets_what_was_found_under_its_own_settings(
    qwen, pages, tmp_path, monkeypatch
):
    tried = []

    def calibrate(method, *_):
        tried.append(method)
        open_layers = {"focal_layers": (len(tried),), "dense_layers": (0,)}
        return Calibrated(
            {k: v for k, v in open_layers.items() if getattr(method, k) == "auto"}, {}
        )

    monkeypatch.setattr("compress.runs.reader.calibrate_on_pages", calibrate)
    fast = {"name": "fastocr"}
    compare = [fast, FAST | {"fixation": "static", "min_visual": 0}, fast | {"focal_by": "recall"}]
    recipe = recipe_of(tmp_path, qwen, pages, FAST, compare=compare)
    for _ in range(2):  # the second time from the file
        run = ReaderRun(compress.runs.recipe.load_recipe(recipe), tmp_path, "cpu")
        list(run.compress())
        layers = [(v.methods[0].focal_layers, v.methods[0].dense_layers) for v in run.variants[1:]]
        assert layers == [((1,), "none"), ((2,), (0,)), ((1,), "none"), ((3,), (0,))]
        assert len(tried) == 3


def test_a_dry_run_reads_nothing(qwen, pages, tmp_path):
    recipe = recipe_of(tmp_path, qwen, pages, FAST)
    found = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["parameters"] == facts["stored_values"] > 10**6
    assert facts["pages"] == 3 and facts["readings"] == 6 and facts["family"] == "Qwen2.5-VL"
    assert facts["problems"] == [] and not (tmp_path / "out").exists()
    wrong = recipe_of(tmp_path, qwen, pages, {"name": "rtprune"})
    refused = CliRunner().invoke(app, ["run", str(wrong), "--dry-run", "--json"])
    assert refused.exit_code == 2 and "RTPrune prunes" in json.loads(refused.stdout)["problems"][0]


def test_calibrate_writes_a_checkpoint_that_knows_its_focal_layers(qwen, pages, tmp_path):
    def calibrate(*more):
        arguments = ["calibrate", str(qwen), "--output", str(tmp_path / "c"), "--data", str(pages)]
        return CliRunner().invoke(app, [*arguments, "--pages", "2", "--max-new-tokens", "4", *more])

    knobs = ["--keep-visual", "0.2", "--min-fixation", "0", "--dense-layers", "[0]"]
    found = calibrate(*knobs, "--json")
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert len(facts["curve"]) == 7 and facts["curve"] == sorted(facts["curve"])
    assert facts["dense_layers"] == [0] and facts["attended_by_layer"][0] == 1
    _, _, applied = load_reader(tmp_path / "c")
    focal = tuple(facts["focal_layers"])
    expected = FastOCR(keep_visual=0.2, min_fixation=0, dense_layers=(0,), focal_layers=focal)
    assert applied.methods[0] == expected
    stored = json.loads((tmp_path / "c" / "compress.json").read_text())
    name = "fastocr keep_visual=0.2 min_fixation=0 dense_layers=(0,)"
    assert stored["calibration"] == {name: facts}
    # a checkpoint that was written before a setting existed is not read with today's default
    stored["methods"][0].pop("min_focus")
    stored["hash"] = _own_hash(stored)
    (tmp_path / "c" / "compress.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="all settings of fastocr, .* lacks min_focus; make"):
        load_reader(tmp_path / "c")
    again = calibrate()
    assert again.exit_code == 2 and "holds a checkpoint" in again.stderr
    nothing = calibrate("--choose", "summaries", "--overwrite")
    assert nothing.exit_code == 2 and "leaves none open; apply it as it is" in nothing.stderr

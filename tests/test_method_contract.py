"""What every method of the registry does, and that a new one is five files."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from typer.testing import CliRunner

import compress
from builders import programs
from builders.tiers import few
from compress.bench.suite import bench
from compress.checkpoints.load import load, load_reader
from compress.cli import app
from compress.common.events import drain
from compress.data.pages import PAGE, SQUARE_PAGE, page
from compress.data.sources import ImageData
from compress.methods.registry import METHODS, RUNTIME_METHODS, WEIGHT_METHODS, runtime_method
from compress.methods.training import Training
from compress.models.locate import builtin_models
from compress.reports.comparison import compare
from compress.runs.recipe import Recipe, dump, load_recipe
from compress.runs.run import run_events

pytestmark = pytest.mark.usefixtures("quick_runs")

ROOT = Path(__file__).parents[1]
TOY = Path(__file__).parent / "toy"
DIGITS = "builtin:digits"
PAGES = {
    "reader-qwen": ("builtin:pages", PAGE),
    "reader-deepseek": ("builtin:square-pages", SQUARE_PAGE),
}
SHORT = {"samples": 4, "steps": 2, "sampling_seeds": 1, "batch": 4}
# whose whole runs are those of test_pipeline.py, test_bad_input.py and test_reader_run.py
RUN_ELSEWHERE = {"gradflow", "oneshot", "fastocr", "rtprune"}
runtime_methods = pytest.mark.parametrize("name", RUNTIME_METHODS)


def weight_method(name):
    kind = WEIGHT_METHODS[name]
    return kind(keep_macs=0.73, steps=min(3, kind.model_fields["steps"].default))


@pytest.fixture(scope="module")
def pipeline(family):
    """Tiny, with few timesteps: Diff-Pruning takes a gradient at each."""
    return DDPMPipeline(family("ddpm").unet, DDPMScheduler(num_train_timesteps=10))


@pytest.fixture(scope="module")
def reader_of():
    """The first built-in reader that a method serves, with methods off."""
    readers = {}

    def get(name):
        for builtin in reversed(builtin_models("reader")):
            if builtin not in readers:
                readers[builtin] = load_reader(f"builtin:{builtin}")
            try:
                compress.apply(readers[builtin].model, name).remove()
            except ValueError:
                continue
            return builtin, readers[builtin]
        raise AssertionError(f"no built-in reader serves {name}")

    return get


def test_each_class_says_what_it_is():
    for name, kind in METHODS.items():
        assert kind.model_fields["name"].default == name
        assert kind.paper and kind.serves and kind.keeps and kind.__doc__
        assert getattr(compress, kind.__name__) is kind and kind.__name__ in dir(compress)
        assert all(field.description for key, field in kind.model_fields.items() if key != "name")
        readme = ROOT / "compress" / "methods" / kind.__module__.split(".")[2] / "README.md"
        assert readme.is_file()


def test_the_defaults_in_a_methods_readme_are_its_own():
    for name, kind in METHODS.items():
        readme = ROOT / "compress" / "methods" / name / "README.md"
        if not readme.is_file():  # it shares that of another method
            continue
        rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", readme.read_text(encoding="utf8"), re.M)
        shown = {knob: cell.strip("`") for knob, cell in rows if knob in kind.model_fields}
        assert set(shown) == set(kind.model_fields) - {"name"}
        for knob, cell in shown.items():
            assert yaml.safe_load(cell) == kind.model_fields[knob].default, (name, knob)


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_setting_is_one_line_that_names_those_that_there_are(name):
    kind = METHODS[name]
    settings = [field for field in kind.model_fields if field != "name"]
    for wrong in ({"nonsense": 1}, {settings[0] + "s": 0.5}, {settings[0]: "x"}):
        with pytest.raises(ValueError) as refused:
            kind(**wrong)
        told = str(refused.value)
        assert told.startswith(f"{kind.__name__}: ") and "\n" not in told and "http" not in told
        assert ("got 'x'" if settings[0] in wrong else ", ".join(settings)) in told
        for method in (name, kind()):
            with pytest.raises(ValueError) as refused:
                compress.apply(None, method, **wrong)
            assert f"; give settings as in apply(model, {kind.__name__}(...))" in str(refused.value)
            assert ", ".join(settings) in str(refused.value)
    assert told.endswith("correct it") and f"did you mean {settings[0]}?" not in told
    with pytest.raises(ValueError, match=f"did you mean {settings[0]}\\?"):
        kind(**{settings[0] + "s": 0.5})
    with pytest.raises(ValueError, match=r"got procesor; did you mean processor\?"):
        compress.apply(None, name, procesor=1)


# gradflow's is applied in test_pipeline.py, too
@pytest.mark.parametrize("name", few(WEIGHT_METHODS, *WEIGHT_METHODS.keys() - {"gradflow"}))
def test_applied_to_a_pipeline_it_leaves_the_given_one_alone_and_facts_are_json(
    name, pipeline, tmp_path
):
    before = {key: tensor.clone() for key, tensor in pipeline.unet.state_dict().items()}
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compressed = compress.apply(
        pipeline,
        weight_method(name),
        data=ImageData.split("noise", images),
        training=compress.Training(steps=1, batch=4),
        device="cpu",
    )
    for key, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    json.dumps(compressed.report)
    assert all({"level", "dense", "compressed"} <= set(row) for row in compressed.report["widths"])
    folder = compressed.save_pretrained(tmp_path / "checkpoint")
    again = load(folder)
    sample, time = torch.randn(2, 1, 16, 16), torch.tensor([3, 8])
    with torch.no_grad():
        outputs = [p.unet(sample, time).sample for p in (compressed.model, again)]
    assert torch.equal(*outputs)


@runtime_methods
def test_applied_to_a_reader_it_restores_it_and_facts_are_json(name, reader_of, tmp_path):
    builtin, reader = reader_of(name)
    image = page(0, 0, PAGES[builtin][1], "test").image
    hooks = [len(module._forward_pre_hooks) for module in reader.model.modules()]
    dense = reader.read([image], max_new_tokens=6)
    with compress.apply(reader.model, name, processor=reader.processor) as applied:
        read = reader.read([image], max_new_tokens=6)
        facts = applied.facts()[name]
        assert json.loads(json.dumps(facts)) == facts
        method = applied.methods[0]
        counts = method.count([facts])
        assert 0 < counts[method.used] <= 1 and set(counts) >= set(method.metrics)
        assert method.label() and method.kept() and name in repr(applied).lower()
        folder = applied.save_pretrained(tmp_path / "checkpoint")
    assert reader.read([image], max_new_tokens=6) == dense
    assert [len(module._forward_pre_hooks) for module in reader.model.modules()] == hooks
    again = load(folder)
    assert again.applied.methods == (method,) and again.read([image], max_new_tokens=6) == read
    assert runtime_method(method.model_dump(mode="json")) == method


@pytest.mark.parametrize("name", few(METHODS, *METHODS.keys() - RUN_ELSEWHERE))
def test_from_a_recipe_to_show_compare_and_report(name, pipeline, reader_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in WEIGHT_METHODS:
        pipeline.save_pretrained("model")
        settings = weight_method(name).model_dump(mode="json")
        content = {
            "model": str(tmp_path / "model"),
            "data": DIGITS,
            "method": settings,
            "recover": {"steps": 1, "batch": 4},
            "evaluate": SHORT,
        }
    else:
        builtin, _ = reader_of(name)
        content = {
            "model": f"builtin:{builtin}",
            "data": PAGES[builtin][0],
            "method": {"name": name},
            "calibrate": {"pages": 1, "max_new_tokens": 6},
            "evaluate": {"samples": 1, "max_new_tokens": 6},
            "weights": "reference",
        }
    Path("recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    recipe = load_recipe("recipe.yaml")
    Path("again.yaml").write_text(dump(recipe))
    assert load_recipe("again.yaml", [f"output={recipe.output}"]) == recipe
    assert isinstance(recipe, Recipe) == (name in WEIGHT_METHODS)
    result = drain(run_events(recipe, output=tmp_path / "run", device="cpu"))
    shown = CliRunner().invoke(app, ["show", str(result.folder)])
    assert shown.exit_code == 0, shown.output
    metrics = (result.folder / "metrics.json").read_text()
    assert json.loads(metrics) == json.loads(json.dumps(result.metrics))
    assert compare([result.folder]).to_text()
    report = (result.folder / "report.html").read_text()
    assert name in report and "</html>" in report
    assert json.loads((result.checkpoint / "compress.json").read_text())["metrics"]
    assert load(result.checkpoint) is not None
    forecast = CliRunner().invoke(app, ["run", "recipe.yaml", "--dry-run", "--json"])
    assert forecast.exit_code == 0, forecast.output


# of test_bench.py, too
@pytest.mark.parametrize("name", few(METHODS, *METHODS.keys() - {"rtprune"}))
def test_a_benchmark_row_has_what_its_table_shows(name):
    benchmark = METHODS[name].benchmark()
    if benchmark is None:
        pytest.skip("the method has no benchmark")
    rows = list(bench(benchmark, shapes=[benchmark.smallest], repeats=1, device="cpu"))
    parts = [row for row in rows if row["part"] not in ("copy", "matrix")]
    assert parts and json.dumps(rows) and all(row["bench"] == name for row in rows)
    assert benchmark.table(parts).startswith("| ")


def test_wrong_combinations_are_refused_in_three_parts(pipeline, reader_of):
    weight, runtime = (next(iter(kinds)) for kinds in (WEIGHT_METHODS, RUNTIME_METHODS))
    _, reader = reader_of(runtime)
    for model, method, options in (
        (reader.model, WEIGHT_METHODS[weight](), {"data": DIGITS}),
        (pipeline, RUNTIME_METHODS[runtime](), {}),
        (pipeline.unet, weight, {"data": DIGITS}),
        ("builtin:ddpm-digits", weight, {"data": DIGITS}),
        (pipeline, WEIGHT_METHODS[weight], {"data": DIGITS}),
        (reader.model, RUNTIME_METHODS[runtime], {}),
        (pipeline, "nonsense", {"data": DIGITS}),
        (pipeline, weight, {}),
        (pipeline, weight, {"data": DIGITS, "processor": reader.processor}),
        (reader.model, runtime, {"device": "cpu"}),
        (pipeline, [weight, weight], {"data": DIGITS}),
        (reader.model, [], {}),
        (pipeline, [], {"data": DIGITS}),
        (pipeline, None, {"data": DIGITS}),
        (pipeline, {"name": weight}, {"data": DIGITS}),
        (pipeline, [weight, runtime], {"data": DIGITS}),
        (None, weight, {"data": DIGITS}),
        (type(pipeline), weight, {"data": DIGITS}),
        (type(reader.model), runtime, {}),
        (reader.model, runtime, {"data": DIGITS}),
        (reader.model, runtime, {"processor": 5}),
        (pipeline, weight, {"data": DIGITS, "training": {}}),
        (pipeline, weight, {"data": DIGITS, "training": "x"}),
        (pipeline, weight, {"data": DIGITS, "training": Training}),
        (pipeline, weight, {"data": DIGITS, "device": "nowhere"}),
        (pipeline, weight, {"data": DIGITS, "device": "meta"}),
        (pipeline, weight, {"data": DIGITS, "device": "cuda:99"}),
        (pipeline, weight, {"data": DIGITS, "device": []}),
        (pipeline, weight, {"data": 5}),
        (pipeline, weight, {"data": ""}),
        (pipeline, weight, {"data": []}),
        (pipeline, weight, {"data": Path("digits")}),
        (pipeline, weight, {"data": [1, 2, 3]}),
        (pipeline, weight, {"data": {"a": 1, "b": 2}}),
        (pipeline, weight, {"data": [torch.zeros(1, 16, 16), 1] * 20}),
        (pipeline, weight, {"data": torch.zeros(20, 16, 16)}),
    ):
        with pytest.raises(ValueError) as refused:
            compress.apply(model, method, **options)
        assert len(re.split("; ", str(refused.value))) >= 2, refused.value
        assert not hasattr(reader.model, "_compress_applied")


def test_no_module_outside_the_methods_names_a_method():
    """But the registry, through which all others reach them."""
    names = re.compile(
        r"\b(" + "|".join(METHODS) + "|" + "|".join(k.__name__ for k in METHODS.values()) + r")\b"
    )
    shipped = [p for folder in ("compress", "eval") for p in (ROOT / folder).rglob("*.py")]
    outside = [p for p in shipped if not p.is_relative_to(ROOT / "compress" / "methods")]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in outside
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if names.search(line)
    ]
    assert found == []


# ---- a new method is five files ------------------------------------------------------------------


def test_a_new_method_is_five_files(tmp_path):
    """The steps of CONTRIBUTING.md, followed for the toy method in a copy of the checkout."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "builtin", "toy", "results")
    for folder in ("compress", "eval", "kernels", "recipes", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    os.symlink(ROOT / "compress" / "models" / "builtin", copy / "compress" / "models" / "builtin")
    for name in ("CHANGELOG.md", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    before = _contents(copy)

    shutil.copytree(TOY / "taildrop", copy / "compress" / "methods" / "taildrop")
    shutil.copy(TOY / "reader_taildrop.yaml", copy / "recipes")
    shutil.copy(TOY / "test_taildrop.py", copy / "tests")
    registry = copy / "compress" / "methods" / "registry.py"
    text = registry.read_text()
    text = re.sub(
        r"(from compress\.methods\.rtprune import RTPrune\n)",
        r"\1from compress.methods.taildrop import TailDrop\n",
        text,
    )
    text = re.sub(r"(_KINDS: .*)\)\n", r"\1, TailDrop)\n", text)
    registry.write_text(text)
    changelog = copy / "CHANGELOG.md"
    changelog.write_text(
        changelog.read_text().replace("### Added\n", "### Added\n\n- `taildrop`.\n", 1)
    )

    changed = (path for path, content in _contents(copy).items() if before.get(path) != content)
    touched = {re.sub(r"(methods/taildrop)/.*", r"\1", path) for path in changed}
    assert touched == {
        "compress/methods/taildrop",
        "compress/methods/registry.py",
        "recipes/reader_taildrop.yaml",
        "tests/test_taildrop.py",
        "CHANGELOG.md",
    }

    # where the installed package lies beside its parts
    site = tmp_path / "site" / "compress"
    site.mkdir(parents=True)
    for path in (
        *(copy / "compress").iterdir(),
        *(copy / name for name in ("eval", "kernels", "recipes")),
    ):
        os.symlink(path, site / path.name)
    programs.run(
        "run_tests",
        *("-o", f"pythonpath={site.parent} tests"),
        *("-k", "taildrop or says_what_it_is or outside_the_methods"),
        *("tests/test_method_contract.py", "tests/test_taildrop.py"),
        cwd=copy,
    )
    assert "TailDrop" not in (ROOT / "compress" / "methods" / "registry.py").read_text()


def _contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

"""The report and the comparison, on a synthetic run folder: its numbers are made up."""

import base64
import html.parser
import io
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from compress.common import plots
from compress.data.ocr_pages import OcrData, OcrPage
from compress.eval.metrics import GROUPS, METRICS
from compress.eval.ocr import Prediction
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow.figures import returned_units, smooth
from compress.reports.comparison import compare
from compress.reports.diffusion import sample_grid, write_report
from compress.reports.reader import write_ocr_report
from compress.reports.run_folder import read_run

pytestmark = pytest.mark.usefixtures("quick_runs")
FIGURES = True

UNITS = {
    "params": ("lower", "parameters", 2_177_753, 1_088_213, 1, None),
    "macs": ("lower", "MACs per forward", 37_218_304, 18_423_808, 1, None),
    "validation_loss": ("lower", "MSE of predicted noise", 0.0402, 0.0441, 1792, None),
    "fid_digits": ("lower", "distance", 9.31, 13.72, 1536, 0.9),
    "kid_digits": ("lower", "squared MMD", 0.0113, 0.0291, 1536, 0.004),
    "precision_digits": ("higher", "share", 0.912, 0.871, 1536, 0.02),
    "ssim_to_dense": ("higher", "SSIM", 1.0, 0.823, 1536, 0.007),
    "latency_ms": ("lower", "ms per denoising step", 14.91, 9.87, 20, 0.5),
}


def make_run(folder: Path, *, seed: int = 0, shift: float = 1.0, oneshot: bool = False) -> Path:
    """Write a complete run folder with invented numbers; ``shift`` scales the compressed ones."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    metrics = {}
    for name, (better, unit, dense, compressed, n, half) in UNITS.items():
        after = compressed if n == 1 else compressed * shift
        metrics[name] = {
            "dense": {"value": dense, "ci95": half and [dense - half, dense + half], "n": n},
            "compressed": {"value": after, "ci95": half and [after - half, after + half], "n": n},
            "ratio": after / dense,
            "better": better,
            "unit": unit,
            "how": "synthetic test data; 3 seeds x 512 images, DDIM, 20 steps, cpu; t interval",
        }
    masks = [] if oneshot else _mask_rows(rng)
    facts = {
        "method": "oneshot" if oneshot else "gradflow",
        "seed": seed,
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.15.0", "diffusers": "0.42.1"},
        "train_seconds": 231.4,
        "criterion_seconds": 0.0 if oneshot else 21.3,
        "criterion_share": None if oneshot else 0.092,
        "returned_channels": 0 if oneshot else masks[-1]["returned"],
        "surgery": {"binarise_jump": 0.0123},
    }
    widths = [
        {"level": f"block_out_channels[{i}]", "dense": dense, "compressed": slim}
        for i, (dense, slim) in enumerate([(24, 16), (32, 24), (64, 40), (112, 80)])
    ]
    content = {
        "run": facts,
        "widths": widths,
        "metrics": metrics,
        "floor": {"fid_digits": 4.48, "kid_digits": -0.0072},
        "warnings": ["MACs fell to 50%, but <time> did not: synthetic"],
    }
    (folder / "metrics.json").write_text(json.dumps(content))
    (folder / "recipe.yaml").write_text(
        "# synthetic\nmodel: builtin:ddpm-digits\ndata: builtin:digits\nmethod:\n"
        f"  name: {facts['method']}\n  keep_macs: 0.5\n  criterion: taylor # <b>\nseed: {seed}\n"
    )
    log = [*_loss_rows(rng, oneshot), *masks]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    if not oneshot:
        save_file(_trace(rng), folder / "trace.safetensors")
    dense = rng.integers(0, 256, (64, 1, 16, 16), dtype=np.uint8)
    save_file({"dense": dense, "compressed": 255 - dense}, folder / "samples.safetensors")
    return folder


def _loss_rows(rng, oneshot):
    rows, flow = [], 0 if oneshot else 300
    for step in range(1, flow + 401):
        stage = "flow" if step <= flow else "recover"
        base = (
            0.045 + 0.03 * step / 300 if stage == "flow" else 0.045 + 0.04 * 0.99 ** (step - flow)
        )
        loss = float(base * rng.lognormal(0, 0.15))
        rows.append({"stage": stage, "step": step, "loss": loss, "lr": 5e-4, "seconds": step / 3})
        if step % 100 == 0:
            net = "masked" if stage == "flow" else "slim_ema"
            rows.append({"stage": "validation", "step": step, "loss": float(base), "net": net})
    rows.append({"stage": "validation", "step": 0, "loss": 0.0402, "net": "dense"})
    rows.append(
        {
            "stage": "surgery",
            "step": flow,
            "loss_masked": None if oneshot else 0.0761,
            "loss_slim": 0.0763,
            "loss_before_binarise": None if oneshot else 0.0752,
            "loss_after_binarise": None if oneshot else 0.0761,
            "max_difference": 3.1e-6,
            "groups": 17,
            "unaligned_norms": 0,
        }
    )
    return rows


def _mask_rows(rng):
    rows = []
    for index, step in enumerate(range(5, 301, 5)):
        progress = step / 300
        fallen = progress**2 * (3 - 2 * progress)
        rows.append(
            {
                "stage": "mask",
                "step": step,
                "budget": 1 - 0.3 * fallen,
                "gamma": 0.5 * progress**2,
                "max_move": float(0.05 * rng.uniform(0.6, 1)),
                "undecided": float(0.5 * np.sin(np.pi * progress) ** 2),
                "returned": int(14 * fallen),
                "spearman": None if index == 0 else float(0.97 - 0.1 * rng.uniform()),
            }
        )
    return rows


def _trace(rng):
    steps = np.arange(5, 301, 5, dtype=np.int64)
    ends = (np.arange(200) < 140).astype(np.float32)
    middle = np.clip(ends + rng.normal(0, 0.3, 200), 0, 1)
    middle[:6] = 0.2  # these six come back
    time = (steps / 300)[:, None]
    early = 1 + (middle - 1) * np.minimum(1, time * 2)
    late = middle + (ends - middle) * np.maximum(0, time * 2 - 1)
    return {"masks": np.where(time < 0.5, early, late).astype(np.float32), "steps": steps}


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and visible text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "img", "br", "wbr"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "gradflow")
    write_report(folder, GradFlow())
    return folder


@pytest.fixture(scope="module")
def page(run) -> Page:
    return Page((run / "report.html").read_text(encoding="utf8"))


def test_page_needs_nothing_from_outside(page):
    assert page.open == []
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    addresses = [a[key] for _, a in page.tags for key in ("src", "href") if key in a]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "url(" not in page.text and "@import" not in page.text


def test_page_names_every_metric_with_its_numbers(page):
    for name in UNITS:
        assert METRICS[name].label in page.text
    for wanted in ("13.72", "[12.82, 14.62]", "1.088 M", "87.1%", "1,536", "0.823×", "floor 4.48"):
        assert wanted in page.text
    assert "Keeps 49.5% of the dense model’s MACs (requested: 50%)" in page.text


def test_page_has_its_numbers_in_groups_and_the_rest_folded(page):
    assert "gradflow of builtin:ddpm-digits" in page.text
    shown, _, folded = page.text.partition("More metrics (2)")
    for label in ("Size", "Quality", "Speed", "1.088 M", "dense: 2.178 M, ratio 0.500×"):
        assert label in shown
    assert "dense: 14.91, 1.51× as fast" in shown
    assert "Precision (digits features)" in folded and "KID" not in shown.split("Metrics")[0]
    assert [tag for tag, _ in page.tags].count("details") == 2  # and the recipe


def test_page_tells_the_flow_and_the_surgery(page):
    assert "14 times a channel came back" in page.text
    assert "changed the validation loss by +1.2%, within the aim of at most 5%" in page.text
    assert "9.2% of the training time, within the aim" in page.text
    assert "masked network 0.0761, slim network 0.0763" in page.text
    assert "3.1e-06" in page.text
    assert "torch 2.15.0, diffusers 0.42.1" in page.text


def test_page_shows_markup_in_user_text_as_text(page):
    assert "<time>" in page.text and "# <b>" in page.text
    assert not any(tag == "time" for tag, _ in page.tags)


def test_texts_that_a_model_read_are_shown_as_text_with_marks(tmp_path):
    image = Image.new("L", (8, 8), 255)
    data = OcrData("test", (OcrPage("<i>", lambda: image, "a <q>cat</q>"),))
    metrics = {
        "metrics": {"cer": {"value": 0.1, "ci95": None, "n": 1, "how": "<i>", "better": "lower"}},
        "methods": [],
        "run": {"model": "<i>", "data": "test", "pages": 1},
    }
    read = [Prediction("a <q>car</q>", 9, 4, True, page="<i>")]
    page = Page(write_ocr_report(tmp_path, data, read, metrics).read_text(encoding="utf8"))
    assert page.open == [] and not {"i", "q"} & {tag for tag, _ in page.tags}
    assert "a <q>ca" in page.text and "page, <i>: edit distance" in page.text
    assert {"ins", "del"} <= {tag for tag, _ in page.tags}
    assert "CER ↓" in page.text and "0.1" in page.text


def test_figures_inside_the_page_are_the_files_beside_it(run, page):
    inside = [a["src"].partition("base64,")[2] for tag, a in page.tags if tag == "img"]
    beside = [base64.b64encode(path.read_bytes()).decode() for path in run.glob("figures/*.png")]
    assert sorted(inside) == sorted(beside)
    assert {path.stem for path in run.glob("figures/*.png")} == {
        "widths",
        "masks",
        "schedule",
        "stability",
        "loss",
        "samples_dense",
        "samples_compressed",
    }
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_report_of_a_oneshot_run_leaves_the_flow_out(tmp_path):
    folder = make_run(tmp_path / "oneshot", oneshot=True)
    page = Page(write_report(folder, OneShot()).read_text(encoding="utf8"))
    assert {p.stem for p in folder.glob("figures/*.png")} == {
        "widths",
        "loss",
        "samples_dense",
        "samples_compressed",
    }
    assert "What was removed" in page.text and "came back" not in page.text
    assert "changed the validation loss" not in page.text
    assert "criterion took" not in page.text and "masked network" not in page.text
    # and the same again
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    write_report(folder, OneShot())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_report_of_metrics_alone(tmp_path):
    folder = make_run(tmp_path / "bare")
    for path in folder.iterdir():
        if path.name != "metrics.json":
            path.unlink()
    content = json.loads((folder / "metrics.json").read_text())
    content["metrics"]["bleu"] = content["metrics"]["fid_digits"] | {"how": "nrefs:1|<b>|eff:yes"}
    (folder / "metrics.json").write_text(json.dumps(content))
    text = write_report(folder, GradFlow()).read_text(encoding="utf8")
    assert "FID (digits features)" in Page(text).text and "Samples" not in Page(text).text
    # a signature may break between its parts
    assert "nrefs:1|<wbr>&lt;b&gt;|<wbr>eff:yes" in text


def test_grid_shows_every_image_in_its_place():
    images = np.arange(64, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 40, 40), np.uint8)
    grid = np.array(Image.open(io.BytesIO(sample_grid(images))))
    scale = grid.shape[0] // (8 * 41 + 1)
    centres = scale * (21 + 41 * np.arange(8))
    assert (grid[np.ix_(centres, centres)] == np.arange(64).reshape(8, 8, 1)).all()


def test_units_count_as_returned_only_after_falling():
    masks = np.array([[1, 1, 1, 1], [0.4, 0.6, 0.4, 1], [0.9, 1, 0, 0]])
    assert returned_units(masks).tolist() == [True, False, False, False]


def test_smoothing_keeps_a_constant_and_lies_inside_the_range():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    noisy = smooth([0.0, 1.0] * 50)
    assert noisy[-1] == pytest.approx(0.5, abs=0.05)


def test_rows_written_twice_count_once(tmp_path):
    folder = make_run(tmp_path / "resumed")
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"stage": "flow", "step": 1, "loss": 7.0}) + "\n")
    flow = read_run(folder).log["flow"]
    assert [row["step"] for row in flow] == list(range(1, 301))
    assert flow[0]["loss"] == 7.0


@pytest.mark.parametrize(
    "call", [lambda folder: write_report(folder, GradFlow()), lambda folder: compare([folder])]
)
def test_no_finished_run(tmp_path, call):
    with pytest.raises(ValueError, match=r"no such folder.*--resume"):
        call(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="half is a folder without one"):
        call(tmp_path / "half")
    (tmp_path / "half" / "metrics.json").write_text('{"metrics": ')
    with pytest.raises(ValueError, match=r"half/metrics\.json should hold JSON"):
        call(tmp_path / "half")
    (tmp_path / "half" / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="an object with 'metrics'"):
        call(tmp_path / "half")
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["metrics.json"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "not json\n", r"line 1 of .*log\.jsonl"),
        ("log.jsonl", '{"loss": 1}\n', r"line 1 of .*log\.jsonl"),
        ("trace.safetensors", "junk", r"trace\.safetensors should hold safetensors"),
        ("recipe.yaml", "a: [", r"recipe\.yaml should hold YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(folder, GradFlow())
    assert not (folder / "report.html").exists()


def test_comparison_has_a_row_per_metric_and_a_column_per_run(tmp_path):
    folders = [make_run(tmp_path / name, shift=s) for name, s in (("a", 1.0), ("b", 1.1))]
    comparison = compare(folders)
    assert comparison.names == ("dense", "a", "b")
    rows = {row["metric"]: row for row in comparison.rows}
    assert set(rows) == set(UNITS)
    assert rows["fid_digits"]["best"] == "a" and rows["precision_digits"]["best"] == "b"
    assert rows["macs"]["best"] is None  # equal
    assert rows["fid_digits"]["runs"]["b"]["value"] == pytest.approx(13.72 * 1.1)
    assert json.loads(json.dumps(comparison.rows)) == comparison.rows


def test_comparison_text_holds_values_intervals_and_the_best(tmp_path):
    folders = [make_run(tmp_path / name, shift=s) for name, s in (("a", 1.0), ("b", 1.1))]
    text = compare(folders).to_text(100)
    assert re.search(r"FID \(digits features\) ↓\s+9\.31\s+13\.72 \*\s+15\.09", text)
    assert "[12.82, 14.62]" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_comparison_shows_brackets_of_a_folder_name(tmp_path):
    assert "[red]run" in compare([make_run(tmp_path / "[red]run")]).to_text(100)


def test_comparison_survives_runs_with_other_metrics_and_other_dense_models(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    content = json.loads((second / "metrics.json").read_text())
    del content["metrics"]["fid_digits"]
    content["metrics"]["params"]["dense"]["value"] += 1
    (second / "metrics.json").write_text(json.dumps(content))
    rows = {row["metric"]: row["runs"] for row in compare([first, second]).rows}
    assert set(rows["fid_digits"]) == {"dense", "a"}
    assert set(rows["params"]) == {"a", "b"}


def change_facts(folder: Path, **facts) -> Path:
    content = json.loads((folder / "metrics.json").read_text())
    content["run"] |= facts
    (folder / "metrics.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"model": "other"}, "the base model differs (a: builtin:ddpm-digits, b: other)"),
        ({"data": "folder:x"}, "the data differs (a: builtin:digits, b: folder:x)"),
        ({"device": "NVIDIA H100"}, "the device differs (a: cpu, b: NVIDIA H100)"),
        # what was evaluated is named otherwise, what it was made of is the same
        ({"model": "runs/slim", "base_model": "builtin:ddpm-digits"}, ""),
        ({"seed": 7}, ""),
    ],
)
def test_comparison_stars_nothing_across_models_data_or_devices(tmp_path, facts, said):
    same = {"model": "builtin:ddpm-digits", "data": "builtin:digits"}
    folders = [change_facts(make_run(tmp_path / "a"), **same)]
    folders.append(change_facts(make_run(tmp_path / "b", shift=1.1), **(same | facts)))
    comparison = compare(folders)
    text = " ".join(comparison.to_text(200).split())
    best = {row["best"] for row in comparison.rows}
    if said:
        assert said in text and "no run is marked as the best" in text
        assert best == {None} and "*" not in text
    else:
        assert comparison.differences == () and {"a", "b"} <= best and "*: best run" in text


def test_comparison_stars_no_value_that_stands_alone_or_has_another_n(tmp_path):
    folders = [make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=1.1)]
    content = json.loads((folders[1] / "metrics.json").read_text())
    del content["metrics"]["fid_digits"]
    content["metrics"]["kid_digits"]["compressed"]["n"] = 64
    (folders[1] / "metrics.json").write_text(json.dumps(content))
    rows = {row["metric"]: row for row in compare(folders).rows}
    assert rows["fid_digits"]["best"] is None and rows["kid_digits"]["best"] is None
    assert rows["latency_ms"]["best"] == "a"


def test_comparison_is_in_groups(tmp_path):
    comparison = compare([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    groups = [row["group"] for row in comparison.rows]
    assert list(dict.fromkeys(groups)) == ["size", "quality", "speed", "more"]
    assert sorted(groups, key=list(GROUPS).index) == groups
    text = comparison.to_text(100)
    assert text.index("SIZE") < text.index("MACs") < text.index("QUALITY") < text.index("SPEED")


def test_comparison_draws_no_panel_of_one_point(tmp_path, monkeypatch):
    folders = [make_run(tmp_path / name) for name in "ab"]
    content = json.loads((folders[1] / "metrics.json").read_text())
    content["metrics"] = {"fid_digits": content["metrics"]["fid_digits"]}
    (folders[1] / "metrics.json").write_text(json.dumps(content))
    for folder in folders:
        content = json.loads((folder / "metrics.json").read_text())
        content["metrics"] = {n: e["compressed"] | e for n, e in content["metrics"].items()}
        for entry in content["metrics"].values():
            del entry["compressed"], entry["dense"]
        (folder / "metrics.json").write_text(json.dumps(content))
    drawn = []
    monkeypatch.setattr(
        "compress.reports.figures.comparison_panels", lambda _, rows: drawn.extend(rows) or b""
    )
    compare(folders).plot(tmp_path / "plot.png")
    assert [row["metric"] for row in drawn] == ["fid_digits"]
    with pytest.raises(ValueError, match="no metric of a has two"):
        compare(folders[:1]).plot(tmp_path / "plot.png")


def test_comparison_tells_runs_of_one_name_apart(tmp_path):
    folders = [make_run(tmp_path / parent / "run") for parent in "xy"]
    assert compare(folders).names == ("dense", *map(str, folders))
    with pytest.raises(ValueError, match="same folder twice"):
        compare([folders[0], folders[0]])
    with pytest.raises(ValueError, match="at least one"):
        compare([])


def test_comparison_plot(tmp_path):
    folders = [make_run(tmp_path / name) for name in "ab"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = compare(folders).plot(tmp_path / "plot.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 6 * plots.DPI

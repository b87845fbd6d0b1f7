"""Rendered pages as benchmark folders: the ground truth gets full marks, and less does not."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.data.ocr_pages import load_pages
from compress.data.omnidocbench import read_omnidocbench
from compress.data.page_folders import write_pages_as_olmocr_bench, write_pages_as_omnidocbench
from compress.data.pages import DOCUMENT, PAGE, page
from compress.eval.olmocr_bench import score_olmocr_bench
from compress.eval.omnidocbench import score_omnidocbench


@pytest.fixture(scope="module")
def documents():
    return [page(9, i, replace(DOCUMENT, wear=0.0), "test") for i in range(4)]


def test_the_ground_truth_scores_fully_on_its_omnidocbench_folder(documents, tmp_path):
    write_pages_as_omnidocbench(tmp_path / "omni", documents)
    pages = read_omnidocbench(tmp_path / "omni")
    for annotated, document in zip(pages, documents, strict=True):
        boxes = [(*b.poly[:2], *b.poly[4:6]) for b in annotated.blocks]
        assert boxes == [block.box for block in document.blocks]
    texts = {p.image: d.text for p, d in zip(pages, documents, strict=True)}
    metrics = score_omnidocbench(pages, texts).metrics
    assert {name: metrics[name].value for name in ("text_edit", "reading_order_edit", "teds")} == {
        "text_edit": 0,
        "reading_order_edit": 0,
        "teds": 1,
    }
    worse = {image: text[: len(text) // 2] for image, text in texts.items()}
    assert score_omnidocbench(pages, worse).metrics["text_edit"].value > 0.2


def test_the_ground_truth_passes_all_tests_of_its_olmocr_folder(documents, tmp_path):
    bench = write_pages_as_olmocr_bench(tmp_path / "olmocr", documents)
    assert set(bench.files) == {"baseline", "format", "order", "present", "table"}
    texts = {p: [d.text] for p, d in zip(bench.pages, documents, strict=True)}
    scores = score_olmocr_bench(bench, texts)
    assert not [o for tests in scores.outcomes.values() for o in tests.values() if not o.passed]
    backwards = {p: ["\n\n".join(reversed(t[0].split("\n\n")))] for p, t in texts.items()}
    assert score_olmocr_bench(bench, backwards).metrics["pass_rate_order"].value < 0.2


def test_folders_of_nothing_are_refused(tmp_path):
    for write in (write_pages_as_omnidocbench, write_pages_as_olmocr_bench):
        with pytest.raises(ValueError, match="at least one"):
            write(tmp_path / "none", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["omnidocbench", "olmocr"])
def test_the_command_line_writes_a_folder_that_an_evaluation_reads(tmp_path, layout):
    folder = tmp_path / "made"
    asked = ["pages", str(folder), "--layout", layout, "--count", "2", "--difficulty", "page"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    data = load_pages(str(folder))
    assert len(data.pages) == 2 and data.annotations is not None
    assert data.pages[1].open().size == PAGE.size
    # what is there is not written over
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2 and "holds a set of pages of compress already" in again.stderr
    (folder / "notes.txt").write_text("mine")
    mine = CliRunner().invoke(app, [*asked, "--overwrite"])
    assert mine.exit_code == 2 and "and also notes.txt; move that away" in mine.stderr
    (folder / "notes.txt").unlink()
    assert CliRunner().invoke(app, [*asked, "--overwrite"]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_the_command_line_names_the_layouts_and_difficulties(tmp_path):
    for option, value in (("--layout", "word"), ("--difficulty", "hard")):
        found = CliRunner().invoke(app, ["pages", str(tmp_path / "made"), option, value])
        assert found.exit_code == 2 and "page, square, document are expected" in found.stderr
    assert not (tmp_path / "made").exists()

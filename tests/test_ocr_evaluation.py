"""The OCR suite: pages in, predictions kept, scores out; and the command line around it."""

import gc
import json
import os
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from builders.tiers import few
from compress.cli import app
from compress.common.events import drain
from compress.common.files import folder_hash
from compress.data.fonts import UNSEEN_FONT
from compress.data.ocr_pages import OcrData, OcrPage, load_pages
from compress.data.page_folders import write_pages_as_olmocr_bench, write_pages_as_omnidocbench
from compress.data.pages import DOCUMENT, LINE, PAGE, page
from compress.eval.metrics import metric
from compress.eval.ocr import (
    Prediction,
    check_accuracy,
    predict,
    read_predictions,
    score,
    speed,
)
from compress.eval.omnidocbench import score_omnidocbench
from compress.eval.retention import retention, worst_page_delta
from compress.eval.settings import OcrEvaluation
from compress.eval.text_metrics import ocean_scores
from compress.models.builtin import train_reader_qwen
from compress.models.locate import locate
from compress.reports.reader import marked
from compress.runs.evaluation import default_pages, evaluate_events


def prediction(name, text, ended=True):
    return Prediction(text, len(text) + 1, 10, ended, page=name)


def pages_of(*texts):
    image = Image.new("L", (8, 8), 255)
    return OcrData("test", tuple(OcrPage(str(i), lambda: image, t) for i, t in enumerate(texts)))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """An untrained reader in a folder, as small as its processor allows."""
    torch.manual_seed(0)
    processor = train_reader_qwen.build_processor()
    config = train_reader_qwen.build_model(processor).config
    config.text_config.num_hidden_layers = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    config.vision_config.depth = 1
    model = type(train_reader_qwen.build_model(processor))(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    folder = tmp_path_factory.mktemp("reader") / "reader"
    train_reader_qwen.save(processor, model, folder)
    return folder


@pytest.fixture
def lines(tmp_path):
    """A folder of four images of one line, with their texts."""
    folder = tmp_path / "lines"
    folder.mkdir()
    for index in range(4):
        made = page(0, index, LINE, "test")
        made.image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(made.text)
    return folder


# ---- pages ---------------------------------------------------------------------------------


def test_rendered_pages_come_in_the_fonts_of_training_and_in_the_unseen_one():
    data = load_pages("builtin:pages", samples=3)
    assert [p.unseen_font for p in data.pages] == [False] * 3 + [True] * 3
    assert len({p.name for p in data.pages}) == 6
    seen = load_pages("builtin:pages", samples=3, unseen_font=False)
    assert [p.name for p in seen.pages] == [p.name for p in data.pages[:3]]
    other = replace(PAGE, fonts=(UNSEEN_FONT,))
    for index, found in enumerate(data.pages):
        wanted = page(0, index % 3, other if index >= 3 else PAGE, "test")
        assert found.text == wanted.text
        assert found.open().tobytes() == wanted.image.tobytes()


def test_rendered_pages_are_drawn_when_they_are_opened():
    def held():
        gc.collect()
        return sum(type(thing) is Image.Image for thing in gc.get_objects())

    before = held()
    pages = load_pages("builtin:pages", 2, False).pages
    assert held() == before
    assert pages[0].open() is not pages[0].open()
    assert pages[0].open().tobytes() == pages[0].open().tobytes() != pages[1].open().tobytes()


def test_a_folder_of_images_with_texts(lines):
    data = load_pages(str(lines))
    assert [p.name for p in data.pages] == ["0.png", "1.png", "2.png", "3.png"]
    assert data.pages[2].text == page(0, 2, LINE, "test").text
    assert data.pages[2].open().size == LINE.size


@pytest.mark.parametrize("layout", ["omnidocbench", "olmocr"])
def test_true_texts_of_a_benchmark_folder_score_full_marks(layout, tmp_path):
    made = [page(0, index, DOCUMENT, "test") for index in range(2)]
    folder = tmp_path / "bench"
    if layout == "olmocr":
        write_pages_as_olmocr_bench(folder, made)
    else:
        write_pages_as_omnidocbench(folder, made)
    data = load_pages(f"folder:{folder}")
    assert [p.open().size for p in data.pages] == [DOCUMENT.size] * 2
    answers = [prediction(p.name, m.text) for p, m in zip(data.pages, made, strict=True)]
    found = score(data, answers).metrics
    if layout == "olmocr":
        assert found["score"].value == 1
    else:
        assert found["text_edit"].value == 0
        assert found["overall_proxy"].value == pytest.approx(100)
    nothing = score(data, [prediction(p.name, "") for p in data.pages]).metrics
    name = "score" if layout == "olmocr" else "overall_proxy"
    assert nothing[name].value < 0.2 * found[name].value


def test_a_pdf_without_images_beside_it_is_rendered(tmp_path):
    made = page(0, 0, DOCUMENT, "test")
    bench = write_pages_as_olmocr_bench(tmp_path / "bench", [made])
    place = bench.pages[0]
    bench.image(place).unlink()
    image = load_pages(str(tmp_path / "bench")).pages[0].open()
    assert max(image.size) == 1288
    ratio = DOCUMENT.size[0] / DOCUMENT.size[1]
    assert image.size[0] / image.size[1] == pytest.approx(ratio, abs=0.01)
    dark = sum(1 for value in image.convert("L").tobytes() if value < 128)
    assert dark > 0.005 * image.size[0] * image.size[1]


def test_documents_of_several_pages_have_their_texts_between_form_feeds(lines, caplog):
    sheets = [Image.new("RGB", (40, 30), (k, k, k)) for k in (10, 20)]
    for name in ("b.tif", "c.gif", "a.pdf"):
        sheets[0].save(lines / name, save_all=True, append_images=sheets[1:])
        (lines / name).with_suffix(".txt").write_text(f"one of {name}\ftwo\f")
    sheets[0].save(lines / "d.jp2")
    (lines / "d.md").write_bytes(b"\xef\xbb\xbfwith a mark\x0c")
    (lines / "e.djvu").write_bytes(b"AT&TFORM")
    (lines / "e.txt").write_text("left out")
    (lines / "README.md").write_text("no page")
    found = {p.name: p for p in load_pages(str(lines)).pages[4:]}
    assert {name: p.text for name, p in found.items()} == {
        "a.pdf, page 1": "one of a.pdf",
        "a.pdf, page 2": "two",
        "b.tif, page 1": "one of b.tif",
        "b.tif, page 2": "two",
        "c.gif, page 1": "one of c.gif",
        "c.gif, page 2": "two",
        "d.jp2": "with a mark",
    }
    for name in ("a.pdf", "b.tif", "c.gif"):
        grey = [found[f"{name}, page {k}"].open().getpixel((5, 5))[0] for k in (1, 2)]
        assert grey == pytest.approx([10, 20], abs=3)
    assert found["a.pdf, page 1"].open().size == (80, 60)  # 72 points an inch, 144 dpi
    assert "1 files with a text beside them" in caplog.text and "e.djvu" in caplog.text
    (lines / "a.txt").write_text("one text for both")
    with pytest.raises(ValueError, match="texts of the 2 pages of .*a.pdf.* it has 1"):
        load_pages(str(lines))
    (lines / "a.pdf").rename(lines / "b.pdf")
    with pytest.raises(ValueError, match="b.txt should be the text of one file; .*b.pdf and"):
        load_pages(str(lines))


def test_hidden_files_are_no_pages(lines):
    for name in (".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png", "@eaDir/0.png"):
        (lines / name).parent.mkdir(exist_ok=True)
        shutil.copy(lines / "0.png", lines / name)
    shutil.copy(lines / "0.png", lines / "._0.png")
    assert len(load_pages(str(lines)).pages) == 4


def test_sources_that_cannot_be_used(tmp_path, lines):
    def refused(source, match, kind=ValueError):
        with pytest.raises(kind, match=match):
            load_pages(str(source))

    refused("builtin:nothing", "builtin:pages, builtin:square-pages; got 'builtin:nothing'")
    refused(tmp_path / "missing", "does not exist", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "it holds none of these")
    (lines / "1.md").write_text("twice")
    refused(lines, "1.png should have its text beside it.*found 2")
    (lines / "1.md").unlink()
    (lines / "1.txt").unlink()
    refused(lines, "1.png should have its text beside it.*found 0")
    (lines / "1.txt").write_bytes(b"\xff\xfe\xff")
    refused(lines, "1.txt should be UTF-8")


# ---- predictions and scores ----------------------------------------------------------------


def test_the_truth_scores_nothing_wrong():
    data = pages_of("one line", "two\nlines here")
    found = score(data, [prediction(p.name, p.text) for p in data.pages]).metrics
    for name in ("cer", "cer_corpus", "ned", "wer", "worst_page_ned", "loop_rate"):
        assert found[name].value == 0
    for name in ("bleu", "token_f1", "ended_rate"):
        assert found[name].value == pytest.approx(1)
    assert {metric(n).better for n in found} == {"lower", "higher", ""}
    for name, better in (("bleu", "higher"), ("cer", "lower")):
        assert metric(f"{name}_unseen_font").better == better


def test_the_unseen_font_has_metrics_of_its_own():
    data = pages_of("abcd", "abcd")
    data = replace(data, pages=(data.pages[0], replace(data.pages[1], unseen_font=True)))
    found = score(data, [prediction("0", "abcd"), prediction("1", "abxx", ended=False)]).metrics
    assert found["cer"].value == 0 and found["cer"].n == 1
    assert found["cer_unseen_font"].value == 0.5 and found["cer_unseen_font"].n == 1
    assert found["ended_rate"].value == 0.5 and found["ended_rate"].n == 2


def test_a_page_without_prediction_is_not_scored():
    with pytest.raises(ValueError, match="1 of 2 pages have none, the first is 1"):
        score(pages_of("a", "b"), [prediction("0", "a")])


def test_reading_goes_on_where_it_was_killed(tmp_path):
    data = pages_of(*"abcdefg")
    asked = []

    def read(pages):
        names = [page.name for page in pages]
        asked.extend(names)
        return [prediction(name, f"read {name}") for name in names]

    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert list(predict(data, read, 3, whole)) == [0, 3, 6, 7]
    asked.clear()
    steps = predict(data, read, 3, parts)
    next(steps), next(steps)
    steps.close()
    with parts.open("a") as file:  # a kill in the middle of a line
        file.write('{"page": "3", "te')
    assert list(predict(data, read, 3, parts)) == [3, 6, 7]
    assert asked == ["0", "1", "2", "3", "4", "5", "6"]
    assert parts.read_bytes() == whole.read_bytes()  # no times in them
    assert list(predict(data, read, 3, parts)) == [7]


def test_pages_per_second_leave_the_first_batch_out(tmp_path, monkeypatch):
    clock = iter([0, 9, 10, 12, 20, 21, 22])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    times = []
    data = pages_of(*"abcde")

    def read(pages):
        return [prediction(page.name, "") for page in pages]

    assert list(predict(data, read, 2, tmp_path / "p.jsonl", times)) == [0, 2, 4, 5]
    assert times == [(2, 9), (2, 2), (1, 1)]
    value = speed(times)["pages_per_second"]
    assert value.value == 1 and value.n == 3 and "without the first batch" in value.how
    assert speed([(4, 2.0)])["pages_per_second"].value == 2 and speed([]) == {}


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "predictions.jsonl"
    good = json.dumps(asdict(prediction("0", "a")))
    for bad in ('{"page": "1"}', "nonsense"):
        file.write_text(f"{good}\n{bad}\n")
        with pytest.raises(ValueError, match="line 2, should hold a prediction"):
            read_predictions(file)


def test_a_torn_line_is_removed_and_a_whole_file_is_only_read(tmp_path):
    file = tmp_path / "predictions.jsonl"
    good = json.dumps(asdict(prediction("0", "a"))) + "\n"
    for torn in ('{"page": ', ""):
        file.write_text(good + torn)
        os.utime(file, (0, 0))
        assert [one.page for one in read_predictions(file)] == ["0"]
        assert file.read_text() == good and bool(torn) == bool(file.stat().st_mtime)


def retained(data, compressed, dense):
    accuracies = [score(data, read).accuracy for read in (compressed, dense)]
    return retention(*accuracies)


def test_accuracy_retention_is_the_ratio_of_what_is_right():
    data = pages_of("abcdefghij", "klmnopqrst")
    dense = [prediction("0", "abcdefghij"), prediction("1", "klmnopqrxx")]
    pruned = [prediction("0", "abcdefghxx"), prediction("1", "klmnopxxxx")]
    found = retained(data, pruned, dense)
    assert found.value == pytest.approx((20 - 6) / (20 - 2))
    assert found.n == 2 and found.ci95[0] <= found.value <= found.ci95[1]
    same = retained(data, dense, dense)
    assert same.value == 1 and same.ci95 == (1, 1)
    with pytest.raises(ValueError, match="on the same pages; got 1 - CER of 1 pages"):
        few = score(pages_of("abcdefghij"), pruned[:1]).accuracy
        retention(few, score(data, dense).accuracy)
    with pytest.raises(ValueError, match="a dense model that reads; its 1 - CER is 0"):
        retained(data, pruned, [prediction("0", ""), prediction("1", "")])


def damaged_reading(text, page, share):
    """A text with a share of its words lost, others on each page."""
    words = text.split(" ")
    return " ".join(w for i, w in enumerate(words) if (7 * i + 3 * page) % 10 >= 10 * share)


@pytest.mark.parametrize("layout", few(["omnidocbench", "olmocr"], "olmocr"))
def test_retention_on_a_benchmark_is_that_of_its_own_score(layout, tmp_path):
    made = [page(0, index, DOCUMENT, "test") for index in range(6)]
    write = write_pages_as_olmocr_bench if layout == "olmocr" else write_pages_as_omnidocbench
    write(tmp_path / "bench", made)
    data = load_pages(str(tmp_path / "bench"))
    dense, pruned = (
        [
            prediction(p.name, damaged_reading(m.text, i, most * i / 10))
            for i, (p, m) in enumerate(zip(data.pages, made, strict=True))
        ]
        for most in (0.4, 0.9)
    )
    name = "score" if layout == "olmocr" else "overall_proxy"
    found, one, other = retained(data, pruned, dense), score(data, pruned), score(data, dense)
    values = [side.metrics[name].value for side in (one, other)]
    assert values[0] < values[1] and found.value == pytest.approx(values[0] / values[1])
    assert name in found.how and ("tests" in found.how) == (layout == "olmocr")
    assert retained(data, dense, dense).ci95 == (1, 1)
    # less is right on every page, so in every sample, if both models' are of the same pages
    assert (one.accuracy.resampled <= other.accuracy.resampled + 1e-9).all()
    # an interval of the two drawn apart is what ours would be, were it not paired
    resampled = one.accuracy.resampled / other.accuracy.resampled
    assert found.ci95 == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))
    apart = one.accuracy.resampled / np.random.default_rng(1).permutation(other.accuracy.resampled)
    wide = np.percentile(apart, [2.5, 97.5])
    assert found.ci95[1] - found.ci95[0] < wide[1] - wide[0]


def test_the_bootstrap_of_omnidocbench_redraws_pages_for_both_models_alike(tmp_path):
    made = [page(0, index, DOCUMENT, "test") for index in range(5)]
    write_pages_as_omnidocbench(tmp_path / "bench", made)
    data = load_pages(str(tmp_path / "bench"))
    sides = [
        [
            prediction(p.name, damaged_reading(m.text, i, most * i / 10))
            for i, (p, m) in enumerate(zip(data.pages, made, strict=True))
        ]
        for most in (0.9, 0.4)
    ]
    found = [score(data, side).accuracy for side in sides]
    draws = np.random.default_rng(0).multinomial(5, np.full(5, 1 / 5), size=3)
    for number, draw in enumerate(draws):
        # the same pages again, each as often as it was drawn, through the scorer itself
        pages = tuple(p for p, n in zip(data.annotations, draw, strict=True) for _ in range(n))
        for accuracy, side in zip(found, sides, strict=True):
            again = score_omnidocbench(pages, {p.page: p.text for p in side})
            expected = again.metrics["overall_proxy"].value
            assert accuracy.resampled[number] == pytest.approx(expected)


def test_the_page_that_lost_most_is_named():
    data = pages_of("abcdefghij", "klmnopqrst", "uvwxyzuvwx")
    data = replace(data, pages=(*data.pages[:2], replace(data.pages[2], unseen_font=True)))
    dense = [prediction(p.name, p.text) for p in data.pages]
    dense[0] = prediction("0", "abcdefxxxx")
    pruned = [prediction("0", "abcdexxxxx"), prediction("1", "klmnopqxxx"), prediction("2", "")]
    one, other = (score(data, side).distances for side in (pruned, dense))
    found = worst_page_delta(one[""], other[""])
    assert found.value == pytest.approx(0.3) and found.n == 2
    assert found.how.startswith("page 1, edit distance 0 dense, 0.3 compressed")
    assert worst_page_delta(one["_unseen_font"], other["_unseen_font"]).value == 1
    assert worst_page_delta(other[""], other[""]).value == 0
    assert metric("worst_page_delta").better == "lower"


def test_oceans_metrics_are_page_means_in_the_order_asked_for():
    data = pages_of("one two three four five", "six seven eight nine ten")
    read = [prediction("0", "one two three"), prediction("1", "six seven eight nine eleven")]
    for strict, published in (("corrected", False), ("published", True)):
        found = score(data, read, strict=strict).metrics
        pairs = zip(read, data.pages, strict=True)
        pages = [ocean_scores(r.text, p.text, published_order=published) for r, p in pairs]
        for name in ("edit_distance", "bleu", "meteor_exact_stem", "precision", "recall", "f1"):
            value = found[f"ocean_{name}"]
            assert value.value == pytest.approx(sum(p[name] for p in pages) / 2)
            assert ("as prediction, as published" in value.how) is published and value.n == 2
    assert found["ocean_precision"].value < found["ocean_recall"].value  # published: they trade
    assert metric("ocean_f1").better == "higher"
    assert metric("ocean_edit_distance").better == "lower"


def test_pages_without_any_text_have_no_accuracy():
    check_accuracy(pages_of("", "a"))
    with pytest.raises(ValueError, match="all 2 pages of test are empty"):
        check_accuracy(pages_of("", " \n"))
    empty = score(pages_of("", ""), [prediction("0", ""), prediction("1", "a")])
    assert empty.accuracy is None and empty.metrics["ned"].value == 0.5


def test_marks_keep_every_character():
    pieces = marked("a <b> cat", "the <b> car")
    assert "".join(text for mark, text in pieces if mark != "del") == "a <b> cat"
    assert "".join(text for mark, text in pieces if mark != "ins") == "the <b> car"
    assert marked("same", "same") == [("", "same")]


# ---- the whole way -------------------------------------------------------------------------


def evaluate(reader, lines, output, **changes):
    options = {name: changes.pop(name) for name in ("resume", "overwrite") if name in changes}
    settings = OcrEvaluation(**{"max_new_tokens": 5, "batch": 3} | changes)
    return drain(
        evaluate_events(reader, output, settings, data=str(lines), device="cpu", **options)
    )


def test_an_evaluation_leaves_predictions_metrics_and_a_report(reader, lines, tmp_path):
    output = tmp_path / "out"
    metrics = evaluate(reader, lines, output)
    assert json.loads((output / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    found = read_predictions(output / "predictions.jsonl")
    assert [p.page for p in found] == ["0.png", "1.png", "2.png", "3.png"]
    assert all(p.new_tokens <= 5 and p.visual_tokens == 20 for p in found)
    report = (output / "report.html").read_text()
    assert report.count("data:image/png;base64") == 3 and "Worst page" in report
    with pytest.raises(FileExistsError, match="finished run"):
        evaluate(reader, lines, output)
    (output / ".lock").touch()
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.name != ".lock"}
    assert evaluate(reader, lines, output, resume=True) == json.loads(json.dumps(metrics))
    assert {path: path.read_bytes() for path in output.rglob("*")} == kept


def test_a_page_that_cannot_be_read_is_a_row_and_not_the_end(reader, lines, tmp_path, caplog):
    Image.new("L", (20, 5000), 255).save(lines / "strip.png")
    (lines / "0.png").write_bytes((lines / "0.png").read_bytes()[:60])
    (lines / "strip.txt").write_text("abc")
    metrics = evaluate(reader, lines, tmp_path / "out")["metrics"]
    failed = metrics["failed_pages"]
    assert (failed["value"], failed["n"], metrics["cer"]["n"]) == (2, 5, 5)
    assert "0.png should hold an image" in failed["how"]
    assert "strip.png: " in failed["how"] and "aspect ratio" in failed["how"]
    assert "scored as an empty page: strip.png: " in caplog.text
    found = {p.page: p for p in read_predictions(tmp_path / "out" / "predictions.jsonl")}
    assert found["strip.png"].text == "" and found["strip.png"].error
    assert metrics["visual_tokens"]["value"] == 20 and metrics["visual_tokens"]["n"] == 3
    # the others are read as if they were alone
    for name in ("0", "strip"):
        (lines / f"{name}.png").unlink(), (lines / f"{name}.txt").unlink()
    evaluate(reader, lines, tmp_path / "rest")
    rest = read_predictions(tmp_path / "rest" / "predictions.jsonl")
    assert {p.page: p.text for p in rest} == {p: found[p].text for p in ("1.png", "2.png", "3.png")}


def test_pages_that_are_too_large_for_a_model_are_refused_in_words(reader, lines, tmp_path):
    Image.new("L", (1700, 2200), 255).save(tmp_path / "real.png")
    found = run("read", tmp_path / "real.png", "--model", reader)
    assert found.exit_code == 2
    assert "takes 4,036 tokens, and the model knows 2,048 positions" in found.stderr
    for path in lines.glob("*.png"):
        shutil.copy(tmp_path / "real.png", path)
    with pytest.raises(ValueError, match="no page of .* could be read; 0.png: the page takes"):
        evaluate(reader, lines, tmp_path / "out")


def test_a_built_in_reader_says_what_it_was_not_trained_on(lines, tmp_path, caplog):
    read = ("read", "--max-new-tokens", 1, "--device", "cpu")
    assert run(*read, lines / "0.png").exit_code == 0
    assert not caplog.text
    for name in ("a", "b"):
        Image.new("L", (300, 200), 255).save(tmp_path / f"{name}.png")
    assert run(*read, tmp_path / "a.png", tmp_path / "b.png").exit_code == 0
    (record,) = caplog.records
    assert "a.png has 300x200 pixels, and what it reads there means" in record.getMessage()


def test_reading_in_batches_equals_reading_one_by_one(reader, lines, tmp_path):
    evaluate(reader, lines, tmp_path / "three")
    evaluate(reader, lines, tmp_path / "one", batch=1)
    one, three = (read_predictions(tmp_path / n / "predictions.jsonl") for n in ("one", "three"))
    assert one == three


def test_an_evaluation_resumes_only_with_its_own_settings(reader, lines, tmp_path):
    output = tmp_path / "out"
    evaluate(reader, lines, output)
    kept = (output / "predictions.jsonl").read_text()
    (output / "report.html").unlink()
    (output / "predictions.jsonl").write_text("\n".join(kept.splitlines()[:2]) + "\n")
    with pytest.raises(FileExistsError, match="--resume"):
        evaluate(reader, lines, output)
    with pytest.raises(ValueError, match="prompt changed"):
        evaluate(reader, lines, output, prompt="Read.", resume=True)
    chosen = evaluate(reader, lines, output, resume=True, metrics=("cer", "loop_rate"))
    assert {*chosen["metrics"]} == {"cer", "loop_rate"}
    again = evaluate(reader, lines, output, resume=True, metrics=("cer", "loop_rate"))
    assert again == json.loads(json.dumps(chosen))
    assert (output / "predictions.jsonl").read_text() == kept
    with pytest.raises(ValueError, match="metrics changed"):
        evaluate(reader, lines, output, resume=True)
    again = evaluate(reader, lines, output, prompt="Read.", overwrite=True)
    assert again["run"]["prompt"] == "Read."
    assert yaml.safe_load((output / "evaluation.yaml").read_text())["prompt"] == "Read."


def test_metrics_are_chosen_by_names_that_there_are():
    settings = OcrEvaluation(metrics=("cer_unseen_font", "pass_rate_tables", "teds"))
    found = dict.fromkeys(["cer", "cer_unseen_font", "teds", "pass_rate_tables", "attended"])
    assert [*settings.chosen(found)] == ["cer_unseen_font", "teds", "pass_rate_tables", "attended"]
    assert OcrEvaluation().chosen(found) == found
    for wrong in ("fid", "pass_rates"):
        with pytest.raises(ValueError, match=f"metrics among accuracy_retention, .*got {wrong}"):
            OcrEvaluation(metrics=(wrong,))


def test_each_built_in_reader_has_pages_of_its_own(tmp_path):
    assert default_pages(locate("builtin:reader-deepseek")) == "builtin:square-pages"
    assert default_pages(locate("builtin:reader-qwen")) == "builtin:pages"
    square = tmp_path / "runtime"
    square.mkdir()
    facts = {"format": 2, "kind": "runtime", "methods": [], "files": {}, "hash": ""}
    facts["base_model"] = "builtin:reader-deepseek"
    (square / "compress.json").write_text(json.dumps(facts))
    assert default_pages(locate(square)) == "builtin:square-pages"
    with pytest.raises(ValueError, match="'float32', 'bfloat16' or 'float16'"):
        OcrEvaluation(dtype="int8")


# ---- the command line ----------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_read_prints_the_text_of_each_page(reader, lines):
    found = run("read", lines / "0.png", lines / "1.png", "--model", reader, "--json",
                "--max-new-tokens", 5, "--device", "cpu")  # fmt: skip
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert [row["page"] for row in rows] == [str(lines / "0.png"), str(lines / "1.png")]
    plain = run("read", lines / "0.png", "--model", reader, "--max-new-tokens", 5)
    assert plain.stdout == rows[0]["text"] + "\n"


def test_read_takes_folders_and_pdfs_and_writes_files(reader, lines, tmp_path, monkeypatch):
    sheets = [Image.open(lines / f"{k}.png").convert("L") for k in range(3)]
    sheets[0].save(tmp_path / "doc.pdf", save_all=True, append_images=sheets[1:], resolution=144)
    (lines / "2.png").write_text("no image")
    asked = ("read", lines, tmp_path / "doc.pdf", "--pages", "1", "--model", reader, "--batch", 2,
             "--max-new-tokens", 3)  # fmt: skip
    found = run(*asked)
    assert found.exit_code == 1
    heads = [line for line in found.stdout.splitlines() if line.startswith("== ")]
    names = [str(lines / "0.png"), str(lines / "1.png"), str(lines / "3.png")]
    assert heads == [f"== {name}" for name in [*names, f"{tmp_path / 'doc.pdf'}, page 1"]]
    assert f"error: {lines / '2.png'} should hold an image" in found.stderr
    assert "1 of 5 pages could not be read" in found.stderr
    texts = tmp_path / "texts"
    to_files = (*asked, "--markdown", "--workers", 0, "--output", texts)
    written = run(*to_files)
    assert written.exit_code == 1 and not written.stdout
    assert "4 texts in" in written.stderr and "1 of 5 pages could not be read" in written.stderr
    files = sorted(texts.rglob("*.md"))
    assert [path.relative_to(texts).as_posix() for path in files] == [
        *("doc_page_1.md", "lines/0.md", "lines/1.md", "lines/3.md")
    ]
    assert files[1].read_text() in found.stdout
    record = texts / "pages-0000.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["page"] for row in rows if row["error"]] == [str(lines / "2.png")]
    assert all(row["flags"] == ["truncated"] for row in rows if not row["error"])
    again = run(*to_files)
    assert again.exit_code == 2 and "go on with --resume, replace it with --over" in again.stderr
    # the pages that are left, and no more: a cut row is no row, and a failure is none twice
    kept = record.read_bytes()
    record.write_bytes(kept + b'{"page": "half')
    files[1].unlink()
    (files[1].parent / ".0.md.abcdefgh.compress-tmp").write_text("half")
    assert run(*to_files, "--resume").exit_code == 1
    assert record.read_bytes() == kept and [*sorted(texts.rglob("*.md"))] == files
    Image.new("L", (70, 40)).save(lines / "2.png")
    resumed = run(*to_files, "--resume")
    assert resumed.exit_code == 0 and "5 texts in" in resumed.stderr, resumed.stderr
    assert record.read_bytes().startswith(kept) and record.read_bytes().count(b"\n") == 6
    assert len([p for p in texts.rglob("*") if p.is_file()]) == 2 + 5
    with monkeypatch.context() as without:
        without.setattr("compress.runs.reading.open_reader", None)
        done = run(*to_files, "--resume")
        assert done.exit_code == 0 and "5 texts in" in done.stderr
        Image.new("L", (70, 40)).save(tmp_path / "more.png")
        for changes, what in (
            ((tmp_path / "more.png",), "sources"),
            (("--prompt", "Read."), "prompt"),
        ):
            other = run(*to_files, *changes, "--resume")
            assert other.exit_code == 2 and f"differs in {what}; go on" in other.stderr
        files[1].with_suffix(".txt").write_text("mine")
        for option in ("--resume", "--overwrite"):
            foreign = run(*to_files, option)
            assert foreign.exit_code == 2 and "and also lines/0.txt; move" in foreign.stderr
    files[1].with_suffix(".txt").unlink()
    replaced = run(*asked, "--output", texts, "--overwrite")
    assert replaced.exit_code == 0 and not list(texts.rglob("*.md")), replaced.stderr
    assert record.read_bytes().count(b"\n") == 5 and not (texts / "lines").exists()
    for options in (("--markdown",), ("--resume",), ("--batch-tokens", 9), ("--workers", 1)):
        assert "is for the folder of --output; name it" in run(*asked, *options).stderr


def test_eval_prints_a_table(reader, lines, tmp_path):
    found = run("eval", reader, "--data", lines, "--output", tmp_path / "o",
                "--max-new-tokens", 3, "--device", "cpu")  # fmt: skip
    assert found.exit_code == 0, found.output
    assert "cer_corpus" in found.stdout and "loop_rate" in found.stdout
    shown = run("show", tmp_path / "o")
    assert shown.exit_code == 0, shown.output
    assert "cer_corpus" in shown.stdout and "report.html" in shown.stdout
    facts = json.loads(run("show", tmp_path / "o", "--json").stdout)
    assert facts["run"]["model_hash"] == folder_hash(reader) and facts["metrics"]["cer"]["n"] == 4


def test_evaluations_are_compared_and_counts_have_no_winner(reader, lines, tmp_path):
    short, long = (tmp_path / name for name in ("short", "long"))
    evaluate(reader, lines, short, max_new_tokens=2)
    evaluate(reader, lines, long, max_new_tokens=4)
    found = run("compare", short, long, "--json", "--plot", tmp_path / "plot.png")
    assert found.exit_code == 0, found.output
    rows = {row["metric"]: row for row in json.loads(found.stdout)}
    assert set(rows["new_tokens"]["runs"]) == {"short", "long"}
    assert rows["new_tokens"]["runs"]["short"]["value"] < 3
    assert rows["new_tokens"]["best"] is None
    assert rows["ned"]["best"] in ("short", "long", None)
    assert "long" in run("compare", short, long).stdout


def test_eval_hands_the_rules_on_and_does_not_resume_what_it_overwrites(reader, lines, tmp_path):
    arguments = ("eval", reader, "--data", lines, "--output", tmp_path / "o")
    refused = run(*arguments, "--resume", "--overwrite")
    assert refused.exit_code == 2 and "choose one" in refused.stderr
    wrong = run(*arguments, "--strict", "theirs")
    assert wrong.exit_code == 2 and "'theirs'" in wrong.stderr
    found = run(*arguments, "--strict", "published", "--max-new-tokens", 2, "--json")
    assert found.exit_code == 0, found.output
    assert "as published numbers" in json.loads(found.stdout)["ocean_bleu"]["how"]


def damaged(reader, tmp_path, change):
    """A copy of the reader's folder with one thing wrong."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(reader, folder)
    change(folder)
    return folder


def without_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("norm.weight"))]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def of_unknown_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors"),
        (without_a_tensor, "norm.weight"),
        (of_unknown_architecture, "qwen2_5_vl"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["config", "weights", "tensor", "architecture", "tokenizer"],
)
def test_a_damaged_model_folder_is_one_clear_message(change, said, reader, lines, tmp_path):
    folder = damaged(reader, tmp_path, change)
    found = run("read", lines / "0.png", "--model", folder)
    assert found.exit_code == 2, found.output
    assert found.stdout == "" and found.stderr.count("error: ") == 1
    assert said in found.stderr and "Traceback" not in found.stderr


def zero_bytes(path):
    path.write_bytes(b"")


def no_image(path):
    path.write_text("just text")


def too_wide(path):
    Image.new("L", (20_000, 10)).save(path)


def zero_size(path):
    # a bitmap whose header says 0 x 0
    header = (0).to_bytes(4, "little") * 2 + b"\x01\x00\x18\x00" + bytes(24)
    path.write_bytes(b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
                     + (40).to_bytes(4, "little") + header)  # fmt: skip


@pytest.mark.parametrize("make", [zero_bytes, no_image, too_wide, zero_size])
def test_a_page_that_cannot_be_read_is_one_clear_message(make, reader, tmp_path):
    path = tmp_path / "page.png"
    make(path)
    found = run("read", path, "--model", reader)
    assert found.exit_code == 2, found.output
    assert found.stdout == "" and found.stderr.count("error: ") == 1
    assert "page.png" in found.stderr and "Traceback" not in found.stderr


def test_unknown_names_on_the_command_line(reader, tmp_path):
    assert "no such file" in run("read", tmp_path / "none.png", "--model", reader).stderr
    wrong = run("read", tmp_path / "none.png", "--model", "builtin:reader-none")
    assert wrong.exit_code == 2
    assert "choose one" in run("eval", reader, "--suite", "audio").stderr

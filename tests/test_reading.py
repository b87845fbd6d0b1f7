"""Many pages: batches by tokens, and rows that survive what happens to a job."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from PIL import Image

from builders.programs import LAUNCHERS, rank_of
from compress.bench.reading_parts import PARTS
from compress.bench.suite import bench
from compress.bench.timing import Bench, Marks
from compress.common.events import drain
from compress.data.page_files import OcrPage
from compress.data.pages import LINE, PAGE, SQUARE_PAGE, page
from compress.eval.settings import PageFiles, ReadSettings
from compress.methods.registry import RUNTIME_METHODS
from compress.models.builtin import train_reader_qwen
from compress.parallel import distributed
from compress.runs import bench_reading, reading
from compress.runs.bench_reading import BENCHMARK
from compress.tables.bench import lines

COMMAND = LAUNCHERS["processes"]
KINDS = (LINE, LINE, PAGE, SQUARE_PAGE)


def render(folder, count, bad):
    """Pages of several sizes in nested folders, some of them damaged."""
    for index in range(count):
        path = folder / f"{index // 50}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        page(0, index, KINDS[index % len(KINDS)], "test").image.save(path)
    chosen = random.Random(0).sample(sorted(folder.rglob("*.png")), bad)
    for number, path in enumerate(chosen):
        path.write_bytes((b"", b"no image", path.read_bytes()[:90])[number % 3])
    return {str(path) for path in chosen}


def rows_in(folder):
    return [row for path in sorted(folder.glob("pages-*.jsonl")) for row in reading.rows_of(path)]


def check(folder, pages, bad, alone):
    """Every good page once, with the text of one process, and an error for each of the others."""
    rows = rows_in(folder)
    good = [row for row in rows if not row["error"]]
    assert Counter(row["page"] for row in good) == Counter({*pages} - bad)
    assert Counter(row["page"] for row in rows if row["error"]) == Counter(bad)
    texts = {row["page"]: row["text"] for row in rows_in(alone)}
    assert {row["page"]: row["text"] for row in rows} == texts


@pytest.mark.parametrize("budget", [1, 40, 400])
def test_batches_keep_the_budget_and_every_page(budget, monkeypatch):
    monkeypatch.setattr(reading, "WINDOW", 16)
    sizes = random.Random(0).choices(range(0, 90), k=50)
    pages = [OcrPage(str(size), Image.Image) for size in sizes]
    batches = list(reading.by_tokens(pages, budget, lambda page: int(page.name)))
    assert Counter(p.name for batch in batches for p in batch) == Counter(p.name for p in pages)
    cost = [max(int(page.name) for page in batch) * len(batch) for batch in batches]
    assert all(c <= budget or len(batch) == 1 for c, batch in zip(cost, batches, strict=True))
    sides = [sorted(int(page.name) for page in batch) for batch in batches]
    assert all(side[-1] <= 2 * side[0] for side in sides)  # short texts do not wait for long ones
    if budget == 400:  # a sorted window leaves little padding
        assert sum(cost) < 1.4 * sum(sizes)
    assert next(reading.by_tokens(iter(pages), budget, lambda page: 1))  # a stream


def test_pages_are_opened_by_others_and_what_is_wrong_is_said_when_they_are_read(tmp_path):
    Image.new("L", (9, 9), 7).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    pages = list(reading.find_pages([tmp_path]))
    for workers in (0, 1):
        [[a, b], [c]] = reading.opened_ahead([pages, pages[:1]], workers)
        (tmp_path / "a.png").rename(tmp_path / "gone.png")  # it is open already
        assert a.open().getpixel((0, 0)) == c.open().getpixel((0, 0)) == (7, 7, 7)
        with pytest.raises(ValueError, match=r"b\.png should hold an image"):
            b.open()
        (tmp_path / "gone.png").rename(tmp_path / "a.png")


def test_a_batch_that_fails_is_read_page_by_page(monkeypatch):
    def try_pages(model, processor, pages, **settings):
        if len(pages) > 1:
            raise torch.OutOfMemoryError("too large")
        if pages[0].name in errors:
            raise errors[pages[0].name]
        return [reading.Reading(pages[0].name, 1, 1, True)]

    monkeypatch.setattr(reading, "try_pages", try_pages)
    errors = {"b": ValueError("no\nuse"), "d": RuntimeError("3 is not 4"), "e": IndexError()}
    pages = [OcrPage(name, Image.Image) for name in "abcde"]
    read = reading.read_batch(None, None, pages, ReadSettings())
    assert [one.text for one in read] == ["a", "", "c", "", ""]
    assert [one.error for one in read if one.error] == [
        "b: no use",
        "d: 3 is not 4",
        "e: IndexError",
    ]
    killed = "DataLoader worker (pid 7) is killed by signal: Killed."
    for error in (torch.AcceleratorError("the device is lost"), RuntimeError(killed)):
        errors["c"] = error
        with pytest.raises(type(error), match=str(error)[:10]):
            reading.read_batch(None, None, pages, ReadSettings())
    for words in ("CUBLAS_STATUS_ALLOC_FAILED when calling", "out of memory"):
        for kind in (RuntimeError, torch.AcceleratorError):
            reading.check_of_a_page(kind(f"CUDA error: {words}"))
    monkeypatch.delattr(torch, "AcceleratorError")
    reading.check_of_a_page(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        reading.check_of_a_page(RuntimeError("CUDA error: an illegal memory access"))


def test_pages_that_are_not_read_are_not_timed(monkeypatch):
    failed = reading.Reading("", 0, 0, False, "a: 3 is not 4")
    monkeypatch.setattr(bench_reading, "read_batch", lambda *_: [failed])
    monkeypatch.setattr(bench_reading, "marked_parts", lambda *_: nullcontext())
    with pytest.raises(ValueError, match="should be read to be timed; got a: 3 is not 4; choose"):
        bench_reading._read(None, None, [[]], ReadSettings(), (), Marks(Bench("cpu", 1)))


def test_a_process_that_opens_pages_and_is_killed_ends_the_job_and_says_how_it_goes_on():
    page = OcrPage("a", partial(signal.raise_signal, signal.SIGKILL))
    said = pytest.raises(OSError, match="opens pages was killed.*--resume")
    with said, reading.openers_watched():
        list(reading.opened_ahead([[page]], 1))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """An untrained reader of one layer."""
    torch.manual_seed(0)
    processor = train_reader_qwen.build_processor()
    config = train_reader_qwen.build_model(processor).config
    config.text_config.num_hidden_layers = config.vision_config.depth = 1
    config.text_config.layer_types = config.text_config.layer_types[:1]
    model = type(train_reader_qwen.build_model(processor))(config)
    folder = tmp_path_factory.mktemp("reader") / "reader"
    train_reader_qwen.save(processor, model, folder)
    return folder


def test_a_job_survives_kills_and_goes_on_with_other_processes(reader, tmp_path, monkeypatch):
    bad = render(tmp_path / "in", 24, 3)
    pages = [str(path) for path in (tmp_path / "in").rglob("*.png")]
    settings = ReadSettings(max_new_tokens=4)
    monkeypatch.setattr(reading, "WINDOW", 8)

    def job(name, rank=0, processes=1, **options):
        monkeypatch.setattr(distributed, "process", lambda: rank)
        monkeypatch.setattr(distributed, "processes", lambda: processes)
        monkeypatch.setattr(distributed, "from_main", lambda work: work())
        files = PageFiles(batch_tokens=400, workers=0)
        output = tmp_path / name
        return reading.read_to_folder(
            reader, [tmp_path / "in"], output, settings, files, device="cpu", **options
        )

    files = PageFiles(batch=5, workers=0)
    drain(reading.read_to_folder(reader, [tmp_path / "in"], tmp_path / "alone", settings, files))
    # two processes, each of them killed at another place, one while it wrote
    first = job("out", processes=2)
    assert [next(first).step for _ in range(2)][-1] > 2
    first.close()
    second = job("out", 1, 3, resume=True)
    next(second), second.close()
    killed = tmp_path / "out" / "pages-0001.jsonl"
    killed.write_bytes(killed.read_bytes()[:-9])
    before = len(rows_in(tmp_path / "out"))
    assert 2 < before < len(pages)
    record = drain(job("out", resume=True))
    assert record.done == {*pages} - bad and {*record.failed} == bad
    check(tmp_path / "out", pages, bad, tmp_path / "alone")
    assert len(rows_in(tmp_path / "out")) == len(pages)
    # nothing is left, but what failed is tried again
    kept = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    drain(job("out", resume=True))
    assert {p: p.read_bytes() for p in kept if "pages" in p.name} == {
        p: content for p, content in kept.items() if "pages" in p.name and content
    }


def test_sources_and_names_are_the_same_from_anywhere(reader, tmp_path, monkeypatch):
    scans = tmp_path / "scans"
    render(scans, 1, 0)
    image = next(scans.rglob("*.png"))
    odd = scans / os.fsdecode(b"odd-\xff.png")
    odd.write_bytes(image.read_bytes())
    settings, files = ReadSettings(max_new_tokens=1), PageFiles(workers=0, markdown=True)

    def read(source, **options):
        return drain(
            reading.read_to_folder(
                reader, [source], tmp_path / "out", settings, files, device="cpu", **options
            )
        )

    def another_arrives():
        (tmp_path / "out" / "pages-0001.jsonl").write_text(
            '{"page": "b", "text": "", "error": ""}\n'
        )

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "wait_for_all", another_arrives)
        # what others write before they arrive is counted
        assert read("scans").done == {str(image), str(odd), "b"}
    (tmp_path / "out" / "pages-0001.jsonl").unlink()
    monkeypatch.chdir(scans)
    monkeypatch.setattr(reading, "read_pages_of", None)  # nothing is left
    assert read(scans, resume=True).done == read("../scans", resume=True).done
    texts = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.md"))
    assert texts == [path.relative_to(scans).with_suffix(".md") for path in sorted([image, odd])]


def test_a_folder_is_timed_in_every_way_that_serves_the_model(reader, tmp_path):
    results = tmp_path / "rows.jsonl"
    shape = f"model={reader},pages=2,new_tokens=2,batch_tokens=400"
    rows = [
        row
        for row in bench(BENCHMARK, shapes=[shape], repeats=1, device="cpu", results=results)
        if row["part"] == "folder"
    ]
    ways = [row["shape"]["way"] for row in rows]
    methods = {name for way in ways for name in way.split(" + ")} - {"dense"}
    assert methods - {"dense, in file order"} <= {*RUNTIME_METHODS} and len(ways) >= 3
    for row in rows:
        spent = row["parts"].values()
        assert [*row["parts"]] == [*PARTS] and min(spent) > 0
        assert 0.5 < sum(spent) / row["ms"]["page"]["median"] < 1
        assert row["memory_mb"] > 4 and row["pages_per_second"] > 0
    table = BENCHMARK.table(lines(rows))
    assert table.count("\n| cpu") == len(ways) and "| dense, in file order |" in table


@pytest.mark.slow
@pytest.mark.parametrize("way", LAUNCHERS)
def test_every_launcher_reads_and_scores_as_one_process(reader, tmp_path, way):
    bad = render(tmp_path / "in", 7, 1)
    pages = [str(path) for path in (tmp_path / "in").rglob("*.png")]
    (tmp_path / "scored").mkdir()
    for index in range(5):
        made = page(0, index, KINDS[index % len(KINDS)], "test")
        made.image.save(tmp_path / "scored" / f"{index}.png")
        (tmp_path / "scored" / f"{index}.txt").write_text(made.text)

    several = ("--processes", "2") if way == "processes" else ()
    for name, through, processes in (("one", COMMAND, ()), ("two", LAUNCHERS[way], several)):

        def run(command, *arguments, through=through, options=processes):
            return subprocess.run(
                [*through, command, *map(str, arguments), "--max-new-tokens", "4", *options],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
                capture_output=True,
                text=True,
                timeout=300,
            )

        run("read", tmp_path / "in", "--model", reader, "--output", tmp_path / name)
        scores = ("--data", tmp_path / "scored", "--output", tmp_path / f"scores-{name}")
        done = run("eval", reader, *scores)
        assert done.returncode == 0, done.stderr
    check(tmp_path / "two", pages, bad, tmp_path / "one")
    assert len(list((tmp_path / "two").glob("pages-*.jsonl"))) == 2
    one, two = (
        json.loads((tmp_path / f"scores-{name}" / "metrics.json").read_text())["metrics"]
        for name in ("one", "two")
    )
    times = {"pages_per_second", *(f"{part}_ms" for part in PARTS)}
    assert one.keys() == two.keys() >= times
    assert all(one[name] == two[name] for name in one.keys() - times)


def resident(pid):
    """Bytes in memory of a process."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_300_pages_on_two_processes_one_of_them_killed(tmp_path):
    bad = render(tmp_path / "in", 300, 12)
    pages = [str(path) for path in (tmp_path / "in").rglob("*.png")]
    begin = [*COMMAND, "read", str(tmp_path / "in"), "--max-new-tokens", "24"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}

    def command(name, *options):
        return [*begin, "--output", str(tmp_path / name), *map(str, options)]

    # alone, in file order; and what it holds while it reads
    memory = []
    with subprocess.Popen(command("alone", "--batch", 16), env=environment) as alone:
        while alone.poll() is None:
            rows = len(rows_in(tmp_path / "alone"))
            if rows:
                memory.append((rows, resident(alone.pid)))
            time.sleep(0.2)
    assert alone.returncode == 1  # as pages could not be read
    first = max(size for rows, size in memory if rows <= 66)
    last = max(size for rows, size in memory if rows > 250)
    assert last < 1.1 * first, (first, last)
    with subprocess.Popen(
        command("out", "--batch-tokens", 3000, "--processes", 2), env=environment
    ) as job:
        while len(rows_in(tmp_path / "out")) < 100:
            assert job.poll() is None
            time.sleep(0.1)
        os.kill(rank_of(job.pid, 1), signal.SIGKILL)
        killed = time.monotonic()
        assert job.wait(60) == 1
    print(f"\nended {time.monotonic() - killed:.1f} s after the kill; memory {first} {last}")
    left = {path: path.read_bytes() for path in (tmp_path / "out").glob("pages-*.jsonl")}
    assert len(left) == 2 and 100 <= len(rows_in(tmp_path / "out")) < 300
    done = subprocess.run(
        command("out", "--batch-tokens", 3000, "--resume"), env=environment, stderr=subprocess.PIPE
    )
    assert done.returncode == 1 and b"288 texts in" in done.stderr
    check(tmp_path / "out", pages, bad, tmp_path / "alone")
    for path, content in left.items():
        assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1])

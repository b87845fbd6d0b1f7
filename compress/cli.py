"""The command line: every verb is one call into the library.

Heavy packages are imported inside the verbs, so that help and mistakes answer at once.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from compress.common.extras import MissingExtraError
from compress.parallel import launch

if TYPE_CHECKING:
    from compress.doctor import Check
    from compress.methods.base import Event

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    MissingExtraError,
    NotADirectoryError,
)
# how often a stage reports where no progress bar can be drawn
PLAIN_LINES = 10
# so long the main process has to say what went wrong, before another one does
YIELD_SECONDS = 3


class _Verbs(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _kernels_told():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            _fail(error, USAGE)
        except OSError as error:
            _fail(error, FAILURE)
        except launch.Stopped as error:
            _say(f"error: {error}")
            raise typer.Exit(error.code) from None
        except KeyboardInterrupt:
            _say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Verbs,
    help="Compress diffusion models and page readers: from a recipe to a checkpoint and a report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Device = Annotated[
    str | None, typer.Option(help="Such as cpu or cuda:1. Default: CUDA if there is any.")
]
Processes = Annotated[
    int, typer.Option(min=1, help="On this machine; more than one share the work.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"compress {version('compress-models')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    os.environ.update(launch.adopt_slurm(os.environ))


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Predict; write nothing.")] = False,
    as_json: Json = False,
    device: Device = None,
    processes: Processes = 1,
) -> None:
    """Compress, recover, export, evaluate and report, as a recipe says."""
    if resume and overwrite:
        raise ValueError("expected --resume or --overwrite; got both; choose one")
    from compress.runs.recipe import ReaderRecipe, load_recipe

    typed = load_recipe(recipe, overrides or ())
    _check_versions()
    _quieten()
    if dry_run:
        from compress.runs.diffusion import dry_run as predict

        prediction = predict(typed, device=device)
        _print(prediction, as_json, _lines(prediction))
        if prediction["problems"]:
            raise typer.Exit(USAGE)
        return
    folder = Path(output or typed.output or "")
    command = ["run", recipe]
    for override in overrides or ():
        command += ["--set", override]
    command += ["--device", device] if device else []
    command += ["--processes", str(processes)] if processes > 1 else []
    command += ["--output", str(folder)]
    with _hint(folder, f"compress {shlex.join(command)} --resume"):
        if launch.wanted(processes):
            if isinstance(typed, ReaderRecipe):
                raise ValueError(f"readers run on one process; got --processes {processes}")
            flags = {"--resume": resume, "--overwrite": overwrite, "--json": as_json}
            launch.launch(processes, [*command, *(flag for flag, on in flags.items() if on)])
            return
        from compress.runs.diffusion import run_events

        _follow(run_events(typed, output=folder, resume=resume, overwrite=overwrite, device=device))
    if not launch.rank():
        _print_run(folder, as_json)


@contextlib.contextmanager
def _hint(folder: Path, again: str) -> Iterator[None]:
    """Say how to go on after Ctrl-C, SIGTERM, or the end of one of several processes."""

    def stop(number: int, _frame: Any) -> None:
        raise launch.Stopped(f"stopped by {signal.Signals(number).name}", launch.TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        saved = (folder / "state").exists()
        if launch.speaks():
            _say(f"interrupted: state saved; go on with: {again}" if saved else "interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except launch.Stopped as error:
        saved = (folder / "state").exists()
        if launch.speaks():
            _say(f"error: {error}; go on with: {again}" if saved else f"error: {error}")
        raise typer.Exit(error.code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def show(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run or evaluation.")
    ],
    as_json: Json = False,
) -> None:
    """Print the metrics of a finished run, or of an evaluation of a reader."""
    _print_run(folder, as_json)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, evaluations.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the comparison: a PNG.")] = None,
    as_json: Json = False,
) -> None:
    """Put several runs into one table, and one plot."""
    from compress.reports.comparison import compare as compare_runs

    comparison = compare_runs(folders)
    if plot:
        _say(f"plot  {comparison.plot(plot)}")
    _print(comparison.rows, as_json, comparison.to_text())


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with compress."""
    from compress.runs.recipe import list_recipes

    found = list_recipes()
    width = max(len(name) for name, _ in found)
    rows = [{"name": name, "about": about} for name, about in found]
    _print(rows, as_json, "\n".join(f"{name:<{width}}  {about}" for name, about in found))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, builtin:NAME or a hub id.")],
    suite: Annotated[str, typer.Option(help="Set of metrics: diffusion or ocr.")] = "diffusion",
    data: Annotated[
        str | None,
        typer.Option(
            help="Real images (default builtin:digits), or pages: builtin:pages, "
            "builtin:square-pages or a folder."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=2, help="Images per sampling seed (512), or rendered pages (64)."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="diffusion: denoising steps.")] = 20,
    sampler: Annotated[str, typer.Option(help="diffusion: ddim or ddpm.")] = "ddim",
    sampling_seeds: Annotated[int, typer.Option(min=1, help="diffusion: repetitions.")] = 3,
    inception_weights: Annotated[
        str | None, typer.Option(help="diffusion: FID Inception weights.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(min=1, help="diffusion: of prompts (the pipeline's own).")
    ] = None,
    caption_column: Annotated[str, typer.Option(help="diffusion: captions in the data.")] = "text",
    label_column: Annotated[str, typer.Option(help="diffusion: labels in the data.")] = "label",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images drawn together (128), or pages read together (8)."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="ocr: what is asked of the model.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="ocr: of a page.")] = None,
    dtype: Annotated[str, typer.Option(help="ocr: float32, bfloat16 or float16.")] = "float32",
    mode: Annotated[str | None, typer.Option(help="ocr: DeepSeek-OCR's resolution.")] = None,
    ocean_order: Annotated[
        str, typer.Option(help="ocr: Ocean-OCR's metrics, correct or as published.")
    ] = "correct",
    output: Annotated[
        Path | None, typer.Option(help="ocr: folder of predictions and report.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="ocr: read what is left.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="ocr: start again.")] = False,
    as_json: Json = False,
    device: Device = None,
    processes: Processes = 1,
) -> None:
    """Measure any diffusers pipeline or any reader of pages, ours or a stranger's."""
    if suite not in ("diffusion", "ocr"):
        raise ValueError(f"expected --suite diffusion or ocr; got {suite}; choose one")
    if resume and overwrite:
        raise ValueError("expected --resume or --overwrite; got both; choose one")
    if launch.wanted(processes):
        if suite == "ocr":
            raise ValueError(f"readers run on one process; got --processes {processes}")
        chosen = {
            "data": data,
            "samples": samples,
            "steps": steps,
            "sampler": sampler,
            "sampling-seeds": sampling_seeds,
            "guidance-scale": guidance_scale,
            "caption-column": caption_column,
            "label-column": label_column,
            "batch": batch,
            "inception-weights": inception_weights,
            "device": device,
            "processes": processes,
        }
        options = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
        launch.launch(processes, ["eval", model, *options, *["--json"] * as_json])
        return
    _check_versions()
    _quieten()
    if suite == "ocr":
        from compress.runs.reading import OcrSettings, evaluate_events

        settings = OcrSettings(
            model=model,
            data=data,
            samples=samples or 64,
            batch=batch or 8,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            mode=mode,
            ocean_order=ocean_order,
        )
        name = model.removeprefix("builtin:").rstrip("/").rpartition("/")[2]
        folder = output or Path("runs") / f"eval_{name}"
        events = evaluate_events(
            settings, folder, resume=resume, overwrite=overwrite, device=device
        )
        try:
            _follow(events)
        except KeyboardInterrupt:
            _say(f"interrupted: predictions kept; go on with --resume --output {folder}")
            raise typer.Exit(INTERRUPTED) from None
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf8"))["metrics"]
    else:
        from compress.runs.diffusion import evaluate_model
        from compress.runs.recipe import Columns

        metrics = evaluate_model(
            model,
            data=data or "builtin:digits",
            samples=samples or 512,
            steps=steps,
            sampler=sampler,
            sampling_seeds=sampling_seeds,
            guidance_scale=guidance_scale,
            batch=batch or 128,
            columns=Columns(caption=caption_column, label=label_column),
            inception_weights=inception_weights,
            device=device,
        )
    if launch.rank():
        return
    _print(metrics, as_json, _metrics_table(metrics))


@app.command()
def read(
    pages: Annotated[list[Path], typer.Argument(metavar="PAGE...", help="Image files.")],
    model: Annotated[
        str, typer.Option(help="A folder, builtin:NAME or a hub id.")
    ] = "builtin:reader-qwen",
    prompt: Annotated[str | None, typer.Option(help="What is asked of the model.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a page.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    mode: Annotated[str | None, typer.Option(help="DeepSeek-OCR's resolution.")] = None,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Print the text of page images."""
    _check_versions()
    _quieten()
    from compress.runs.reading import read_files

    readings = read_files(
        model,
        pages,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        mode=mode,
        device=device,
    )
    rows = [{"page": str(p), "text": t} for p, t in zip(pages, readings, strict=True)]
    _print(rows, as_json, "\n\n".join(readings))


@app.command()
def pages(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    layout: Annotated[str, typer.Option(help="omnidocbench or olmocr.")] = "omnidocbench",
    difficulty: Annotated[str, typer.Option(help="page, square or document.")] = "document",
    count: Annotated[int, typer.Option(min=1, help="Pages.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the pages.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Render pages with exact ground truth, in the layout of a benchmark."""
    from compress.data.page_folders import write_rendered_pages

    write_rendered_pages(output, layout, difficulty, count, seed, split)
    _say(f"{count} pages in {output}; compress eval MODEL --suite ocr --data {output}")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, builtin:NAME or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint to write.")],
    data: Annotated[str, typer.Option(help="builtin:pages, or a folder.")] = "builtin:pages",
    pages: Annotated[int, typer.Option(min=1, help="That are written densely.")] = 16,
    keep_visual: Annotated[float, typer.Option(help="Fraction of the visual tokens.")] = 0.05,
    periphery: Annotated[
        int, typer.Option(min=0, help="Summaries per head of what is not attended to.")
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of a page.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Find the focal layers of a reader for FastOCR, and write a checkpoint with them."""
    _check_versions()
    _quieten()
    from compress.methods.fastocr import FastOCR
    from compress.runs.reader import calibrated_checkpoint

    facts = calibrated_checkpoint(
        model,
        FastOCR(keep_visual=keep_visual, periphery=periphery),
        output,
        data=data,
        pages=pages,
        max_new_tokens=max_new_tokens,
        dtype=dtype,
        device=device,
    ).facts
    curve = [(str(n), f"{v:.4f}", "") for n, v in enumerate(facts["curve"], start=1)]
    lines = [
        _table([("focal layers", "mean recall", ""), *curve]),
        "",
        f"order        {', '.join(map(str, facts['order']))}",
        f"chosen       {', '.join(map(str, facts['focal_layers']))}",
        f"checkpoint   {output}",
    ]
    _print(facts, as_json, "\n".join(lines))


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="gradflow, rtprune, fastocr or kernels.")],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="KEY=VALUE,...",
            help="Sizes to time, such as visual=4096,batch=8; may be repeated.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each way.")] = 15,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: for one thread on a machine that others use too.")
    ] = "wall",
    results: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
    crossover: Annotated[
        Path | None,
        typer.Option(help="fastocr: write from how many visual tokens on it is faster."),
    ] = None,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Time a method, or the kernels, against the best dense way, in one run."""
    _check_versions()
    _quieten()
    from compress.bench.cells import describe
    from compress.bench.suite import bench as rows_of
    from compress.methods.registry import benchmarks

    known = benchmarks()
    if what not in known:
        raise ValueError(f"expected one of {', '.join(known)}; got {what!r}; choose one")
    rows, cells = [], []
    for row in rows_of(
        known[what],
        shapes=shapes or (),
        repeats=repeats,
        clock=clock,
        device=device,
        results=results,
        crossover=crossover,
    ):
        rows.append(row)
        cells.append(describe(row))
        _say("  ".join(cells[-1]))
        if row.get("warning"):
            _say(f"warning: {row['warning']}")
    header = ("benchmark", "shape", "median [p20, p80] ms", "found")
    _print(rows, as_json, _table([header, *cells]))
    if crossover is not None:
        _say(f"crossover  {crossover}")


@app.command()
def tables(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Tables to fill; all of them when none is named."),
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Folder of the measured rows, with tables.yaml.")
    ] = Path("eval/results"),
    shard: Annotated[
        str, typer.Option(help="K/N: make every N-th run only, from the K-th.")
    ] = "0/1",
    update: Annotated[
        list[Path] | None,
        typer.Option(help="Document to put the tables into; may be repeated."),
    ] = None,
    only_render: Annotated[bool, typer.Option("--render", help="Run nothing.")] = False,
) -> None:
    """Run what the generated tables lack, one run at a time, and print them. Resumable."""
    _check_versions()
    _quieten()
    from compress.common.files import write_text
    from compress.tables.documents import all_tables, fill, read_documents
    from compress.tables.table import parse_shard

    known, part = all_tables(results, Path("runs")), parse_shard(shard)
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"tables are {', '.join(known)}; got {', '.join(unknown)}; name one")
    chosen = [known[name] for name in names or known]
    documents = read_documents(update, [table.name for table in chosen]) if update else {}
    for table in chosen if not only_render else ():
        for line in table.run_missing(part):
            _say(line)
    rendered = {table.name: table.render() for table in chosen}
    for path, text in documents.items():
        write_text(path, fill(text, rendered))
    typer.echo("\n\n".join(f"## {name}\n\n{text}" for name, text in rendered.items()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, devices, disk, cache and the built-in models."""
    from dataclasses import asdict

    from compress.doctor import examine

    checks = examine()
    _print([asdict(check) for check in checks], as_json, "\n".join(map(_check_line, checks)))
    broken = [check.name for check in checks if check.required and not check.ok]
    if broken:
        _say(f"error: broken: {', '.join(broken)}")
        raise typer.Exit(FAILURE)


def main() -> None:
    """Entry point of the commands `compress` and `compress-models`."""
    app()


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("COMPRESS_DEBUG"):
        raise error
    if launch.rank() or (isinstance(error, ConnectionError) and not launch.speaks()):
        # what went wrong everywhere the main process says, and then the launcher ends this one
        time.sleep(YIELD_SECONDS)
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        # without the number that OSError puts first
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    _say(f"error: process {launch.rank()}: {text}" if launch.rank() else f"error: {text}")
    raise typer.Exit(code) from None


class _OnStderr(logging.Handler):
    """Logged lines as they are."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(record.getMessage())


@contextlib.contextmanager
def _kernels_told() -> Iterator[None]:
    """Say on stderr which kernels do the work."""
    logger, handler = logging.getLogger("compress.kernels"), _OnStderr()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _check_versions() -> None:
    from compress.doctor import versions

    wrong = [check for check in versions() if not check.ok]
    if wrong:
        _say("error: packages outside the supported ranges:")
        for check in wrong:
            _say(f"  {check.name} {check.found}; {check.hint}")
        raise typer.Exit(FAILURE)


def _quieten() -> None:
    """Hide what a user of the command line can do nothing about."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # torch.utils.data warns about pinned memory wherever there is no GPU
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
    if launch.rank():
        # the main process says it
        warnings.simplefilter("ignore")


def _follow(events: Iterable["Event"]) -> None:
    """Show progress on stderr: bars on a terminal, a line now and then elsewhere."""
    if launch.rank():
        for _ in events:
            pass
        return
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        _draw_bars(events, console)
        return
    last = ("", -1)
    for event in events:
        tenth = event.step * PLAIN_LINES // max(event.total, 1)
        if event.message or (event.stage, tenth) != last:
            count = f"{event.step}/{event.total}" if event.total else ""
            parts = (event.stage, count, _values(event.values), event.message)
            _say("  ".join(part for part in parts if part))
        last = (event.stage, tenth)


def _draw_bars(events: Iterable["Event"], console: Any) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}
        for event in events:
            if event.message:
                progress.console.print(
                    f"{event.stage}: {event.message}", markup=False, highlight=False
                )
            if not event.total:
                continue
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(event.stage, total=event.total, values="")
            progress.update(
                tasks[event.stage],
                completed=event.step,
                total=event.total,
                values=_values(event.values),
            )


def _values(values: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in values.items())


def _print(content: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(content, indent=2, default=str) if as_json else text)


def _print_run(folder: Path, as_json: bool) -> None:
    from compress.reports.run_folder import read_metrics

    found = read_metrics(folder)
    if not any("compressed" in entry for entry in found["metrics"].values()):
        report = f"report      {folder / 'report.html'}"
        text = f"{_metrics_table(found['metrics'])}\n\n{report}"
        _print({"folder": str(folder), **found}, as_json, text)
        return
    header = ("metric", "dense", "compressed", "ratio", "better")
    rows = [
        (
            f"{name} [{entry['unit']}]" if entry.get("unit") else name,
            _interval(entry["dense"]),
            _interval(entry["compressed"]),
            "" if entry["ratio"] is None else f"{entry['ratio']:.3f}",
            entry["better"],
        )
        for name, entry in found["metrics"].items()
    ]
    lines = [_table([header, *rows]), ""]
    if "comparison" in found:
        lines += [_variants_table(found), ""]
    widths = [f"{w['level']}: {w['dense']} -> {w['compressed']}" for w in found.get("widths", [])]
    lines += [f"widths      {', '.join(widths)}"] if widths else []
    for name, value in found.get("floor", {}).items():
        lines.append(f"floor       {name} {value:.4g} between the two halves of the real data")
    lines += [f"warning     {warning}" for warning in found.get("warnings", [])]
    lines.append(f"checkpoint  {folder / 'checkpoint'}")
    lines.append(f"report      {folder / 'report.html'}")
    everything = {"folder": str(folder), "checkpoint": str(folder / "checkpoint"), **found}
    _print(everything, as_json, "\n".join(lines))


def _metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of one model."""
    rows = [(name, _interval(entry), str(entry["n"])) for name, entry in metrics.items()]
    return _table([("metric", "value", "n"), *rows])


def _variants_table(found: Mapping[str, Any]) -> str:
    """What a run on a reader compared, a line for each variant."""
    from compress.reports.reader_rows import keep_text, measure, series_name, used_text

    # runs of before it was named measured this
    accuracy = found.get("accuracy", "1 - CER")
    metric = measure(accuracy)
    rows = [
        (
            row["variant"] if row["variant"] in ("dense", "compressed") else "",
            series_name(row) or "none",
            keep_text(row) or "-",
            used_text(row),
            _interval(row.get("accuracy_retention")),
            _interval(row["metrics"].get(metric)),
        )
        for row in found["comparison"]
    ]
    retention = f"retention ({accuracy})"
    return _table([("variant", "method", "keep", "visual tokens used", retention, metric), *rows])


def _interval(entry: Mapping[str, Any] | None) -> str:
    """A value with its 95% confidence interval."""
    if entry is None or entry["value"] is None:
        return "-"
    value, interval = entry["value"], entry["ci95"]
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else text


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _lines(content: Mapping[str, Any]) -> str:
    """A prediction as aligned lines; lists one item a line."""
    width = max(len(name) for name in content)
    lines = []
    for name, value in content.items():
        items = value if isinstance(value, list) else [value]
        shown = [f"{item:,}" if isinstance(item, int | float) else str(item) for item in items]
        lines += [f"{name:<{width}}  {item}" for item in shown or ["none"]]
    return "\n".join(lines)


def _check_line(check: "Check") -> str:
    mark = "ok  " if check.ok else ("FAIL" if check.required else "warn")
    return f"{mark}  {check.name:<22} {check.found}" + (f"; {check.hint}" if check.hint else "")


if __name__ == "__main__":
    main()

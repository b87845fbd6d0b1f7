"""The command line: every verb is one call into the library.

Heavy packages are imported inside the verbs, so that help and mistakes answer at once.
"""

import contextlib
import errno
import json
import logging
import os
import shlex
import signal
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from compress.common.extras import MissingExtraError, extra
from compress.common.foreign import one_line
from compress.common.options import options_of, taken, validated
from compress.common.output_folder import MARKER, PROGRESS, check_apart, check_target
from compress.common.settings import MOST_PROCESSES, inputs_of
from compress.data.columns import Columns
from compress.eval.settings import (
    Calibration,
    OcrEvaluation,
    PageFiles,
    ReadSettings,
    Sampling,
)
from compress.methods.registry import RUNTIME_METHODS
from compress.parallel import launch

if TYPE_CHECKING:
    from compress.methods.base import Event
    from compress.runs.reading import Record

USAGE, FAILURE, INTERRUPTED = 2, 1, 130
USER_ERRORS = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    MissingExtraError,
    NotADirectoryError,
)
FULL = (errno.ENOSPC, errno.EDQUOT)
# how often a stage reports where no progress bar can be drawn
PLAIN_LINES = 10
# how long the main process has to report an error before another one does
YIELD_SECONDS = 3
ARGUMENTS = "compress.arguments"
CALIBRATING = {name: kind for name, kind in RUNTIME_METHODS.items() if kind.calibrated}
OPEN = {setting for kind in CALIBRATING.values() for setting in kind.calibrated}

T = TypeVar("T")
logger = logging.getLogger("compress")


class _Verbs(TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)  # what several processes are started with
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except USER_ERRORS as error:
            _fail(error, USAGE)
        except OSError as error:
            _fail(error, FAILURE)
        except (MemoryError, RuntimeError) as error:  # torch has no class of its own on a CPU
            text = str(error) or ("out of memory" if isinstance(error, MemoryError) else "")
            lines = text.splitlines()
            reasons = [
                line for line in lines if "out of memory" in line or "not enough memory" in line
            ]
            if not reasons:
                raise
            error.args = (f"{reasons[0]}; lower the batch, or what is read or drawn",)
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
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Device = Annotated[
    str | None, typer.Option(help="Device, such as cpu or cuda:1. Default: CUDA if there is any.")
]
Processes = Annotated[
    int,
    typer.Option(
        min=1, max=MOST_PROCESSES, help="Number of processes on this machine that share the work."
    ),
]
Model = Annotated[str, typer.Argument(help="A checkpoint folder, builtin:NAME or a hub id.")]
Output = Annotated[Path | None, typer.Option(help="Folder to write; the recipe's own by default.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue where a run stopped.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what compress wrote into the folder.")
]


def _print_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"compress {version('compress-models')}")
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings only.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    os.environ.update(launch.adopt_slurm(os.environ))
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


@app.command()
def run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be repeated."),
    ] = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Predict the result; write nothing.")
    ] = False,
    as_json: Json = False,
    device: Device = None,
    processes: Processes = 1,
) -> None:
    """Compress, recover, export, evaluate and report, as a recipe says."""
    _check_resume(resume, overwrite)
    from compress.runs.recipe import load_recipe

    typed = load_recipe(recipe, overrides or ())
    several = launch.needed(processes)
    folder = Path(output or typed.output or "")
    if not dry_run and not launch.rank():  # before torch is imported, which takes seconds
        inputs = inputs_of(typed)
        if Path(recipe).is_file() and not resume:
            inputs["recipe"] = recipe
        check_apart(folder, inputs)
        check_target(folder, resume=resume, overwrite=overwrite)
    _begin()
    if dry_run:
        from compress.runs.forecast import dry_run as predict

        prediction = predict(typed, device=device)
        _print(prediction, as_json, _lines(prediction))
        if prediction["problems"]:
            raise typer.Exit(USAGE)
        return
    with _resume_hint(context, folder):
        if several:
            launch.launch(processes, context.meta[ARGUMENTS])
            return
        from compress.runs.run import run_events

        _follow(run_events(typed, output=folder, resume=resume, overwrite=overwrite, device=device))
    if not launch.rank():
        _print_run(folder, as_json)


def _check_resume(resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("expected --resume or --overwrite; got both; choose one")


@contextlib.contextmanager
def _resume_hint(
    context: typer.Context, folder: Path, kept: Sequence[str] = PROGRESS
) -> Iterator[None]:
    """Say how to continue after Ctrl-C, SIGTERM, a full disk, or the end of another process.

    Parameters
    ----------
    context : of the command.
    folder : that it writes.
    kept : names of which one is there where something can be continued.
    """

    def stop(number: int, _frame: Any) -> None:
        raise launch.Stopped(f"stopped by {signal.Signals(number).name}", launch.TERMINATED)

    def way() -> list[str]:
        if not any((folder / name).exists() for name in kept):
            return []
        arguments = [a for a in context.meta[ARGUMENTS] if a not in ("--overwrite", "--resume")]
        return [f"continue with: compress {shlex.join([*arguments, '--resume'])}"]

    def explain(what: str) -> None:
        if launch.reports_the_end():
            _say("; ".join([what, *way()]))

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        explain("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except launch.Stopped as error:
        explain(f"error: {error}")
        raise typer.Exit(error.code) from None
    except OSError as error:
        if error.errno in FULL:
            for note in way():
                error.add_note(note)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@app.command()
def show(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a finished run or evaluation.")
    ],
    as_json: Json = False,
) -> None:
    """Print the metrics of a finished run, or of an evaluation of a reader."""
    _print_run(folder, as_json)


@app.command()
def compare(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs or evaluations.")
    ],
    plot: Annotated[Path | None, typer.Option(help="PNG file to draw the comparison to.")] = None,
    as_json: Json = False,
) -> None:
    """Put several runs into one table, and one plot."""
    from compress.reports.comparison import compare as compare_runs

    comparison = compare_runs(folders)
    for difference in comparison.differences if as_json else ():
        _say(f"note  {difference}: no run is marked as the best")
    if plot:
        _say(f"plot  {comparison.plot(plot)}")
    _print(comparison.rows, as_json, comparison.to_text())


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes that ship with compress."""
    from compress.runs.recipe import list_recipes

    listed = list_recipes()
    width = max(len(name) for name, _ in listed)
    rows = [{"name": name, "about": about} for name, about in listed]
    _print(rows, as_json, "\n".join(f"{name:<{width}}  {about}" for name, about in listed))


@app.command("eval")
@options_of(Sampling, Columns, OcrEvaluation, renamed={Columns: "{}_column"})
def evaluate(
    context: typer.Context,
    model: Model,
    options: dict[str, Any],
    suite: Annotated[
        str | None, typer.Option(help="diffusion or ocr; by default what the model is.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Real images (default builtin:digits), or pages: builtin:pages, "
            "builtin:square-pages or a folder."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Readers only: folder of predictions and report.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    device: Device = None,
    processes: Processes = 1,
) -> None:
    """Measure a diffusers pipeline or a reader of pages, compressed or not."""
    kinds = {"diffusion": "diffusion", "ocr": "reader", None: None}
    if suite not in kinds:
        raise ValueError(f"expected --suite diffusion or ocr; got {suite}; choose one")
    _check_resume(resume, overwrite)
    _begin()
    from compress.models.locate import locate

    at = locate(model, kinds[suite])  # type: ignore[arg-type]
    of_readers = {"--output": output, "--resume": resume, "--overwrite": overwrite}
    if at.kind != "reader" and (unused := [name for name, value in of_readers.items() if value]):
        raise ValueError(
            f"only readers take {', '.join(unused)}, for the texts that they read; {model} is a "
            "pipeline; leave it out, and write the metrics with --json > metrics.json"
        )
    several = launch.needed(processes)
    if several and at.kind != "reader":
        launch.launch(processes, context.meta[ARGUMENTS])
        return
    if at.kind == "reader":
        from compress.runs.evaluation import evaluate_events

        settings = validated(OcrEvaluation, {"unseen_font": True} | options, "readers of pages")
        folder = output or Path("runs") / f"eval_{at.folder.name}"
        events = evaluate_events(
            at, folder, settings, data=data, resume=resume, overwrite=overwrite, device=device
        )
        with _resume_hint(context, folder):
            if several:
                launch.launch(processes, context.meta[ARGUMENTS])
                return
            _follow(events)
        if launch.rank():
            return
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf8"))["metrics"]
    else:
        from compress.runs.diffusion import BUILTIN_DATA, evaluate_pipeline

        columns = {name: options.pop(f"{name}_column", None) for name in Columns.model_fields}
        metrics = evaluate_pipeline(
            at,
            validated(Sampling, options, "diffusion pipelines"),
            data=data or BUILTIN_DATA,
            columns=Columns(**{name: value for name, value in columns.items() if value}),
            device=device,
        )
    if launch.rank():
        return
    _print(metrics, as_json, _metrics_table(metrics))


@app.command()
@options_of(ReadSettings, PageFiles)
def read(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Images, PDFs, .tar shards, folders of them, .jsonl lists of paths, hub:NAME.",
        ),
    ],
    options: dict[str, Any],
    model: Annotated[
        str, typer.Option(help="A folder, builtin:NAME or a hub id.")
    ] = "builtin:reader-qwen",
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the texts, as JSON lines, instead of stdout."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    device: Device = None,
    processes: Processes = 1,
) -> None:
    """Print the text of page images and PDFs, or write it to files."""
    files = validated(PageFiles, taken(options, PageFiles))
    settings = validated(ReadSettings, options)
    _check_resume(resume, overwrite)
    several = launch.needed(processes)
    for_folders = {
        "--resume": resume,
        "--overwrite": overwrite,
        "--processes": several or launch.launched(),
        "--batch-tokens": files.batch_tokens,
        "--markdown": files.markdown,
        "--workers": "workers" in files.model_fields_set,
    }
    if output is None and (unused := [name for name, value in for_folders.items() if value]):
        raise ValueError(f"{', '.join(unused)} is for the folder of --output; name it")
    _begin()
    from compress.runs import reading

    if output is not None:
        with _resume_hint(context, output, (MARKER,)):
            if several:
                launch.launch(processes, context.meta[ARGUMENTS])
                record = reading.record_of(output)
            else:
                events = reading.read_to_folder(
                    model,
                    sources,
                    output,
                    settings,
                    files,
                    resume=resume,
                    overwrite=overwrite,
                    device=device,
                )
                record = _follow(events)
        if launch.reports_the_end():
            _print_record(record, output, as_json)
        # a launcher would take a code of its own for the end of the job
        if record.failed and not launch.launched():
            raise typer.Exit(FAILURE if record.done else USAGE)
        return
    from compress.data.page_files import find_pages

    pages = list(find_pages(sources, files.pages, files.dpi))
    rows = []
    for page, read_text in reading.read_files(
        model, pages, settings, batch=files.batch, device=device
    ):
        facts = {"text": read_text.text, "error": read_text.error, "loop": read_text.loop}
        rows.append({"page": page.name, **facts})
        if read_text.loop:
            _say(f"warning: {page.name} was stopped: its text ends in a loop")
        if read_text.error:
            _say(f"error: {read_text.error}")
        elif not as_json:
            name = f"== {one_line(page.name)}\n"
            typer.echo(f"{name}{read_text.text}\n" if len(pages) > 1 else read_text.text)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    failed = sum(row["error"] is not None for row in rows)
    if failed:
        if len(rows) > 1:
            _say(f"error: {failed} of {len(rows)} pages could not be read")
        raise typer.Exit(FAILURE if failed < len(pages) else USAGE)


def _print_record(record: "Record", output: Path, as_json: bool) -> None:
    _say(f"{len(record.done)} texts in {output}")
    if record.failed:
        pages = len(record.failed) + len(record.done)
        _say(f"error: {len(record.failed)} of {pages} pages could not be read; their rows say why")
    if as_json:
        counts = {"folder": str(output), "read": len(record.done), "failed": record.failed}
        typer.echo(json.dumps(counts, indent=2))


@app.command()
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    device: Device = None,
) -> None:
    """Serve a reader with the methods of its checkpoint, by OpenAI's protocol."""
    _begin()
    from compress.runs.serving import application

    served = application(model, device)
    with extra("serve", "a server"):
        import uvicorn

    uvicorn.run(served, host=host, port=port)


@app.command()
def pages(
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    layout: Annotated[
        str, typer.Option(help="Layout of the folder: omnidocbench or olmocr.")
    ] = "omnidocbench",
    difficulty: Annotated[
        str, typer.Option(help="Kind of page: page, square or document.")
    ] = "document",
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Number of pages.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the pages' content.")] = 0,
    split: Annotated[str, typer.Option(help="Split: train, validation or test.")] = "test",
    overwrite: Overwrite = False,
) -> None:
    """Render pages with exact ground truth, in the layout of a benchmark."""
    from compress.data.page_folders import write_rendered_pages

    write_rendered_pages(output, layout, difficulty, count, seed, split, overwrite=overwrite)
    _say(f"{count} pages in {output}; compress eval MODEL --data {output}")


@app.command()
@options_of(Calibration, ReadSettings, *CALIBRATING.values(), exclude=("name", "mode", *OPEN))
def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, builtin:NAME or a hub id.")],
    output: Annotated[Path, typer.Option(help="Folder of the checkpoint to write.")],
    options: dict[str, Any],
    method: Annotated[
        str, typer.Option(help=f"Method to calibrate: {', '.join(CALIBRATING)}.")
    ] = next(iter(CALIBRATING)),
    data: Annotated[
        str, typer.Option(help="Pages: builtin:pages, builtin:square-pages or a folder.")
    ] = "builtin:pages",
    overwrite: Overwrite = False,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Measure a method's open settings on pages, and write a checkpoint with them."""
    if method not in CALIBRATING:
        raise ValueError(f"--method should be one of {', '.join(CALIBRATING)}; got {method!r}")
    calibration = validated(Calibration, taken(options, Calibration))
    settings = validated(ReadSettings, taken(options, ReadSettings))
    typed = validated(CALIBRATING[method], options, method)
    _begin()
    from compress.runs.reader import calibrated_checkpoint

    result = calibrated_checkpoint(
        model,
        output,
        typed,
        data=data,
        calibration=calibration,
        read=settings,
        device=device,
        overwrite=overwrite,
    )
    lines = [*result.lines, f"checkpoint   {output}"]
    _print(result.facts, as_json, "\n".join(lines))


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A method, kernels, or reading.")],
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="KEY=VALUE,...",
            help="Sizes to time, such as visual=4096,batch=8; may be repeated.",
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Timed calls of each way.")
    ] = None,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: CPU time of one thread, for a machine that is shared."),
    ] = "wall",
    results: Annotated[Path | None, typer.Option(help="File to append the rows to.")] = None,
    crossover: Annotated[
        Path | None,
        typer.Option(help="New file for the sizes from which on the method is faster."),
    ] = None,
    as_json: Json = False,
    device: Device = None,
) -> None:
    """Time a method, the kernels, or whole folders of pages against the dense way, in one run."""
    _begin()
    from compress.bench.cells import describe
    from compress.bench.suite import bench as rows_of
    from compress.runs.bench_reading import all_benchmarks

    known = all_benchmarks()
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}; got {name!r}; choose one")
    rows, cells = [], []
    for row in rows_of(
        known[name],
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
    header = ("benchmark", "shape", "median [p20, p80] ms", "result")
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
    _begin()
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
        write_text(path.resolve(), fill(text, rendered))
    typer.echo("\n\n".join(f"## {name}\n\n{text}" for name, text in rendered.items()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, devices, disk, cache and the built-in models."""
    from dataclasses import asdict

    from compress.doctor import examine

    checks = examine()
    lines = []
    for check in checks:
        mark = "ok  " if check.ok else ("FAIL" if check.required else "warn")
        hint = f"; {check.hint}" if check.hint else ""
        lines.append(f"{mark}  {check.name:<22} {check.found}{hint}")
    _print([asdict(check) for check in checks], as_json, "\n".join(lines))
    broken = [check.name for check in checks if check.required and not check.ok]
    if broken:
        _say(f"error: broken: {', '.join(broken)}")
        raise typer.Exit(FAILURE)


def main() -> None:
    """Entry point of the commands `compress` and `compress-models`."""
    app()


def _say(text: str) -> None:
    # names that come from files may hold anything
    typer.echo("\n".join(map(one_line, text.split("\n"))), err=True)


def _fail(error: Exception, code: int) -> None:
    if os.environ.get("COMPRESS_DEBUG"):
        raise error
    if launch.rank() or (isinstance(error, ConnectionError) and not launch.reports_the_end()):
        # an error that all processes have is reported by the main one, and the launcher ends this
        time.sleep(YIELD_SECONDS)
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        # without the number that OSError puts first
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = "; ".join([text, *getattr(error, "__notes__", ())])
    _say(f"error: process {launch.rank()}: {text}" if launch.rank() else f"error: {text}")
    raise typer.Exit(code) from None


class _StderrHandler(logging.Handler):
    """Each message as one line, as it is."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(one_line(record.getMessage()))


def _begin() -> None:
    """Refuse packages of other versions, and hide what a user can do nothing about."""
    from compress.doctor import versions

    wrong = [check for check in versions() if not check.ok]
    if wrong:
        _say("error: packages outside the supported ranges:")
        for check in wrong:
            _say(f"  {check.name} {check.found}; {check.hint}")
        raise typer.Exit(FAILURE)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    # torch.utils.data warns about pinned memory wherever there is no GPU
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
    if launch.rank():
        # the main process says it
        warnings.simplefilter("ignore")


def _follow(events: Generator["Event", None, T]) -> T:
    """Show progress on stderr: bars on a terminal, a line now and then elsewhere."""
    results: list[T] = []

    def kept() -> Iterator["Event"]:
        results.append((yield from events))

    _show(kept())
    return results[0]


def _show(events: Iterable["Event"]) -> None:
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
                    one_line(f"{event.stage}: {event.message}"), markup=False, highlight=False
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

    metrics = read_metrics(folder)
    report = f"report      {folder / 'report.html'}"
    if not any("compressed" in entry for entry in metrics["metrics"].values()):
        text = f"{_metrics_table(metrics['metrics'])}\n\n{report}"
        _print({"folder": str(folder), **metrics}, as_json, text)
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
        for name, entry in metrics["metrics"].items()
    ]
    lines = [_table([header, *rows]), ""]
    if "comparison" in metrics:
        lines += [_variants_table(metrics), ""]
    widths = [f"{w['level']}: {w['dense']} -> {w['compressed']}" for w in metrics.get("widths", [])]
    lines += [f"widths      {', '.join(widths)}"] if widths else []
    for name, value in metrics.get("floor", {}).items():
        lines.append(f"floor       {name} {value:.4g} between the two halves of the real data")
    lines += [f"warning     {warning}" for warning in metrics.get("warnings", [])]
    lines += [f"checkpoint  {folder / 'checkpoint'}", report]
    everything = {"folder": str(folder), "checkpoint": str(folder / "checkpoint"), **metrics}
    _print(everything, as_json, "\n".join(lines))


def _metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of one model."""
    rows = [(name, _interval(entry), str(entry["n"])) for name, entry in metrics.items()]
    return _table([("metric", "value", "n"), *rows])


def _variants_table(metrics: Mapping[str, Any]) -> str:
    """What a run on a reader compared, a line for each variant."""
    from compress.reports.run_folder import keep_text, measure, series_name, used_text

    accuracy = metrics["accuracy"]
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
        for row in metrics["comparison"]
    ]
    retention = f"retention ({accuracy})"
    return _table([("variant", "method", "keep", "visual tokens used", retention, metric), *rows])


def _interval(entry: Mapping[str, Any] | None) -> str:
    """A value with its 95% confidence interval."""
    if entry is None or entry["value"] is None:
        return (entry or {}).get("why", "-")
    value, interval = entry["value"], entry["ci95"]
    text = f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else text


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with aligned columns, the first one as their heads; no line is cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in rows[0]:
        table.add_column(Text(head), no_wrap=True)
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _lines(content: Mapping[str, Any]) -> str:
    """A prediction as aligned lines; lists one item a line."""
    width = max(len(name) for name in content)
    lines = []
    for name, value in content.items():
        items = value if isinstance(value, list) else [value]
        shown = [f"{item:,}" if isinstance(item, int | float) else str(item) for item in items]
        lines += [f"{name:<{width}}  {item}" for item in shown or ["none"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

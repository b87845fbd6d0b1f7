"""How ``compress bench`` runs a benchmark: the ceilings of the device, then its shapes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.bench.rows import Row, ceiling_rows, parse_shape
from compress.bench.timing import Bench, measure_ceilings
from compress.common.environment import choose_device
from compress.common.files import append_rows, write_json
from compress.common.output_folder import check_new_file
from compress.eval.tables import read_rows


@dataclass(frozen=True)
class Benchmark:
    """What one name of ``compress bench`` times.

    Attributes
    ----------
    name : of the method, or of what else is timed.
    shape : settings that say what is timed, such as sizes and dtype.
    smallest : the shape for a quick check that it runs, as ``--shape`` takes it.
    default_shapes : those that are timed on a device when none are requested.
    run : (shape, where, ceilings) to rows.
    table : rows without ceilings, each cell once, to Markdown with the note beneath.
    crossovers : rows to a JSON table, by device: from which size on the method is faster.
    repeats : timed calls of each way by default.
    """

    name: str
    shape: type
    smallest: str
    default_shapes: Callable[[str], Sequence[Any]]
    run: Callable[..., Iterator[Row]]
    table: Callable[[Sequence[Row]], str]
    crossovers: Callable[[Sequence[Row]], dict[str, Any]] | None = None
    repeats: int = 15


def bench(
    benchmark: Benchmark,
    *,
    shapes: Sequence[str] = (),
    repeats: int | None = None,
    clock: str = "wall",
    device: str | None = None,
    results: Path | None = None,
    crossover: Path | None = None,
) -> Iterator[Row]:
    """Run a benchmark; the ceilings of the device come first.

    Parameters
    ----------
    benchmark : of :func:`compress.runs.bench_reading.all_benchmarks`.
    shapes : such as "visual=4096,batch=8"; none is the benchmark's own list for the device.
    repeats, clock : see :class:`compress.bench.timing.Bench`.
    device : CUDA where there is any when None.
    results : file of JSON lines to which rows are appended as they are made.
    crossover : new file for the table of crossovers by device, from these rows and the earlier ones
        of the results file.

    Yields
    ------
    Rows, see :func:`compress.bench.rows.make_row`.

    Raises
    ------
    ValueError : for a shape that is none, a device that is not there, a results file that holds
        anything but rows, or a benchmark without crossovers where one is to be written.
    FileExistsError : when the table of crossovers is there.
    """
    if crossover is not None and benchmark.crossovers is None:
        raise ValueError(
            f"a crossover needs a benchmark that measures one; got {benchmark.name}; leave "
            "--crossover out"
        )
    if crossover is not None:
        check_new_file(crossover)
    where = Bench(choose_device(device), repeats or benchmark.repeats, clock)
    sizes: list[Any] = [parse_shape(text, benchmark.shape) for text in shapes]
    sizes = sizes or list(benchmark.default_shapes(where.device))
    rows = read_rows(results) if results is not None else []
    if any("bench" not in row for row in rows):
        raise ValueError(
            f"rows of compress bench are expected in {results}, which holds something else; name "
            "another --results"
        )
    for row in _rows(benchmark, sizes, where):
        rows.append(row)
        if results is not None:
            append_rows(results, row)
        yield row
    if crossover is not None and benchmark.crossovers is not None:
        write_json(crossover, benchmark.crossovers(rows))


def _rows(benchmark: Benchmark, sizes: Sequence[Any], where: Bench) -> Iterator[Row]:
    ceilings = measure_ceilings(where, list(dict.fromkeys(shape.dtype for shape in sizes)))
    yield from ceiling_rows(benchmark.name, ceilings, where)
    for shape in sizes:
        yield from benchmark.run(shape, where, ceilings)

"""``compress bench``: the benchmarks by name, each a stream of rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.bench.rows import Row, ceiling_rows, parse_shapes
from compress.bench.timing import Bench, measure_ceilings
from compress.common.environment import choose_device
from compress.common.files import write_json
from compress.eval.tables import append_row, read_rows
from compress.methods.fastocr.bench import crossovers
from compress.methods.fastocr.crossover import read_table


@dataclass(frozen=True)
class Benchmark:
    """What one name of ``compress bench`` times.

    Attributes
    ----------
    shape : settings that say what is timed, such as sizes and dtype.
    default_shapes : those that are timed on a device when none are asked for.
    run : (shape, where, ceilings) to rows.
    table : rows without ceilings to Markdown, with the note beneath.
    crossovers : rows to a JSON table, by device: from which size on the method is faster.
    """

    shape: type
    default_shapes: Callable[[str], Sequence[Any]]
    run: Callable[..., Iterator[Row]]
    table: Callable[[Sequence[Row]], str]
    crossovers: Callable[[Sequence[Row]], dict[str, Any]] | None = None


# name -> the class of its shapes, in the module of that name
MODULES = {
    "gradflow": "compress.methods.gradflow.bench",
    "rtprune": "compress.methods.rtprune.bench",
    "fastocr": "compress.methods.fastocr.bench",
    "kernels": "compress.bench.kernels",
}
BENCHES = {
    "gradflow": "UNetShape",
    "rtprune": "PrefillShape",
    "fastocr": "DecodeShape",
    "kernels": "KernelShape",
}


def bench(
    name: str,
    *,
    shapes: Sequence[str] = (),
    repeats: int = 15,
    clock: str = "wall",
    device: str | None = None,
    results: Path | None = None,
    crossover: Path | None = None,
) -> Iterator[Row]:
    """Run a benchmark; the ceilings of the device come first.

    Parameters
    ----------
    name : in :data:`BENCHES`.
    shapes : such as "visual=4096,batch=8"; none is the benchmark's own list for the device.
    repeats, clock : see :class:`compress.bench.timing.Bench`.
    device : CUDA where there is any when None.
    results : file of JSON lines to which rows are appended as they are made.
    crossover : of fastocr: table into which the crossover of this device is written, from these
        rows and the earlier ones of the results file.

    Yields
    ------
    Rows, see :func:`compress.bench.rows.make_row`.

    Raises
    ------
    ValueError : for an unknown name, a shape that is none, or a device that is not there.
    """
    if name not in BENCHES:
        raise ValueError(f"expected one of {', '.join(BENCHES)}; got {name!r}; choose one")
    if crossover is not None and name != "fastocr":
        raise ValueError(f"only fastocr has a crossover; got {name}; leave --crossover out")
    where = Bench(choose_device(device), repeats, clock)
    module = import_module(MODULES[name])
    wanted = parse_shapes(shapes, getattr(module, BENCHES[name])) or module.default_shapes(
        where.device
    )
    earlier = read_rows(results) if results is not None else []
    made: list[Row] = []
    for row in _rows(module.run, name, wanted, where):
        made.append(row)
        if results is not None:
            append_row(results, row)
        yield row
    if crossover is not None:
        table = read_table(crossover) if crossover.exists() else {}
        write_json(crossover, table | crossovers([*earlier, *made]))


def _rows(
    run: Callable[..., Iterator[Row]],
    name: str,
    wanted: Sequence[Any],
    where: Bench,
) -> Iterator[Row]:
    dtypes = list(dict.fromkeys(shape.dtype for shape in wanted))
    ceilings = measure_ceilings(where, dtypes)
    yield from ceiling_rows(name, ceilings, where)
    for shape in wanted:
        yield from run(shape, where, ceilings)

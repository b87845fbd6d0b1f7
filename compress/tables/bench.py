"""The tables of the benchmarks, with the ceilings that were measured beside them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from compress.bench.cells import describe
from compress.bench.rows import newest
from compress.bench.suite import Benchmark, bench
from compress.eval.tables import Row
from compress.runs.bench_reading import all_benchmarks
from compress.tables.table import Job, Run, Table, has

CEILINGS = ("copy", "matrix")


def tables(results: Path) -> list[Table]:
    """A table for each benchmark."""
    return [
        Table(
            f"bench_{name}",
            partial(body, benchmark),
            results / f"bench_{name}.jsonl",
            [Job(f"compress bench {name}", has(bench=name), partial(_measure, benchmark))],
            lines,
        )
        for name, benchmark in all_benchmarks().items()
    ]


def _measure(benchmark: Benchmark) -> Run[list[Row]]:
    rows = []
    for row in bench(benchmark):
        rows.append(row)
        yield f"    {'  '.join(describe(row))}"
    return rows


def lines(rows: Sequence[Row]) -> list[Row]:
    """What was measured, as it was measured last, with the sizes beside the results."""
    measured = newest([row for row in rows if row["part"] not in CEILINGS])
    return [row["shape"] | row for row in measured]


def body(benchmark: Benchmark, rows: Sequence[Row]) -> str:
    """The benchmark's own table, and what holds for all benchmarks."""
    measured = lines(rows)
    notes = [benchmark.table(measured), "Times are ms, median [p20, p80], taking turns."]
    if any(row.get("without") for row in measured):
        notes.append(
            "A dash is a dense way that was left out, as what it copies did not fit in memory."
        )
    for device in dict.fromkeys(row["device"] for row in rows):
        best = {"GB/s copying": 0.0}
        for row in rows:
            if row["device"] == device and row["part"] == "copy":
                best["GB/s copying"] = max(row["gb_per_s"], best["GB/s copying"])
            elif row["device"] == device and row["part"] == "matrix":
                unit = f"TFLOP/s ({row['shape']['dtype']})"
                best[unit] = max(row["tflop_per_s"], best.get(unit, 0.0))
        ceilings = ", ".join(f"{value:#.3g} {unit}" for unit, value in best.items())
        notes.append(f"Ceilings measured beside them on {device}: {ceilings}.")
    return " ".join(notes)

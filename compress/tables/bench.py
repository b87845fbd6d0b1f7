"""Tables of the benchmarks, with the ceilings that were measured beside them."""

from collections.abc import Sequence

from compress.bench.rows import Row, newest
from compress.methods.registry import benchmarks

CEILINGS = ("copy", "matrix")
TABLES = tuple(f"bench_{name}" for name in benchmarks())


def render_bench(table: str, rows: Sequence[Row], file: str) -> str:
    """The table of a benchmark, with the ceilings and how it was made beneath.

    What was measured again is there once, as it was measured last.
    """
    measured = newest([row for row in rows if row["part"] not in CEILINGS])
    text = benchmarks()[table.removeprefix("bench_")].table(measured)
    notes = [
        "Times are ms, median [p20, p80], taking turns.",
        *_left_out(measured),
        *_ceilings(rows),
        f"Made by `compress tables {table} --update README.md`; rows in `eval/results/{file}`.",
    ]
    return f"{text} {' '.join(notes)}"


def _left_out(rows: Sequence[Row]) -> list[str]:
    """What a dash says, where there is one."""
    if not any(row["shape"].get("without") for row in rows):
        return []
    return ["A dash is a dense way that was left out, as what it copies did not fit in memory."]


def _ceilings(rows: Sequence[Row]) -> list[str]:
    """The ceilings of each device, the best of those that were measured."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device and row["part"] in CEILINGS]
        copies = [row["gb_per_s"] for row in here if row["part"] == "copy"]
        rates: dict[str, list[float]] = {}
        for row in here:
            if row["part"] == "matrix":
                rates.setdefault(row["shape"]["dtype"], []).append(row["tflop_per_s"])
        said = [f"{max(found):.3g} TFLOP/s ({name})" for name, found in rates.items()]
        if copies:
            said.insert(0, f"{max(copies):.1f} GB/s copying")
        if said:
            lines.append(f"Ceilings measured beside them on {device}: {', '.join(said)}.")
    return lines

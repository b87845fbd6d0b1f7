"""What the tables of benchmarks have in common: cells that say what was measured in a row."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.bench.rows import Row
from compress.eval.tables import Cell, cell_table


def interval(ms: Mapping[str, Any]) -> str:
    """Median and percentiles of times.

    >>> interval({"median": 12.34, "p20": 11.0, "p80": 15.0})
    '12.3 [11.0, 15.0]'
    """
    decimals = 1 if ms["median"] >= 1 else 3
    median, low, high = (f"{ms[name]:.{decimals}f}" for name in ("median", "p20", "p80"))
    return f"{median} [{low}, {high}]"


def where(row: Row) -> str:
    """The device, and how time was taken on it."""
    threads = f", {row['threads']} thread(s)" if row["device"] == "cpu" else ""
    clock = ", CPU time" if row["clock"] == "cpu" else ""
    return row["device"] + threads + clock


def times(way: str) -> Cell:
    """Times of a way; a dash where it was left out."""
    return lambda row: interval(row["ms"][way]) if way in row["ms"] else "–"


def profile(row: Row) -> str:
    """The two operators that take most of our own way's time."""
    [*_, ours] = row["profile"].values()
    return ", ".join(f"`{part['operator']}` {part['share']:.0%}" for part in ours[:2])


def with_note(rows: Sequence[Row], columns: Mapping[str, Cell], note: str) -> str:
    """A table of rows and what it should be read with."""
    return f"{cell_table(rows, columns)}\n\n{note}"


def by_size(rows: Sequence[Row], *sizes: str) -> list[Row]:
    """Rows in the order of their devices and of these sizes."""
    return sorted(rows, key=lambda row: (row["device"], *(row["shape"][size] for size in sizes)))


def describe(row: Row) -> tuple[str, str, str, str]:
    """A row as four cells for a terminal: benchmark, shape, times, and what follows from them."""
    shape = ",".join(f"{key}={value}" for key, value in row["shape"].items() if value is not None)
    ms = "; ".join(f"{name} {interval(spread)}" for name, spread in row["ms"].items())
    return f"{row['bench']} {row['part']}", shape, ms, _results(row)


def _results(row: Row) -> str:
    if row["part"] == "copy":
        return f"{row['gb_per_s']:.1f} GB/s"
    if row["part"] == "matrix":
        return f"{row['tflop_per_s']:.3g} TFLOP/s"
    results = []
    if row.get("ratio"):
        results.append(f"{row['ratio']:.2f}x")
    if row.get("bound"):
        results.append(f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x")
    if "end_to_end" in row:
        results.append(f"end to end {row['end_to_end']:.2f}x")
    if "overhead" in row:
        results.append(f"overhead {row['overhead']:.1%}")
    for name, rate in row.get("tokens_per_second", {}).items():
        results.append(f"{name} {rate:.3g} tokens/s")
    if "pages_per_second" in row:
        results.append(f"{row['pages_per_second']:.3g} pages/s, {row['memory_mb']:,.0f} MB")
    for name, share in row.get("share_of_copy", {}).items():
        results.append(f"{name} {row['gb_per_s'][name]:.1f} GB/s, {share:.0%} of copying")
    if "share_of_rate" in row:
        results.append(f"{row['share_of_rate']:.0%} of the matrix rate")
    return ", ".join(results)

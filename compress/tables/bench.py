"""Rows of the benchmarks as lines for a terminal and as tables in Markdown."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compress.bench.rows import Row, newest
from compress.eval.tables import cell_table
from compress.methods.fastocr.bench import MODELS, crossovers

CEILINGS = ("copy", "matrix")
TABLES = ("bench_gradflow", "bench_rtprune", "bench_fastocr", "bench_kernels")


def describe(row: Row) -> tuple[str, str, str, str]:
    """A row as four cells: benchmark, shape, times, and what was found."""
    shape = ",".join(f"{key}={value}" for key, value in row["shape"].items() if value is not None)
    times = "; ".join(f"{name} {interval(ms)}" for name, ms in row["ms"].items())
    return f"{row['bench']} {row['part']}", shape, times, _found(row)


def _found(row: Row) -> str:
    if row["part"] == "copy":
        return f"{row['gb_per_s']:.1f} GB/s"
    if row["part"] == "matrix":
        return f"{row['tflop_per_s']:.3g} TFLOP/s"
    found = []
    if row.get("ratio"):
        found.append(f"{row['ratio']:.2f}x")
    if row.get("bound"):
        found.append(f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x")
    if "end_to_end" in row:
        found.append(f"end to end {row['end_to_end']:.2f}x")
        found.append(f"selection and merging {row['overhead']:.1%}")
    if "tokens_per_second" in row:
        found += [f"{name} {rate:.3g} tokens/s" for name, rate in row["tokens_per_second"].items()]
    for name, share in row.get("share_of_copy", {}).items():
        found.append(f"{name} {row['gb_per_s'][name]:.1f} GB/s, {share:.0%} of copying")
    if "share_of_rate" in row:
        found.append(f"{row['share_of_rate']:.0%} of the matrix rate")
    return ", ".join(found)


def interval(ms: Mapping[str, Any]) -> str:
    """Median and percentiles of times.

    >>> interval({"median": 12.34, "p20": 11.0, "p80": 15.0})
    '12.3 [11.0, 15.0]'
    """
    decimals = 1 if ms["median"] >= 1 else 3
    return " ".join(
        (f"{ms['median']:.{decimals}f}", f"[{ms['p20']:.{decimals}f}, {ms['p80']:.{decimals}f}]")
    )


def render_bench(table: str, rows: Sequence[Row], file: str) -> str:
    """The table of a benchmark, with the ceilings and how it was made beneath.

    What was measured again is there once, as it was measured last.
    """
    measured = newest([row for row in rows if row["part"] not in CEILINGS])
    text = {
        "bench_gradflow": _gradflow,
        "bench_rtprune": _rtprune,
        "bench_fastocr": _fastocr,
        "bench_kernels": _kernels,
    }[table](measured)
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


def _where(row: Row) -> str:
    threads = f", {row['threads']} thread(s)" if row["device"] == "cpu" else ""
    clock = ", CPU time" if row["clock"] == "cpu" else ""
    return row["device"] + threads + clock


def _markdown(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]], note: str) -> str:
    return f"{cell_table(rows, columns)}\n\n{note}"


def _sorted(rows: Sequence[Row], *sizes: str) -> list[Row]:
    return sorted(rows, key=lambda row: (row["device"], *(row["shape"][size] for size in sizes)))


def _ms(way: str) -> Callable[[Row], str]:
    return lambda row: interval(row["ms"][way]) if way in row["ms"] else "–"


def _rate(way: str) -> Callable[[Row], str]:
    rates = "tokens_per_second"
    return lambda row: f"{row[rates][way]:.3g}" if way in row[rates] else "–"


def _profile(row: Row) -> str:
    """Where our own way's time goes."""
    if "profile" not in row:  # the first rows were made before there were profiles
        return "–"
    [*_, ours] = row["profile"].values()
    return ", ".join(f"`{part['operator']}` {part['share']:.0%}" for part in ours[:2])


def _speed(row: Row) -> str:
    share = row.get("share_of_copy")
    of = "–" if share is None else f"{share['fastocr']:.0%}"
    return f"{row['gb_per_s']['fastocr']:.1f}, {of}"


def _gradflow(rows: Sequence[Row]) -> str:
    return _markdown(
        rows,
        {
            "device": _where,
            "UNet": lambda row: f"{row['shape']['model']}, {row['shape']['dtype']}",
            "batch": lambda row: str(row["shape"]["batch"]),
            "dense": _ms("dense"),
            "slim": _ms("slim"),
            "speed-up": lambda row: f"{row['ratio']:.2f}x",
            "of the MACs' ratio": lambda row: f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x",
            "TFLOP/s, of the matrix rate": lambda row: (
                f"{row['tflop_per_s']:.3g}, {row['share_of_rate']:.0%}"
            ),
            "costliest operators": _profile,
        },
        "One denoising step at full size with random weights, `keep_macs` 0.57; the aim is 80% of "
        "the MACs' ratio.",
    )


def _rtprune(rows: Sequence[Row]) -> str:
    def model(row: Row) -> str:
        shape = row["shape"]
        mode = f", {shape['mode']}" if shape["model"] == "deepseek-ocr" else ""
        return f"{shape['model']}{mode}, {shape['dtype']}"

    def share(row: Row, *parts: str) -> str:
        stages = row["stages"]["rtprune"]
        spent = sum(stages[part]["median"] for part in parts)
        return f"{spent / row['ms']['rtprune']['median']:.1%}"

    return _markdown(
        _sorted(rows, "model", "mode", "batch"),
        {
            "device": _where,
            "model": model,
            "batch": lambda row: str(row["shape"]["batch"]),
            "dense prefill": _ms("dense"),
            "rtprune prefill": _ms("rtprune"),
            "language model": lambda row: f"{row['ratio']:.3f}x",
            "of its bound": lambda row: f"{row['share_of_bound']:.0%} of {row['bound']:.3f}x",
            "end to end": lambda row: f"{row['end_to_end']:.3f}x",
            "possible": lambda row: f"{row['end_to_end_bound']:.3f}x",
            "vision": lambda row: share(row, "vision"),
            "selection": lambda row: share(row, "selection"),
            "merging": lambda row: share(row, "merge"),
            "timed": lambda row: row["timed"],
        },
        "One prefill at 84.25% of the visual tokens, random weights (the reader's own where it is "
        "named). The bound is the ratio of the tokens that the language model reads; `vision`, "
        "`selection` and `merging` are shares of RTPrune's prefill. Aims, on a GPU: 90% of the "
        "bound at batch 16 and more, selection and merging together at most 2%.",
    )


def _fastocr(rows: Sequence[Row]) -> str:
    rows = _sorted(rows, "model", "dtype", "visual", "batch")
    attention = [row for row in rows if row["part"] == "attention"]
    whole = [row for row in rows if row["part"] == "end_to_end"]
    common: dict[str, Callable[[Row], str]] = {
        "device": _where,
        "sizes of": lambda row: f"{row['shape']['model']}, {row['shape']['dtype']}",
        "batch": lambda row: str(row["shape"]["batch"]),
        "visual tokens": lambda row: f"{row['shape']['visual']:,}",
    }
    parts = []
    if attention:
        parts.append(
            _markdown(
                attention,
                {
                    **common,
                    "layers": lambda row: (
                        f"{row['shape']['layers']} of "
                        f"{MODELS[row['shape']['model']]['num_hidden_layers']}"
                    ),
                    "dense, SDPA": _ms("sdpa"),
                    "dense, two products": _ms("matmul"),
                    "fastocr": _ms("fastocr"),
                    "speed-up": lambda row: f"{row['ratio']:.2f}x",
                    "of the byte bound": lambda row: (
                        f"{row['share_of_bound']:.0%} of {row['bound']:.2f}x"
                    ),
                    "GB/s, of copying": _speed,
                    "costliest operators": _profile,
                },
                "Attention of one decode step through these layers, 5% of the visual tokens read, "
                "256 tokens of text, a seventh of the layers focal, the method's own work "
                "included. The speed-up is over the faster dense way; the byte bound is the ratio "
                "of the cached bytes that must be read.",
            )
        )
    if whole:
        parts.append(
            _markdown(
                whole,
                {
                    **common,
                    "layers timed": lambda row: row["timed"],
                    "dense, SDPA": _rate("sdpa"),
                    "dense, two products": _rate("matmul"),
                    "fastocr": _rate("fastocr"),
                    "speed-up": lambda row: f"{row['ratio']:.3f}x",
                    "possible": lambda row: f"{row['bound']:.3f}x",
                },
                "Tokens per second of the whole text model, end to end, with random weights; "
                "possible is the ratio of all bytes that a step must read, weights included. "
                + " ".join(_crossover(device, found) for device, found in crossovers(rows).items()),
            )
        )
    return "\n\n".join(parts)


def _crossover(device: str, found: Mapping[str, Any]) -> str:
    least, most = found["min_visual"], found["measured"][-1]
    if least > most:
        return f"On {device} FastOCR was never faster throughout, up to {most:,} visual tokens."
    return f"On {device} FastOCR is faster from {least:,} visual tokens on."


def _kernels(rows: Sequence[Row]) -> str:
    def sizes(row: Row) -> str:
        shape = row["shape"]
        if row["part"] == "sinkhorn":
            return f"{shape['visual']} tokens a page, {shape['keep']:.2%} kept"
        listed = "" if row["part"] == "focal_decode" else f", {shape['keep']:.0%} read"
        return f"{shape['model']}, {shape['dtype']}, {shape['visual']:,} visual tokens{listed}"

    def ours(row: Row) -> str:
        return f"{row['ours']} {interval(row['ms'][row['ours']])}"

    def others(row: Row) -> str:
        left = (name for name in row["ms"] if name != row["ours"])
        return "; ".join(f"{name} {interval(row['ms'][name])}" for name in left)

    def rate(row: Row) -> str:
        return f"{row['gb_per_s'][row['ours']]:.3g}, {row['share_of_copy'][row['ours']]:.1%}"

    return _markdown(
        rows,
        {
            "device": _where,
            "kernel": lambda row: f"`{row['part']}`",
            "sizes": sizes,
            "batch": lambda row: str(row["shape"]["batch"]),
            "ours": ours,
            "others": others,
            "over the best": lambda row: f"{row['ratio']:.2f}x",
            "possible": lambda row: f"{row['bound']:.2f}x",
            "GB/s, of the byte bound": rate,
            "costliest operators": _profile,
        },
        "One call of each kernel, of one layer where it is attention; `torch` is the plain torch "
        "that stands in for the kernel where no GPU is. `sdpa` and `matmul` attend to the whole "
        "cache; `pot` goes from page to page. The byte bound is the time in which the bytes that a "
        "call cannot do without would be copied; `sinkhorn` is bounded by its exponentials long "
        "before. Aims, on a GPU: `sparse_decode` 60% of the byte bound at batch 32, `sinkhorn` 10x "
        "POT's torch backend.",
    )

"""What the benchmarks do not measure: the machine, profiles, readers and runs; and the summary.

python extra.py env | profile | tune | compiled | reader | touch | summary
python extra.py metrics NAME FOLDER SECONDS RC
"""

import contextlib
import gc
import json
import os
import sys
import time
import traceback
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

OUT, WORK = Path(os.environ["OUT"]), Path(os.environ["GPU_WORK"])
DEVICE, TINY = os.environ["GPU_DEVICE"], os.environ["GPU_TINY"] != "0"
CUDA = DEVICE.startswith("cuda")
END = min(int(os.environ["GPU_END"]), int(os.environ.get("GPU_STAGE_END", "9" * 12)))


def note(name, record):
    """Append a line of JSON in $OUT, and in the work folder for later calls on the machine."""
    for folder in (OUT, WORK / "state"):
        with (folder / name).open("a") as file:
            file.write(json.dumps(record) + "\n")


def read(name, folder=OUT):
    path = folder / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def text(line=""):
    print(line, flush=True)
    with (OUT / "profiles.txt").open("a") as file:
        file.write(line + "\n")


def time_left():
    return END - time.time()


# ---- the machine -------------------------------------------------------------------------------


def env():
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    names = (
        "torch triton transformers diffusers accelerate huggingface-hub tokenizers numpy pot "
        "torch-fidelity torch-pruning pydantic rich typer scipy matplotlib compress-models"
    ).split()
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    record: dict[str, Any] = {
        "machine": True,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "versions": versions,
    }
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
            "capability": torch.cuda.get_device_capability(0),
            "cuda": torch.version.cuda,
        }
    from compress.bench.rows import ceiling_rows
    from compress.bench.timing import Bench, measure_ceilings
    from compress.common.files import append_rows

    where = Bench(DEVICE, repeats=2 if TINY else 15)
    ceilings = measure_ceilings(where, ["float32"] if TINY else ["bfloat16", "float32"])
    for row in ceiling_rows("kernels", ceilings, where):
        append_rows(OUT / "rows.jsonl", row)
    record |= {
        "copy_gb_per_s": round(ceilings.copy, 1),
        "tflop_per_s": {k: round(v, 1) for k, v in ceilings.rate.items()},
    }
    if CUDA:
        record |= launch_costs(torch)
    note("stages.jsonl", record)
    print(json.dumps(record, indent=1))


def launch_costs(torch):
    """Microseconds of the host for a call: an operator of torch, and kernels of Triton."""
    from torch.nn.functional import scaled_dot_product_attention

    from compress.kernels import sparse_decode as kernels

    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.zeros(8, device=DEVICE)
    q, kv = torch.randn(1, 28, 1, 128, **options), torch.randn(1, 4, 512, 128, **options)
    rows = torch.arange(64, device=DEVICE)[None]
    mask = torch.ones_like(rows, dtype=torch.bool)
    ways = {
        "torch_add_": lambda: x.add_(1),
        "sparse_decode": lambda: kernels.sparse_decode(
            q, kv, kv, rows, mask, (448, 512), None, 0.1
        ),
        "focal_decode": lambda: kernels.focal_decode(q, kv, kv, None, 0.1),
        "sdpa": lambda: scaled_dot_product_attention(q, kv, kv, enable_gqa=True),
    }
    costs = {}
    for name, way in ways.items():
        for _ in range(20):
            way()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(300):
            way()
        costs[name] = round((time.perf_counter() - begin) / 300 * 1e6, 1)
        torch.cuda.synchronize()
    return {"host_us": costs}


# ---- profiles ----------------------------------------------------------------------------------


def profiled(title, step, steps=5):
    """Time on the host, time on the GPU, kernels, gaps, what waits; and of a CUDA graph."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def wait():
        if CUDA:
            torch.cuda.synchronize()

    record = {"what": title}
    with torch.no_grad():
        for _ in range(3):
            step()
        wait()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        enqueued = time.perf_counter() - begin
        wait()
        whole = time.perf_counter() - begin
        record |= {"wall_ms": whole / steps * 1e3, "host_ms": enqueued / steps * 1e3}
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
        with profile(activities=kinds) as profiler:
            for _ in range(2):
                step()
            wait()
        if CUDA:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                step()
                torch.cuda.set_sync_debug_mode("default")
            waits = Counter(
                f"{Path(w.filename).name}:{w.lineno}"
                for w in caught
                if "synchroniz" in str(w.message)
            )
            record["waits"] = dict(waits.most_common(12))
    events = profiler.events()
    on_gpu = [
        e for e in events if "CUDA" in str(e.device_type) and e.time_range.end > e.time_range.start
    ]
    spans = sorted((e.time_range.start, e.time_range.end) for e in on_gpu)
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    record |= {"gpu_busy_ms": busy / 2e3, "kernels": len(on_gpu) / 2}
    record["gpu_share"] = record["gpu_busy_ms"] / record["wall_ms"]
    by_name: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in on_gpu:
        by_name[event.name] += (event.time_range.end - event.time_range.start) / 2e3
        counts[event.name] += 1
    record["top"] = [
        [name[:90], round(ms, 4), counts[name] / 2] for name, ms in by_name.most_common(14)
    ]
    averages = profiler.key_averages()
    host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:10]
    record["host_top"] = [
        [e.key[:60], round(e.self_cpu_time_total / 2e3, 4), e.count / 2] for e in host
    ]
    calls = {
        e.key: e.count / 2
        for e in averages
        if e.key.startswith(("cuda", "cu")) or "local_scalar" in e.key or e.key == "aten::nonzero"
    }
    record["calls"] = calls
    text(f"\n== {title}")
    text(_profile_line(record))
    if record.get("waits"):
        text(f"waits for the GPU at {record['waits']}")
    text(f"calls {calls}")
    for name, ms, count in record["top"]:
        text(f"  {ms:9.4f} ms  {count:6.0f} x  {name}")
    text("  on the host:")
    for name, ms, count in record["host_top"]:
        text(f"  {ms:9.4f} ms  {count:6.0f} x  {name}")
    note("profiles.jsonl", record)
    return record


def _profile_line(record):
    return (
        f"wall {record['wall_ms']:.3f} ms, host {record['host_ms']:.3f} ms, "
        f"GPU busy {record['gpu_busy_ms']:.3f} ms ({record['gpu_share']:.0%}), "
        f"{record['kernels']:.0f} kernels, {sum(record.get('waits', {}).values())} waits"
    )


def graphed(title, ways):
    """Each way as the replay of a graph, beside the same eagerly: what Python costs."""
    import torch

    from compress.bench.timing import _captured
    from compress.eval.latency import taking_turns

    if not CUDA:
        return
    eager = {n: v.median for n, v in taking_turns(ways, DEVICE, repeats=7).items()}
    captured = _captured(ways)
    replayed = None
    if captured:
        replayed = {n: v.median for n, v in taking_turns(captured, DEVICE, repeats=7).items()}
    record = {"what": f"{title}: eager and as graphs, ms", "eager_ms": eager, "graph_ms": replayed}
    text(f"\n== {record['what']}\neager  {eager}\ngraphs {replayed or 'cannot be captured'}")
    note("profiles.jsonl", record)
    del captured
    torch.cuda.synchronize()


def attempt(function, *args):
    """One part of a stage; its failure is noted and costs itself only."""
    try:
        function(*args)
    except Exception as error:
        traceback.print_exc()
        note(
            "profiles.jsonl",
            {
                "what": f"{function.__name__}{args}",
                "error": f"{type(error).__name__}: {error}"[:400],
            },
        )
        if "CUDA error" in str(error):
            raise
    gc.collect()
    if CUDA:
        import torch

        torch.cuda.empty_cache()


def decode_step(model, visual, batch):
    from compress.methods.fastocr.bench import DecodeShape, _end_to_end_ways

    dtype: Literal["float32", "bfloat16"] = "float32" if TINY else "bfloat16"
    shape = DecodeShape(part="end_to_end", model=model, visual=visual, batch=batch, dtype=dtype)
    title = f"decode step, {model}, {visual} visual tokens, batch {batch}"
    with contextlib.ExitStack() as stack:
        ways = _end_to_end_ways(shape, DEVICE, stack)
        for name in ("fastocr", "sdpa"):
            profiled(f"{title}: {name}", ways[name])
        graphed(title, {n: w for n, w in ways.items() if n != "head"})


def prefill(mode, batch):
    from compress import RTPrune
    from compress.bench.timing import Bench, Marks
    from compress.methods.rtprune.bench import PrefillShape, _inputs, _model, _prefill

    sizes = {"model": "reader-deepseek"} if TINY else {"mode": mode, "dtype": "bfloat16"}
    shape = PrefillShape(batch=batch, **sizes)
    model = _model(shape, DEVICE)
    inputs = _inputs(shape, model, DEVICE)
    method = RTPrune(keep_tokens=shape.keep_tokens)
    for name, way in (("rtprune", method), ("dense", None)):
        profiled(
            f"prefill, {shape.model} {mode}, batch {batch}: {name}",
            lambda way=way: _prefill(shape, model, inputs, way, {}, "x", Marks(Bench(DEVICE, 1))),
            steps=3,
        )


def generation(model_name, visual, batch, new=48, compiled=False):
    """``model.generate``: milliseconds a token, dense and with FastOCR.

    With transformers' growing cache, which copies all keys and values at every step, and with a
    static one; ``compiled`` is what transformers does with a static one, and FastOCR cannot.
    """
    import torch

    from compress import FastOCR
    from compress.bench.building import built
    from compress.methods.fastocr.bench import DecodeShape, _model

    dtype: Literal["float32", "bfloat16"] = "float32" if TINY else "bfloat16"
    shape = DecodeShape(model=model_name, visual=visual, batch=batch, text=16, dtype=dtype)
    model = built(lambda: _model(shape), getattr(torch, dtype), DEVICE)
    method = FastOCR(
        keep_visual=shape.keep_visual,
        focal_layers=shape.focal,
        dense_layers="none",
        min_fixation=0,
        min_visual=0,
    )
    side = 2 * round(visual**0.5)
    ids = torch.full((batch, visual + 18), 7, device=DEVICE)
    ids[:, 0], ids[:, 1 : visual + 1], ids[:, visual + 1] = 4, 2, 5
    kinds = (ids == 2).int()
    pixels = torch.randn(batch * side * side, 1176, device=DEVICE, dtype=getattr(torch, dtype))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, side, side]] * batch, device=DEVICE),
    }
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def seconds(count, more):
        if CUDA:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, **options, **more)
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    ms, prefill_seconds = {}, 0.0
    with torch.no_grad():
        if compiled:
            seconds(1, {})
            prefill_seconds = seconds(1, {})
        static = {"cache_implementation": "static", "disable_compile": not compiled}
        ways = (
            [("sdpa compiled", static)]
            if compiled
            else [
                ("sdpa", {}),
                ("fastocr", {}),
                ("sdpa static", static),
                ("fastocr static", {"cache_implementation": "static"}),
            ]
        )
        for name, more in ways:
            context = method.attach(model) if "fastocr" in name else contextlib.nullcontext()
            with context:
                # a static cache has as many rows as tokens are requested: the same number each time
                seconds(new, more)
                if "static" in name or compiled:
                    long = min(seconds(new, more) for _ in range(2))
                    ms[name] = (long - prefill_seconds) / (new - 1) * 1e3
                else:
                    ms[name] = (
                        min(seconds(new, more) - seconds(2, more) for _ in range(2))
                        / (new - 2)
                        * 1e3
                    )
                    prefill_seconds = min(seconds(1, more) for _ in range(2))
    record = {
        "what": f"generate, {model_name}, {visual} visual tokens, batch {batch}: ms a token",
        "ms": ms,
    }
    text(f"\n== {record['what']}\n{ms}")
    note("profiles.jsonl", record)


def profile_all():
    if TINY:
        attempt(decode_step, "tiny", 64, 2)
        attempt(prefill, "tiny", 1)
        attempt(generation, "tiny", 64, 2, 6)
        attempt(generation, "tiny", 64, 2, 6, True)
        return
    for function, args in (
        (decode_step, ("qwen2.5-vl-3b", 16384, 1)),
        (prefill, ("large", 1)),
        (decode_step, ("qwen2.5-vl-7b", 16384, 8)),
        (generation, ("qwen2.5-vl-3b", 4096, 1)),
        (prefill, ("large", 16)),
        (decode_step, ("qwen2.5-vl-3b", 4096, 32)),
        (generation, ("qwen2.5-vl-3b", 4096, 8)),
    ):
        if time_left() < 15:
            print(f"no time left for {function.__name__}{args}")
            return
        attempt(function, *args)


# ---- tiles and splits of the kernels -----------------------------------------------------------


def tune():
    """Time the kernels with other tiles and splits than the table and the model choose."""
    import torch

    from compress.kernels import sparse_decode as kernels

    multiprocessors = kernels._multiprocessors(torch.device(DEVICE))
    choose = kernels.tile_and_splits
    fastest: dict[Any, Any] = {}
    sizes = ((64, 4, 3), (32, 4, 3), (16, 4, 3), (64, 8, 3), (64, 4, 2), (128, 4, 2))
    tiles = [kernels.Tile(*size, 1) for size in sizes]
    seven_b = [(28, 4, *size) for size in ((16384, 32), (16384, 20), (4096, 8), (16384, 1))]
    cases = [*seven_b, (16, 2, 16384, 32), (16, 2, 4096, 1)]
    if TINY:
        tiles, cases = tiles[:2], [(4, 2, 64, 2)]
    for case in cases:
        heads, kv, visual, batch = case
        ways, moved, read = tuned_ways(kernels, *case)
        for kind, way in ways.items():
            shipped = choose(batch * kv, read[kind], 2, 128, multiprocessors)
            counts = sorted({1, 2, 3, 8, 33, shipped[1]})
            for tile, splits in [shipped, *((t, n) for t in tiles for n in counts)]:
                if time_left() < 8:
                    break
                kernels.tile_and_splits = lambda *sizes, chosen=(tile, splits): chosen
                kernels._launch.cache_clear()
                name = f"{tile.rows} rows, {tile.warps} warps, {tile.stages} stages"
                record: dict[str, Any] = {
                    "what": f"tune {heads}/{kv} heads, {visual} visual, batch {batch}: {name}, "
                    f"{splits} splits"
                }
                try:
                    us = graph_us(way)
                    record[kind] = {"us": round(us, 2), "gb_per_s": round(moved[kind] / us / 1e3)}
                    best = fastest.get((case, kind), (us, tile, splits))
                    fastest[case, kind] = min(best, (us, tile, splits))
                except Exception as error:  # too much shared memory, for one
                    if "CUDA error" in str(error):
                        raise
                    record[kind] = f"{type(error).__name__}: {error}"[:160]
                text(f"{record['what']}: {kind} {record[kind]}")
                note("profiles.jsonl", record)
    kernels.tile_and_splits = choose
    for (case, kind), (us, tile, splits) in fastest.items():
        text(f"fastest for TILES[2, 128], {kind} {case}: {tile[:3]}, {splits} splits, {us:.1f} us")


def tuned_ways(kernels, heads, kv, visual, batch):
    """The kernels over a few layers' caches, the bytes they move, and the rows a head reads."""
    import torch

    length, dim, layers = visual + 256, 128, 2 if TINY else 4
    options: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    caches = [
        [torch.randn(batch, kv, length, dim, **options) for _ in ("key", "value")]
        for _ in range(layers)
    ]
    query = torch.randn(batch, heads, 1, dim, **options)
    kept = -(-visual // 20)
    rows = torch.rand(batch, visual, device=DEVICE).topk(kept, dim=1).indices.int()
    sparse_decode = kernels.sparse_decode if CUDA else kernels.sparse_decode_reference
    focal_decode = kernels.focal_decode if CUDA else kernels.focal_decode_reference

    def sparse():
        for key, value in caches:
            sparse_decode(query, key, value, rows, None, (visual, length), None, 0.1)

    def focal():
        for key, value in caches:
            focal_decode(query, key, value, None, 0.1)

    sizes = {"batch": batch, "heads": heads, "kv_heads": kv, "dim": dim, "itemsize": 2}
    moved = {
        "sparse": layers * kernels.bytes_moved(**sizes, picked=kept, dense=length - visual),
        "focal": layers * kernels.bytes_moved(**sizes, picked=0, dense=length, focal=True),
    }
    read = {"sparse": kept + length - visual, "focal": length}
    return {"sparse": sparse, "focal": focal}, moved, read


def graph_us(way):
    """Microseconds of a call, as the replay of a graph on a GPU."""
    import torch

    if not CUDA:
        begin = time.perf_counter()
        way()
        return (time.perf_counter() - begin) * 1e6
    for _ in range(2):
        way()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    times = []
    for _ in range(12):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    return sorted(times)[len(times) // 2]


# ---- readers, runs -----------------------------------------------------------------------------


def reader():
    """Compare the texts of the built-in readers on GPU and CPU, dense and with the methods."""
    import torch
    from jiwer import cer

    from compress import FastOCR, RTPrune, apply, load_reader
    from compress.data.ocr_pages import load_pages
    from compress.methods.base import RuntimeMethod

    count = 2 if TINY else 64
    fastocr = FastOCR(
        keep_visual=0.1, min_visual=0, min_fixation=0, dense_layers="none", periphery=64
    )
    rtprune = RTPrune(keep_tokens=0.85)
    both: list[RuntimeMethod] = [
        rtprune,
        FastOCR(keep_visual=0.2, min_visual=0, min_fixation=0, dense_layers="none"),
    ]
    qwen: dict[str, list[RuntimeMethod]] = {"dense": [], "fastocr": [fastocr]}
    deepseek: dict[str, list[RuntimeMethod]] = {"dense": [], "rtprune": [rtprune], "both": both}
    places = [("cpu", torch.float32)]
    if CUDA:
        places += [(DEVICE, torch.float32), (DEVICE, torch.bfloat16)]
    for name, data, variants in (
        ("builtin:reader-qwen", "builtin:pages", qwen),
        ("builtin:reader-deepseek", "builtin:square-pages", deepseek),
    ):
        pages = load_pages(data, count, unseen_font=False).pages
        every = [page.open() for page in pages]
        texts = {}
        for place, dtype in places:
            dense = load_reader(name, dtype=dtype, device=place)
            # with a static cache on a GPU, FastOCR captures its decode steps and transformers
            # compiles those of a dense model
            static: dict[str, list[RuntimeMethod]] = {}
            if place != "cpu":
                captured = {n: m for n, m in variants.items() if n in ("fastocr", "both")}
                static = {f"{n} captured": m for n, m in captured.items()} | {"dense compiled": []}
            images = every[:16] if place == "cpu" else every  # the CPU is the reference alone
            references = [page.text or "" for page in pages[: len(images)]]
            for variant, methods in (variants | static).items():
                kind = "static" if variant in static else None
                dense.model.generation_config.cache_implementation = kind
                key = f"{variant} {place} {str(dtype)[6:]}"
                context: Any = contextlib.nullcontext()
                if methods:
                    context = apply(dense.model, methods, processor=dense.processor)
                with context:
                    if variant in static:
                        dense.read(images, max_new_tokens=8)
                    begin = time.perf_counter()
                    readings = dense.read(images, max_new_tokens=20 if TINY else None)
                    seconds = time.perf_counter() - begin
                texts[key] = [reading.text for reading in readings]
                base = texts[f"{variant.split()[0]} cpu float32"]
                record = {
                    "run": f"{name} {key}",
                    "seconds": round(seconds, 2),
                    "pages_per_second": round(len(images) / seconds, 2),
                    "tokens": sum(reading.new_tokens for reading in readings),
                    "cer": round(cer(references, texts[key]), 4),
                    "same_as_cpu_float32": sum(map(str.__eq__, base, texts[key])),
                    "pages": len(images),
                }
                note("runs.jsonl", record)
                print(json.dumps(record), flush=True)


def metrics(name, folder, seconds, code):
    """Note what a run of a recipe measured."""
    record = {"run": name, "seconds": int(seconds), "rc": int(code)}
    path = Path(folder) / "metrics.json"
    if path.exists():
        measured = json.loads(path.read_text())
        run = measured["run"]
        sides = ("dense", "compressed")
        record |= {
            "device": run["device"],
            "train_seconds": round(run["train_seconds"], 1),
            "metrics": {
                key: {side: value[side]["value"] for side in sides if value.get(side)}
                for key, value in measured["metrics"].items()
            },
            "warnings": measured.get("warnings"),
        }
    note("runs.jsonl", record)
    print(json.dumps(record))


# ---- for compute-sanitizer ---------------------------------------------------------------------


def touch():
    """Launch every kernel on odd shapes."""
    import torch

    from compress.kernels.sinkhorn import sinkhorn
    from compress.kernels.sparse_decode import focal_decode, sparse_decode
    from compress.kernels.summaries import summaries

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for batch, heads, kv, length, dim, picked in (
            (1, 28, 4, 1037, 128, 61),
            (3, 14, 2, 333, 80, 17),
        ):
            query = torch.randn(batch, heads, 1, dim, device=DEVICE, dtype=dtype)
            key, value = (
                torch.randn(batch, kv, length, dim, device=DEVICE, dtype=dtype) for _ in range(2)
            )
            rows = torch.rand(batch, length - 40, device=DEVICE).topk(picked, dim=1).indices
            mask = torch.rand(batch, picked, device=DEVICE) > 0.2
            ranged = torch.rand(batch, 40, device=DEVICE) > 0.2
            groups, dense = 7, (length - 40, length)
            member = torch.randint(groups, (batch, kv, length - 40), device=DEVICE)
            sums = torch.rand(batch, kv, groups, dim, device=DEVICE)
            filled = torch.full((batch, kv, groups), 1.0 * length, device=DEVICE)
            beside = summaries(key, value, rows, rows, mask, member, (sums, sums, filled))
            for extra in (None, beside):
                sparse_decode(query, key, value, rows, mask, dense, ranged, 0.1, extra)
            focal_decode(query, key, value, None, 0.1)
    for most, fewest in ((67, 31), (1000, 156)):  # in one tile, and in several
        scores = torch.rand(3, most, fewest, device=DEVICE)
        used = torch.tensor([[most, 5, 40], [fewest, 31, 7]], device=DEVICE)
        sinkhorn(scores, used[0], used[1], 0.2, 5)
    torch.cuda.synchronize()
    print("every kernel ran")


# ---- the table ---------------------------------------------------------------------------------


def summary():
    """Print a line for each thing that was measured, and for each failure."""
    for lines in (_stages(), _tests(), _rows(), _profiles(), _tuned(), _runs()):
        for line in lines:
            print(line)


def _stages():
    for record in read("stages.jsonl"):
        if "machine" in record:
            names = ("gpu", "multiprocessors", "l2_mb", "copy_gb_per_s", "tflop_per_s", "host_us")
            yield "machine  " + ", ".join(f"{k} {record[k]}" for k in names if k in record)
            packages = ("torch", "triton", "transformers", "diffusers")
            yield "         " + ", ".join(f"{k} {record['versions'][k]}" for k in packages)
        else:
            rest = record.get("skipped") or f"{record['seconds']} s"
            yield f"stage    {record['stage']:<10} rc {record['rc']}  {rest}"


def _tests():
    with contextlib.suppress(FileNotFoundError, ElementTree.ParseError):
        cases = list(ElementTree.parse(OUT / "tests.xml").getroot().iter("testcase"))
        bad = [child for c in cases for child in c if child.tag in ("failure", "error")]
        skipped = sum(c.find("skipped") is not None for c in cases)
        passed = len(cases) - len(bad) - skipped
        yield f"tests    {passed} passed, {len(bad)} failed, {skipped} skipped"
        for child in bad[:12]:
            yield f"         FAILED {child.get('message', '')[:200]}"


def _rows():
    for row in read("rows.jsonl"):
        if row["part"] in ("copy", "matrix"):
            continue
        keys = ("model", "mode", "visual", "batch", "dtype", "layers")
        sizes = " ".join(str(row["shape"][k]) for k in keys if row["shape"].get(k) is not None)
        times = " ".join(f"{n} {ms['median']:.3f}" for n, ms in row["ms"].items())
        results = [f"{row['ratio']:.2f}x, {row['share_of_bound']:.0%} of {row['bound']:.2f}x"]
        shares = row.get("share_of_copy", {})
        results += [f"{n} {shares[n]:.0%} of copy" for n in ("triton", "fastocr") if n in shares]
        if "end_to_end" in row:
            results += [f"end to end {row['end_to_end']:.2f}x", f"overhead {row['overhead']:.1%}"]
        results.append("graphs" if row.get("graphs") else "eager")
        yield f"row      {row['bench']} {row['part']} {sizes}: {times} ms; {', '.join(results)}"
    for record in read("failures.jsonl", WORK / "state"):
        yield f"FAILED   {record['bench']} {record['shape']}: {record['error'][:160]}"


def _profiles():
    for record in read("profiles.jsonl"):
        if "error" in record:
            yield f"FAILED   {record['what']}: {record['error'][:160]}"
        elif "wall_ms" in record:
            yield f"profile  {record['what']}: {_profile_line(record)}"
        elif not record["what"].startswith("tune"):
            rest = {k: v for k, v in record.items() if k != "what"}
            yield f"profile  {record['what']}: {json.dumps(rest)[:260]}"


def _tuned():
    times: dict[str, list[tuple[float, str]]] = {}
    for record in read("profiles.jsonl"):
        for kind in ("sparse", "focal"):
            if record["what"].startswith("tune") and isinstance(record.get(kind), dict):
                case, _, name = record["what"].partition(": ")
                times.setdefault(f"{case}: {kind}", []).append((record[kind]["us"], name))
    for case, measured in times.items():
        us, name = min(measured)
        yield f"{case} {measured[0][0]} us as it ships, {us} us with {name}"


def _runs():
    names = ("fid_digits", "validation_loss", "latency_ms", "images_per_second")
    for record in read("runs.jsonl"):
        scores = record.pop("metrics", {})
        picked = {k: scores[k] for k in names if k in scores}
        yield f"run      {json.dumps(record)[:240]} {json.dumps(picked)[:420] if picked else ''}"


if __name__ == "__main__":
    command, *args = sys.argv[1:]
    commands: dict[str, Callable[..., Any]] = {
        "env": env,
        "profile": profile_all,
        "tune": tune,
        "compiled": lambda: attempt(generation, "qwen2.5-vl-3b", 4096, 1, 48, True),
        "reader": reader,
        "metrics": metrics,
        "touch": touch,
        "summary": summary,
    }
    commands[command](*args)

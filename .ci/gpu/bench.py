"""Rows of `compress bench`, shape by shape: a failure costs its own shape, and time is watched.

    python bench.py PLAN        # kernels, fastocr, rtprune, gradflow or more; see PLANS

The rows are those of `compress bench NAME --results rows.jsonl`, so `compress tables` reads them. A
shape that failed leaves a row with "error" in failures.jsonl of the work folder, and in the log.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

OUT, STATE = Path(os.environ["OUT"]), Path(os.environ["GPU_WORK"]) / "state"
DEVICE, TINY = os.environ["GPU_DEVICE"], os.environ["GPU_TINY"] != "0"
END = min(int(os.environ["GPU_END"]), int(os.environ.get("GPU_STAGE_END", "9" * 12)))
BF16 = "dtype=bfloat16"
CHOICES = [(16384, 1), (16384, 32), (4096, 1), (4096, 8), (4096, 32), (16384, 8)]


def decode(part, visuals, batches=(1, 8, 32), models=("3b", "7b")):
    """Shapes of the benchmark of FastOCR."""
    return [
        ("fastocr", f"part={part},model=qwen2.5-vl-{m},visual={v},batch={b},{BF16}")
        for v in visuals
        for b in batches
        for m in models
    ]


def decode_kernels(kernels, visuals, batches):
    """Shapes of the benchmark of the kernels of a decode step."""
    return [
        ("kernels", f"kernel={k},model=qwen2.5-vl-{m},visual={v},batch={b},{BF16}")
        for k in kernels
        for v in visuals
        for b in batches
        for m in ("7b", "3b")
    ]


def sinkhorn(visual, batch, keep=0.8425):
    """A shape of the benchmark of a kernel."""
    return "kernels", f"kernel=sinkhorn,visual={visual},keep={keep},batch={batch}"


def prefill(mode, batch):
    """A shape of the benchmark of RTPrune."""
    return "rtprune", f"model=deepseek-ocr,mode={mode},batch={batch},{BF16}"


PLANS = {
    "kernels": [
        *decode_kernels(("sparse_decode", "focal_decode"), (16384,), (32, 1)),
        *(sinkhorn(v, b) for v in (400, 256) for b in (1, 16)),
        *(("kernels", f"kernel=top_rows,visual={v},batch={b}") for v, b in CHOICES),
        *decode_kernels(("sparse_decode", "focal_decode", "summaries"), (4096, 16384), (32, 1, 8)),
    ],
    # the aims are for 4096 and 16384 visual tokens; with 1024 it begins to pay
    "fastocr": [
        *decode("attention", (16384, 4096)),
        *decode("end_to_end", (16384,), batches=(32, 8, 1), models=("3b",)),
        *decode("end_to_end", (4096,), batches=(8, 1, 32), models=("3b",)),
        *decode("end_to_end", (16384, 4096), batches=(8, 32, 1), models=("7b",)),
        *decode("end_to_end", (1024,)),
    ],
    "rtprune": [prefill(mode, b) for b in (16, 1) for mode in ("large", "base")],
    "gradflow": [
        *(("gradflow", f"model=ddpm-cifar10,batch={b},{BF16}") for b in (1, 4, 16)),
        *(("gradflow", f"model=sd15,batch={b},{BF16}") for b in (1, 4, 16)),
        *(("gradflow", f"model=ddpm-cifar10,batch={b},dtype=float32") for b in (1, 16)),
        # as those who want speed run them
        *(
            ("gradflow", f"model={m},batch={b},{BF16},layout=channels_last,compiled=default")
            for m, b in (("ddpm-cifar10", 16), ("sd15", 4), ("ddpm-cifar10", 1))
        ),
    ],
    "more": [
        *decode("attention", (8192, 32768)),
        *decode("end_to_end", (8192, 256)),
        # 7B with 32k tokens and batch 32: cache and weights are 78 GB
        *decode("end_to_end", (32768,), batches=(1, 8)),
        *decode("end_to_end", (32768,), batches=(32,), models=("3b",)),
        prefill("large", 32),
        prefill("large", 4),
        sinkhorn(400, 64),
        sinkhorn(400, 16, keep=0.5),
    ],
}
TINY_PLANS = {
    "kernels": [
        ("kernels", "kernel=sparse_decode,model=tiny,visual=64,text=8,batch=2"),
        ("kernels", "kernel=focal_decode,model=tiny,visual=64,text=8,batch=2"),
        ("kernels", "kernel=summaries,model=tiny,visual=64,batch=2"),
        sinkhorn(32, 2),
        ("kernels", "kernel=no_such_kernel"),  # failures are rehearsed as well
    ],
    "fastocr": [
        ("fastocr", f"part={part},model=tiny,visual=64,text=8,batch=2,{BF16}")
        for part in ("attention", "end_to_end")
    ],
    "rtprune": [("rtprune", "model=reader-deepseek,batch=1,text=3")],
    "gradflow": [("gradflow", "model=ddpm-digits,batch=1")],
    "more": [("kernels", "kernel=sparse_decode,model=tiny,visual=128,text=8,batch=1")],
}


def main():
    """Measure what is left of a plan; 3 where CUDA is unusable until the process ends."""
    begun_file = STATE / "shapes.txt"  # neither measured twice nor failed on twice
    begun = set(begun_file.read_text().splitlines()) if begun_file.exists() else set()
    # a plan may name a shape again that it has measured earlier, for its worth
    shapes = dict.fromkeys((TINY_PLANS if TINY else PLANS)[sys.argv[1]])
    plan = [item for item in shapes if "\t".join(item) not in begun]
    if not plan:
        return 0
    import torch

    from compress.bench.cells import describe
    from compress.bench.rows import ceiling_rows, parse_shape
    from compress.bench.timing import Bench, measure_ceilings
    from compress.common.files import append_rows
    from compress.methods.gradflow import bench as gradflow
    from compress.methods.registry import benchmarks

    # slim widths do not depend on the batch, and finding those of SD 1.5 takes long
    builders, build = {}, gradflow.slim_builder

    def slim_builder(dense, keep_macs):
        key = type(dense), str(dense.config), keep_macs
        if key not in builders:
            builders[key] = build(dense, keep_macs)
        return builders[key]

    gradflow.slim_builder = slim_builder
    known: dict[str, Any] = dict(benchmarks())
    where = Bench(DEVICE, repeats=2 if TINY else 15)
    ceilings, dtypes = None, []
    for name, text in plan:
        if time.time() > END - (2 if TINY else 14):
            print(f"no time left: {name} {text} and the rest", flush=True)
            return 0
        with begun_file.open("a") as file:
            file.write(f"{name}\t{text}\n")
        begin = time.time()
        try:
            shape = parse_shape(text, known[name].shape)
            if shape.dtype not in dtypes:  # ceilings are of the dtypes that they were measured in
                dtypes.append(shape.dtype)
                ceilings = measure_ceilings(where, dtypes)
                for row in ceiling_rows(name, ceilings, where):
                    append_rows(OUT / "rows.jsonl", row)
            for row in known[name].run(shape, where, ceilings):
                append_rows(OUT / "rows.jsonl", row)
                print("  ".join(describe(row)), f"[{time.time() - begin:.1f} s]", flush=True)
                print("  profile", json.dumps(row.get("profile")), "graphs", row.get("graphs"))
        except Exception as error:
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            append_rows(STATE / "failures.jsonl", {"bench": name, "shape": text, "error": line})
            print(f"FAILED {name} {text}: {line}", flush=True)
            memory = isinstance(error, torch.cuda.OutOfMemoryError)
            if not memory and ("CUDA error" in str(error) or "AcceleratorError" in line):
                return 3
        gc.collect()
        if where.cuda:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())

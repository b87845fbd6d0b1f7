"""Interpret the Sinkhorn kernel on the problems in a file: ``interpret_sinkhorn.py FILE PLAN``."""

import sys

from safetensors.torch import load_file, save_file

from compress.kernels import sinkhorn as kernels


def main(file: str, plan: str) -> None:
    problems = load_file(file)
    tensors = [problems[name] for name in ("scores", "rows", "columns")]
    kernels.WARPS = 1
    plans = {"held": kernels.sinkhorn(*tensors, 0.2, 10)}
    kernels.HELD = 2  # several tiles for 19 rows
    kernels._launch.cache_clear()
    plans["tiles"] = kernels.sinkhorn(*tensors, 0.2, 10)
    save_file(plans, plan)


if __name__ == "__main__":
    main(*sys.argv[1:])

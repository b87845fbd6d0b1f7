"""Interpret the Sinkhorn kernel on the problems in a file: ``interpret_sinkhorn.py FILE PLAN``."""

import sys

from safetensors.torch import load_file, save_file

from compress.kernels import sinkhorn as kernels


def main(file: str, plan: str) -> None:
    kernels.LARGEST = 256  # two tiles for 19 rows
    problems = load_file(file)
    tensors = (problems[name] for name in ("scores", "rows", "columns"))
    save_file({"plan": kernels.sinkhorn(*tensors, 0.2, 100)}, plan)


if __name__ == "__main__":
    main(*sys.argv[1:])

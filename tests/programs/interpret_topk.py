"""Interpret the kernel that chooses the highest weights: ``interpret_topk.py FILE``."""

import sys

from safetensors.torch import save_file

from builders import topk as cases
from compress.kernels import topk


def main(file: str) -> None:
    outputs = {}
    for number, shape in enumerate(cases.SMALL):
        for kind in cases.KINDS:
            index, rows = cases.lists(shape)
            topk.top_rows(*cases.draw(shape, kind), index, rows)
            outputs |= {f"{kind} {number} index": index, f"{kind} {number} rows": rows}
    save_file(outputs, file)


if __name__ == "__main__":
    main(sys.argv[1])

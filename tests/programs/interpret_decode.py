"""Interpret the decode kernels: ``interpret_decode.py FILE CASE ...``.

Cases are numbers in what can be interpreted, ascending: in one split first, then in many.
"""

import sys

import torch
from safetensors.torch import save_file
from triton.runtime import interpreter

from builders import decode
from compress.kernels import sparse_decode as kernels
from compress.kernels import summaries

create_dot = interpreter.InterpreterBuilder.create_dot


def numbers(handle):
    """The interpreter keeps bfloat16 as its bits and multiplies these: it gets numbers."""
    if handle.dtype.scalar != interpreter.tl.bfloat16:
        return handle
    return interpreter.interpreter_builder.cast_impl(handle, interpreter.tl.float32)


def main(file: str, numbered: list[str]) -> None:
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *others: create_dot(
        self, numbers(a), numbers(b), *others
    )
    outputs = {}
    known = [*decode.INTERPRETED, *decode.INTERPRETED_SLOWLY]
    for splits, dtype, number in (known[int(case)] for case in numbered):
        if splits == "many":
            tiles = (kernels.Tile(16, 4, 3, 1),)
            kernels.TILES = dict.fromkeys(kernels.TILES, tiles)
            kernels.MERGE, kernels.SCORES = 0, 32
            kernels._multiprocessors = lambda device: 1000
            kernels._launch.cache_clear()
            kernels._tile_and_splits.cache_clear()
        case, name = decode.draw(decode.SMALL[number], dtype), f"{splits} {dtype} {number}"
        hidden = decode.hidden(case, decode.listed(case))
        outputs[f"{name} sparse"] = decode.sparse(hidden, kernels.sparse_decode)
        own = decode.beside(case)
        outputs[f"{name} beside"] = decode.sparse(hidden, kernels.sparse_decode, own)
        means = summaries.summaries(**decode.grouped(case))
        outputs |= {f"{name} means {place}": part for place, part in enumerate(means)}
        hidden = decode.hidden(case, case["mask"][:, 0, 0])
        focal, weights = decode.focal(hidden, kernels.focal_decode)
        outputs |= {f"{name} focal": focal, f"{name} weights": weights}
    spaced = decode.spaced(decode.draw(decode.SMALL[0], torch.float32))
    for_each = spaced | {"mask": spaced["mask"].expand(2, -1, -1, -1)}
    outputs["spaced sparse"] = decode.sparse(for_each, kernels.sparse_decode)
    focal, weights = decode.focal(spaced, kernels.focal_decode)
    outputs |= {"spaced focal": focal, "spaced weights": weights}
    save_file(outputs, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""Interpret the kernels that open groups or score by signs: ``interpret_choice.py FILE``."""

import sys

from safetensors.torch import save_file

from builders import choice as cases
from compress.kernels import choice, signs, sparse_decode


def main(file: str) -> None:
    outputs = {}
    for dtype, number in cases.INTERPRETED:
        shape = cases.SMALL[number]
        given, cache = cases.draw(shape, dtype)
        name = f"{dtype} {number}"
        rows, bias = choice.choose_rows(**given)
        outputs |= {f"{name} rows": rows, f"{name} bias": bias}
        sparse = cases.attend(given, cache, (rows, bias), sparse_decode.sparse_decode)
        outputs[f"{name} attended"] = sparse
        outputs[f"{name} scores"] = signs.sign_scores(**cases.draw_signs(shape, dtype)[0])
    save_file(outputs, file)


if __name__ == "__main__":
    main(sys.argv[1])

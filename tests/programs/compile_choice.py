"""Compile the kernels that open groups and score by signs, without a GPU.

``compile_choice.py 80,90 fp16:128:64 ...`` prints a line of capability, dtype, bytes of the binary
and bytes of shared memory for each kernel, number of groups and size of a head.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import choice, signs
from compress.kernels.sparse_decode import block

FLOATS = ("scores_ptr", "bias_ptr", "logits_ptr", "scale")


def main(capability: int, dtype: str, dim: int, groups: int) -> None:
    of_both = {
        "GROUP": 7,
        "DIM": dim,
        "BLOCK_GROUP": 16,
        "BLOCK_DIM": block(dim),
    }
    of_groups = {
        "query_dim": 1,
        "BLOCK_GROUPS": block(groups),
        "BLOCK_TILE": choice.TILE,
        "BLOCK_SLOTS": choice.SLOTS,
    }
    of_signs = {"BYTES": -(-dim // 8), "BLOCK": signs.TILE}
    _compile(choice._choice_kernel, capability, dtype, of_both | of_groups, choice.WARPS)
    _compile(signs._signs_kernel, capability, dtype, of_both | of_signs, signs.WARPS)


def _compile(kernel, capability: int, dtype: str, constants: dict[str, int], warps: int) -> None:
    signature, even = {}, {}
    for place, name in enumerate(kernel.arg_names):
        pointer = name.endswith("_ptr")
        kind = "fp32" if name in FLOATS else "i32"
        if name in ("query_ptr", "keys_ptr"):
            kind = dtype
        if kernel is signs._signs_kernel and name in ("member_ptr", "codes_ptr"):
            kind = "u8"
        signature[name] = "constexpr" if name in constants else "*" * pointer + kind
        if pointer:
            even[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=even)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps})
    print(capability, dtype, len(binary.asm["cubin"]), binary.metadata.shared, sep=",")


if __name__ == "__main__":
    for target in map(int, sys.argv[1].split(",")):
        for part in sys.argv[2:]:
            number, *sizes = part.split(":")
            main(target, number, *map(int, sizes))

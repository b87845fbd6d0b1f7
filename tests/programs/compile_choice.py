"""Compile the kernel that opens groups without a GPU: ``compile_choice.py 80,90 fp16:128:64 ...``.

A line of capability, dtype, bytes of the binary and bytes of shared memory for each number of
groups and size of a head.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import choice
from compress.kernels.sparse_decode import block

FLOATS = ("scores_ptr", "bias_ptr", "scale")


def main(capability: int, dtype: str, dim: int, groups: int) -> None:
    constants = {
        "query_dim": 1,
        "GROUP": 7,
        "DIM": dim,
        "BLOCK_GROUP": 16,
        "BLOCK_DIM": block(dim),
        "BLOCK_GROUPS": block(groups),
        "BLOCK_TILE": choice.TILE,
        "BLOCK_SLOTS": choice.SLOTS,
    }
    signature, even = {}, {}
    for place, name in enumerate(choice._choice_kernel.arg_names):
        pointer = name.endswith("_ptr")
        kind = "fp32" if name in FLOATS else "i32"
        if name in ("query_ptr", "keys_ptr"):
            kind = dtype
        signature[name] = "constexpr" if name in constants else "*" * pointer + kind
        if pointer:
            even[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(choice._choice_kernel, signature=signature, constexprs=constants, attrs=even)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": choice.WARPS})
    print(capability, dtype, len(binary.asm["cubin"]), binary.metadata.shared, sep=",")


if __name__ == "__main__":
    for target in map(int, sys.argv[1].split(",")):
        for part in sys.argv[2:]:
            number, *sizes = part.split(":")
            main(target, number, *map(int, sizes))

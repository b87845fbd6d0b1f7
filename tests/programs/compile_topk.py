"""Compile the kernel that chooses the highest weights without a GPU: ``compile_topk.py 90 4096``.

A line of capability, tokens, bytes of the binary, registers and bytes that are spilled.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from builders.binaries import usage
from compress.kernels import topk

KINDS = {"weights_ptr": "*fp32", "index_ptr": "*i64", "valid_ptr": "*i1"}


def main(capability: int, visual: int) -> None:
    constants, options = topk.blocks(visual)
    kernel = topk._top_kernel
    signature = {}
    for name in kernel.arg_names:
        kind = KINDS.get(name, "*i32" if name.endswith("_ptr") else "i32")
        signature[name] = "constexpr" if name in constants else kind
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    size, _, registers, spilled = usage(binary)
    print(capability, visual, size, registers, spilled, sep=",")


if __name__ == "__main__":
    for target in map(int, sys.argv[1].split(",")):
        for number in sys.argv[2:]:
            main(target, int(number))

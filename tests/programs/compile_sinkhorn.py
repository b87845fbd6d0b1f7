"""Compile the Sinkhorn kernel without a GPU: ``compile_sinkhorn.py 90:340:60 ...``.

A line of capability and :func:`usage` for each capability, rows and columns.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from builders.binaries import usage
from compress.kernels import sinkhorn as kernels

SIGNATURE = {
    "scores_ptr": "*fp32",
    "rows_ptr": "*i32",
    "columns_ptr": "*i32",
    "plan_ptr": "*fp32",
    "n_rows": "i32",
    "n_columns": "i32",
    "dustbin": "fp32",
    "iterations": "i32",
}


def main(capability: int, rows: int, columns: int) -> None:
    sides = kernels.tile(rows, columns)
    signature = SIGNATURE | dict.fromkeys(sides, "constexpr")
    source = ASTSource(kernels._sinkhorn_kernel, signature=signature, constexprs=sides)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": kernels.WARPS})
    print(capability, *usage(binary))


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(*map(int, case.split(":")))

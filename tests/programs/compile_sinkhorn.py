"""Compile the Sinkhorn kernel without a GPU; prints a line of capability and size for each."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels.sinkhorn import WARPS, _sinkhorn_kernel

SIGNATURE = {
    "scores_ptr": "*fp32",
    "rows_ptr": "*i32",
    "columns_ptr": "*i32",
    "plan_ptr": "*fp32",
    "n_rows": "i32",
    "n_columns": "i32",
    "dustbin": "fp32",
    "iterations": "i32",
    "BLOCK_ROWS": "constexpr",
    "BLOCK_COLUMNS": "constexpr",
}


def main(capability: int, rows: int, columns: int) -> None:
    blocks = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns}
    source = ASTSource(_sinkhorn_kernel, signature=SIGNATURE, constexprs=blocks)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": WARPS})
    print(capability, len(binary.asm["cubin"]))


if __name__ == "__main__":
    for case in ((80, 128, 64), (90, 128, 64), (90, 4, 2048)):
        main(*case)

"""Compile the decode kernels without a GPU: ``compile_decode.py 80,90 fp16:128:0 ...``.

For each dtype, size of a head and place in the table of tiles: a line of capability, dtype, how
many programs the table says that a multiprocessor holds, how many it does by registers and shared
memory, and :func:`usage`, for each kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from builders.binaries import resident, usage
from compress.kernels import sparse_decode as kernels
from compress.kernels import summaries

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
TYPES = {
    "rows_ptr": "*i32",
    "rows_mask_ptr": "*i1",
    "dense_mask_ptr": "*i1",
    "parts_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "index_ptr": "*i64",
    "valid_ptr": "*i1",
    "member_ptr": "*i64",
    "key_sums_ptr": "*fp32",
    "value_sums_ptr": "*fp32",
    "sizes_ptr": "*fp32",
    "logits_ptr": "*fp32",
    "weights_ptr": "*fp32",
    "scale": "fp32",
}


def is_even(name):
    """As at a launch, where torch's tensors and their strides are multiples of 16."""
    if name in ("start", "rows_ptr", "rows_mask_ptr", "dense_mask_ptr"):
        return False
    return name.split("_")[-1] in ("ptr", "batch", "head", "row", "start")


def compiled(kernel, capability, dtype, constants, warps, stages, at_once=0):
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        if is_even(name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(capability, dtype, at_once, resident(binary), *usage(binary), sep=",")


def main(capability: int, dtype: str, dim: int, place: int) -> None:
    block = kernels.block(dim)
    dims = {"GROUP": 7, "DIM": dim, "VALUE_DIM": dim, "BLOCK_GROUP": 16}
    blocks = {"BLOCK_DIM": block, "BLOCK_VALUE": block}
    tile = kernels.TILES[SIZES[dtype], block][place]
    rows = {"BLOCK_ROWS": tile.rows}
    ones = dict.fromkeys(["query_dim", "key_dim", "value_dim"], 1)
    splits = {"BLOCK_SPLITS": kernels.MOST_SPLITS, "BLOCK_ROWS": kernels.SCORES}
    splits["BLOCK_HEADS"] = kernels.HEADS
    beside = ["beside_key_ptr", "beside_value_ptr", "bias_ptr"]
    for focal in (False, True):
        absent = dict.fromkeys(["rows_ptr", "rows_mask_ptr", *beside] if focal else ["logits_ptr"])
        constants = absent | ones | dims | blocks | rows
        stages = kernels.triton_stages(tile, listed=not focal)
        read = kernels._read_kernel
        compiled(read, capability, dtype, constants, tile.warps, stages, tile.at_once)
        absent = dict.fromkeys([] if focal else ["logits_ptr", "weights_ptr"])
        constants = absent | {"VALUE_DIM": dim, "BLOCK_VALUE": block} | splits
        compiled(kernels._merge_kernel, capability, dtype, constants, 4, 3)
    ones = dict.fromkeys(["key_dim", "value_dim"], 1)
    sides = {"BLOCK_GROUPS": summaries.GROUPS, "BLOCK_ROWS": summaries.ROWS}
    constants = ones | {"DIM": dim, "VALUE_DIM": dim} | blocks | sides
    compiled(summaries._summaries_kernel, capability, dtype, constants, summaries.WARPS, 3)


if __name__ == "__main__":
    for target in map(int, sys.argv[1].split(",")):
        for part in sys.argv[2:]:
            number, *sizes = part.split(":")
            main(target, number, *map(int, sizes))

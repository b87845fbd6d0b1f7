"""Compile the decode kernels without a GPU: ``compile_decode.py 80,90 fp16:128 ...``.

A line of capability, dtype, bytes of the binary and bytes of shared memory for each kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compress.kernels import sparse_decode as kernels
from compress.kernels import summaries

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
TYPES = {
    "rows_ptr": "*i32",
    "rows_mask_ptr": "*u8",
    "dense_mask_ptr": "*u8",
    "parts_ptr": "*fp32",
    "lse_ptr": "*fp32",
    "bias_ptr": "*fp32",
    "index_ptr": "*i64",
    "valid_ptr": "*u8",
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
    stride = name.split("_")[-1] in ("batch", "head", "row") and name != "logits_row"
    return name.endswith("_ptr") or stride


def compiled(kernel, capability, dtype, constants, stages):
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = TYPES.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        if is_even(name):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": kernels.WARPS, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(capability, dtype, len(binary.asm["cubin"]), binary.metadata.shared, sep=",")


def main(capability: int, dtype: str, dim: int) -> None:
    block = kernels.block(dim)
    dims = {"GROUP": 7, "DIM": dim, "VALUE_DIM": dim, "BLOCK_GROUP": 16}
    blocks = {"BLOCK_DIM": block, "BLOCK_VALUE": block}
    rows = {"BLOCK_ROWS": kernels._tile_rows(block, block, SIZES[dtype])}
    ones = dict.fromkeys(["query_dim", "key_dim", "value_dim"], 1)
    splits = {"BLOCK_SPLITS": kernels.MOST_SPLITS, "BLOCK_ROWS": kernels.SCORES}
    beside = ["beside_key_ptr", "beside_value_ptr", "bias_ptr"]
    for focal in (False, True):
        absent = dict.fromkeys(["rows_ptr", "rows_mask_ptr", *beside] if focal else ["logits_ptr"])
        constants = absent | ones | dims | blocks | rows
        stages = kernels._stages(listed=not focal)
        compiled(kernels._read_kernel, capability, dtype, constants, stages)
        absent = dict.fromkeys([] if focal else ["logits_ptr", "weights_ptr"])
        constants = absent | {"VALUE_DIM": dim, "BLOCK_VALUE": block} | splits
        compiled(kernels._merge_kernel, capability, dtype, constants, kernels.STAGES)
    ones = dict.fromkeys(["key_dim", "value_dim"], 1)
    sides = {"BLOCK_GROUPS": summaries.GROUPS, "BLOCK_ROWS": summaries.ROWS}
    constants = ones | {"DIM": dim, "VALUE_DIM": dim} | blocks | sides
    compiled(summaries._summaries_kernel, capability, dtype, constants, kernels.STAGES)


if __name__ == "__main__":
    for target in map(int, sys.argv[1].split(",")):
        for part in sys.argv[2:]:
            number, size = part.split(":")
            main(target, number, int(size))

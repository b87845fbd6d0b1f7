"""Attention and transport where triton cannot be imported; prints sums and a refusal."""

import os
import sys

sys.modules["triton"] = None  # an import of it fails

import torch  # noqa: E402

from compress.methods.fastocr.attention import focal_decode, sparse_decode  # noqa: E402
from compress.methods.rtprune.transport import transport_plan  # noqa: E402


def main() -> None:
    query, cache = torch.ones(1, 4, 1, 8), torch.ones(1, 2, 5, 8)
    rows = torch.tensor([[0, 1]])
    print(sparse_decode(query, cache, cache, rows, None, (3, 5), None, 0.1).sum().item())
    print(focal_decode(query, cache, cache, None, 0.1)[1].sum().item())
    transport_plan(torch.ones(2, 3))
    os.environ["COMPRESS_KERNELS"] = "triton"
    try:
        transport_plan(torch.ones(2, 3))
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()

"""Commands without triton and the extras: ``without_extras.py "run NAME" "eval FOLDER" ...``.

They run one after the other; on stdout stands the exit code of each. Sums of attention and a
refusal of its kernels follow.
"""

import os
import re
import shlex
import sys
from importlib import metadata
from importlib.machinery import PathFinder

from compress.cli import main as command
from compress.common.extras import DISTRIBUTION


def modules_of_extras() -> set[str]:
    optional = [text for text in metadata.requires(DISTRIBUTION) if "extra ==" in text]
    names = {re.split(r"[^\w.-]", text)[0].lower() for text in optional if "dev" not in text}
    return {
        module
        for module, packages in metadata.packages_distributions().items()
        if names & {package.lower() for package in packages} - {DISTRIBUTION}
    }


def hide(modules: set[str]) -> None:
    for module in ("datasets", "jiwer", "matplotlib"):
        if module not in modules or module in sys.modules:
            raise SystemExit(f"{module} should be hidden before anything imports it")
    find = PathFinder.find_spec
    PathFinder.find_spec = staticmethod(
        lambda name, *rest: None if name.split(".")[0] in modules else find(name, *rest)
    )


def kernels() -> None:
    import torch

    from compress.methods.fastocr.attention import focal_decode, sparse_decode
    from compress.methods.rtprune.transport import transport_plans

    query, cache = torch.ones(1, 4, 1, 8), torch.ones(1, 2, 5, 8)
    rows = torch.tensor([[0, 1]])
    print(sparse_decode(query, cache, cache, rows, None, (3, 5), None, 0.1).sum().item())
    print(focal_decode(query, cache, cache, None, 0.1)[1].sum().item())
    transport_plans(torch.ones(1, 2, 3))
    os.environ["COMPRESS_KERNELS"] = "triton"
    try:
        transport_plans(torch.ones(1, 2, 3))
    except ValueError as error:
        print(error)


def main(*lines: str) -> None:
    hide(modules_of_extras())
    sys.modules["triton"] = None  # an import of it fails
    for line in lines:
        sys.argv = ["compress", *shlex.split(line)]
        try:
            command()
        except SystemExit as end:
            print("exit", end.code)
    kernels()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""From how many visual tokens on a decode step is faster than a dense one, measured by device.

``compress bench fastocr --results ROWS --crossover FILE`` writes such a table from the rows of
whole decode steps: per device the smallest number from which on no measured step was slower than
the fastest dense way, with the sizes, dtypes and threads that were measured. ``crossover.json``
beside this module is the one that ships, from ``eval/results/bench_fastocr.jsonl``: of models of
three and seven billion parameters on one thread of one CPU. Other models and machines cross
elsewhere; the environment variable ``COMPRESS_CROSSOVERS`` names another file to use instead.
"""

import os
from pathlib import Path
from typing import Any

import torch

from compress.common.environment import device_name
from compress.common.files import read_json

VARIABLE = "COMPRESS_CROSSOVERS"
SHIPPED = Path(__file__).with_name("crossover.json")


def read_table(path: Path | None = None) -> dict[str, Any]:
    """The table of a file: device name or type -> what was measured there.

    Parameters
    ----------
    path : None is what the environment says, or what ships.

    Raises
    ------
    ValueError : for a file that is no such table.
    FileNotFoundError : when there is no such file.
    """
    path = path or Path(os.environ.get(VARIABLE) or SHIPPED)
    table = read_json(path)
    wrong = "no object" if not isinstance(table, dict) else ""
    for name, entry in table.items() if not wrong else ():
        least = entry.get("min_visual") if isinstance(entry, dict) else None
        if not isinstance(least, int) or isinstance(least, bool) or least < 0:
            wrong = f"{name!r} without such a number"
    if wrong:
        raise ValueError(
            f"{path} should map devices to objects with a min_visual, an integer of 0 or more; "
            f"got {wrong}; write it with compress bench fastocr --crossover"
        )
    return table


def crossover(device: torch.device, table: dict[str, Any]) -> tuple[int, str]:
    """Visual tokens below which dense decoding is faster on a device, and where that is from.

    Parameters
    ----------
    device : its product name is looked up first, then its type.
    table : of :func:`read_table`.

    Returns
    -------
    The number, 0 where nothing was measured; and a phrase for the log.
    """
    for name in dict.fromkeys((device_name(device), device.type)):
        if name in table:
            return table[name]["min_visual"], f"measured on {name}"
    return 0, f"nothing was measured on {device_name(device)}"

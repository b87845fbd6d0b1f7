"""What stays of a page, and what is counted of it."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PrunedPage:
    """What is left of a page before it is encoded.

    Parameters
    ----------
    grid : (view, row, column) of its units, ``(units, 3)``.
    kept : which of them stay, ascending, ``(kept,)``. Both on the CPU.
    """

    grid: torch.Tensor
    kept: torch.Tensor

    @property
    def dropped(self) -> torch.Tensor:
        """(view, row, column) of the other units, ``(dropped, 3)``."""
        gone = torch.ones(len(self.grid), dtype=torch.bool)
        gone[self.kept] = False
        return self.grid[gone]

    def facts(self) -> dict[str, Any]:
        """Counts and their ratio, for JSON."""
        units, kept = len(self.grid), len(self.kept)
        return {"units": units, "kept": kept, "share": kept / units}

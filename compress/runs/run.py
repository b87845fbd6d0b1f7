"""What a run leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, what metrics.json holds, and the checkpoint."""

    folder: Path
    metrics: dict[str, Any]
    checkpoint: Path

"""The log and the saved state of a run that can be resumed: JSON lines and one safetensors file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from compress.files import write_bytes, write_text

Tensors = dict[str, torch.Tensor]


@dataclass
class Saved:
    """What a state file holds: named tensors and JSON facts."""

    tensors: Tensors
    facts: dict[str, Any]

    def part(self, prefix: str) -> Tensors:
        """Tensors under ``prefix/``, without the prefix."""
        start = f"{prefix}/"
        return {k[len(start) :]: t for k, t in self.tensors.items() if k.startswith(start)}


@dataclass
class Journal:
    """Log rows and states of one run; in memory only when ``folder`` is None.

    A state knows how many log rows there were, so a resumed run continues the log exactly.
    """

    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def _log(self) -> Path | None:
        return None if self.folder is None else self.folder / "log.jsonl"

    @property
    def state_file(self) -> Path | None:
        """Where the state lies."""
        return None if self.folder is None else self.folder / "state" / "state.safetensors"

    def log(self, **row: Any) -> None:
        """Append one row."""
        self.rows.append(row)
        if self._log is not None:
            with self._log.open("a", encoding="utf8") as file:
                file.write(json.dumps(row) + "\n")

    def save(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Replace the saved state; a kill at any moment leaves the old one or the new one."""
        if self.state_file is None:
            return
        self.state_file.parent.mkdir(exist_ok=True)
        facts = facts | {"log_rows": len(self.rows)}
        # cloned: safetensors refuses tensors that share memory
        own = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        write_bytes(self.state_file, save(own, metadata={"facts": json.dumps(facts)}))

    def load(self) -> Saved | None:
        """Read the saved state and its log rows; None when there is none. Changes nothing.

        Raises
        ------
        ValueError : when the state file is damaged.
        """
        if self.state_file is None or not self.state_file.exists():
            return None
        try:
            with safe_open(self.state_file, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"{self.state_file} should hold a saved state but cannot be read: {error}; "
                "remove the run folder, or start again with --overwrite"
            ) from error
        if self._log is not None:
            lines = self._log.read_text(encoding="utf8").splitlines()[: facts["log_rows"]]
            if len(lines) < facts["log_rows"]:
                raise ValueError(
                    f"{self._log} should hold the {facts['log_rows']} rows before the saved state; "
                    f"it has {len(lines)}; start again with --overwrite"
                )
            self.rows = [json.loads(line) for line in lines]
        return Saved(tensors, facts)

    def begin(self) -> None:
        """Cut the log on disk back to the rows that are known: what came after is done again."""
        if self._log is not None:
            write_text(self._log, "".join(json.dumps(row) + "\n" for row in self.rows))

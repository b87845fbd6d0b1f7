"""The log and the saved states of a run that can be resumed: JSON lines and safetensors files."""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from compress.common.files import append_rows, json_lines, unfinished, write_bytes, write_text
from compress.common.foreign import foreign

Tensors = dict[str, torch.Tensor]


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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

    Parameters
    ----------
    folder : of the run.
    keep : how many states are kept; the newest is ``state.safetensors``, the one before it
        ``state-1.safetensors``, and so on.
    writes : False in all but the main one of several processes, which read the same folder.
    """

    folder: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    keep: int = 2
    writes: bool = True
    # the age of the loaded state; None before one is
    _loaded: int | None = field(default=None, init=False)

    @property
    def _log(self) -> Path | None:
        return None if self.folder is None else self.folder / "log.jsonl"

    @property
    def state_file(self) -> Path | None:
        """Where the newest state lies."""
        return None if self.folder is None else self.folder / "state" / "state.safetensors"

    def _states(self) -> list[Path]:
        """Where states may lie, the newest first."""
        newest = self.state_file
        if newest is None:
            return []
        return [newest, *(newest.with_name(f"state-{age}.safetensors") for age in range(1, 100))]

    def log(self, **row: Any) -> None:
        """Append one row."""
        self.rows.append(row)
        if self._log is not None and self.writes:
            append_rows(self._log, row)

    def save(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Add a state and forget the oldest; a kill at any moment leaves an intact newest one."""
        if self.state_file is None or not self.writes:
            return
        self.state_file.parent.mkdir(exist_ok=True)
        # cloned: safetensors refuses tensors that share memory
        own = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        facts = facts | {"log_rows": len(self.rows), "sha256": fingerprint(own)}
        states = self._states()
        for path in states[max(1, self.keep) :]:
            path.unlink(missing_ok=True)
        for age in range(self.keep - 1, 0, -1):
            if states[age - 1].exists():
                os.replace(states[age - 1], states[age])
        write_bytes(self.state_file, save(own, metadata={"facts": json.dumps(facts)}))

    def load(self) -> Saved | None:
        """Read the newest intact state and its log rows; None when there is none.

        Changes nothing on the disk. A state that is damaged, or whose log has lost rows, is passed
        over with a warning that names it.

        Raises
        ------
        ValueError : when there are states but none is intact.
        """
        problems: list[str] = []
        for age, path in enumerate(self._states()):
            if not path.exists():
                continue
            try:
                saved = _read(path)
                rows = self._first_rows(saved.facts["log_rows"])
            except ValueError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going on from {path.name}", stacklevel=2)
            self.rows, self._loaded = rows, age
            return saved
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}; remove the run folder, or start again with --overwrite"
            )
        return None

    def _first_rows(self, count: int) -> list[dict[str, Any]]:
        if self._log is None or not self._log.exists():
            lines = []
        else:
            lines = [line for _, line in json_lines(self._log)][:count]
        if len(lines) < count:
            raise ValueError(
                f"{self._log} should hold the {count} rows before the saved state; it has "
                f"{len(lines)}"
            )
        return [json.loads(line) for line in lines]

    def begin(self) -> None:
        """Cut the log on disk back to the rows that are known: what came after is done again.

        So are states that :meth:`load` passed over, or all where nothing was loaded: the next ones
        would push out a good one, or mix with those of another run.
        """
        if self.folder is None or self._log is None or not self.writes:
            return
        write_text(self._log, "".join(json.dumps(row) + "\n" for row in self.rows))
        for path in self._states()[: self._loaded]:
            path.unlink(missing_ok=True)
        # what a kill in the middle of a write left
        for path in self.folder.glob("state/.*"):
            if unfinished(path.name) == "state.safetensors":
                path.unlink()


def _read(path: Path) -> Saved:
    """Read one state."""
    with foreign(path, "a saved state"), safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if facts.pop("sha256") != fingerprint(tensors):
            raise ValueError("its content is damaged")
    return Saved(tensors, facts)

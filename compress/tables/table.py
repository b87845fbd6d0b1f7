"""A table: the runs that its rows come from, what is missing of them, and what it shows.

Rows are JSON lines in ``eval/results``. They are measured once: a run whose rows are there is
skipped, so a sitting that was stopped goes on where it was, and several shells can share the work.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from compress.common.files import append_rows, folder_hash, write_text
from compress.eval.tables import Row, read_rows
from compress.methods.base import Event
from compress.models.locate import BUILTIN

T = TypeVar("T")
Run = Generator[str, None, T]  # lines to show on the way to a result


@dataclass(frozen=True)
class Job:
    """One run of a table.

    Attributes
    ----------
    name : shown when it starts; the runs of one line of the table share it.
    owns : whether a row was measured by such a run.
    run : measures its rows.
    """

    name: str
    owns: Callable[[Row], bool]
    run: Callable[[], Run[list[Row]]]


@dataclass(frozen=True)
class Table:
    """A generated table of a document.

    Attributes
    ----------
    name : of its place in a document, ``<!-- table:NAME -->``.
    body : its rows to Markdown: the table and a note beneath.
    path : file of its rows, which other tables may share.
    jobs : the runs that it needs; none where it shows what others measured.
    lines : its rows to what its lines say, by name.
    """

    name: str
    body: Callable[[Sequence[Row]], str]
    path: Path = Path()
    jobs: Sequence[Job] = ()
    lines: Callable[[Sequence[Row]], list[Row]] = list

    def rows(self) -> list[Row]:
        """The rows of its jobs that are there."""
        return [row for row in read_rows(self.path) if any(job.owns(row) for job in self.jobs)]

    def run_missing(self, shard: tuple[int, int] = (0, 1)) -> Iterator[str]:
        """Run the jobs that have no row of the weights that ship now, and keep their rows.

        Parameters
        ----------
        shard : (k, n): every n-th job only, from the k-th.

        Yields
        ------
        Lines to show.
        """
        mine = self.jobs[shard[0] :: shard[1]]
        for number, job in enumerate(mine, start=1):
            if any(job.owns(row) and not is_stale(row) for row in read_rows(self.path)):
                continue
            yield f"{self.name} [{number}/{len(mine)}] {job.name}"
            rows = yield from job.run()
            before = read_rows(self.path)
            others = [row for row in before if not job.owns(row)]
            if len(others) < len(before):
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in others))
            facts = {"command": f"compress tables {self.name}", "commit": _commit()}
            append_rows(self.path, *(facts | row for row in rows))

    def render(self) -> str:
        """The table in Markdown, with how it was made."""
        if not self.jobs:
            return self.body([])
        rows = self.rows()
        if not rows:
            return f"*No rows yet: run `compress tables {self.name}`.*"
        made = f"Made by `compress tables {self.name}`; rows in `eval/results/{self.path.name}`."
        old = sorted({row["model"] for row in rows if is_stale(row)})
        stale = f" **Measured on earlier weights of {', '.join(old)}.**" if old else ""
        return f"{self.body(rows)} {made}{stale}"


def has(**facts: Any) -> Callable[[Row], bool]:
    """Whether a row has these values."""
    return lambda row: all(row.get(name) == value for name, value in facts.items())


def is_stale(row: Row) -> bool:
    """Whether a row was measured on other weights than its built-in model has now."""
    return "model_hash" in row and weights(row["model"]) not in (None, row["model_hash"])


@cache
def weights(model: str) -> str | None:
    """Hash of the weights of a built-in model; None for any other."""
    folder = BUILTIN / model.removeprefix("builtin:")
    return folder_hash(folder) if model.startswith("builtin:") and folder.is_dir() else None


def run_folder(runs: Path, name: str, model: str) -> Path:
    """Where a run of a table goes on if it was interrupted: another place for other weights."""
    return runs / f"table_{name}_{(weights(model) or '')[:8]}"


def finish(events: Generator[Event, None, T]) -> Run[tuple[T, dict[str, float]]]:
    """Let a run go on to its end: what it returns, and the process's CPU seconds by stage."""
    spent: dict[str, float] = {}
    before = time.process_time()
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value, spent
        if event.stage not in spent:
            yield f"    {event.stage}"
        now = time.process_time()
        spent[event.stage] = spent.get(event.stage, 0.0) + now - before
        before = now


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``K/N``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and int(match[1]) < int(match[2]):
        return int(match[1]), int(match[2])
    raise ValueError(f"shard must be K/N with 0 <= K < N, such as 0/2; got {text!r}")

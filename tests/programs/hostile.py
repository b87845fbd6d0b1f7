"""The command in a hostile place: ``hostile.py closed|small|full FOLDER ARGUMENT ...``.

The folder may not be written, or gets a disk of 2 MB whose space is checked beforehand or not.
What came of it is in the file outcome.json of the current folder.
"""

import json
import subprocess
import sys
from pathlib import Path

from builders.forks import give_up_rights
from compress.cli import main as command
from compress.runs.diffusion import DiffusionRun


def prepared(place: str, folder: str) -> bool:
    if place == "closed":
        return give_up_rights()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if place == "full":
        DiffusionRun._check_space = lambda self: None
    return not subprocess.run(mount, capture_output=True).returncode


def main(place: str, folder: str, *arguments: str) -> None:
    outcome = Path("outcome.json").resolve()
    if not prepared(place, folder):
        outcome.write_text("null")
        return
    sys.argv = ["compress", *arguments]
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code
    left = [path.name for path in Path(folder).rglob("*")]
    outcome.write_text(json.dumps({"code": code, "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])

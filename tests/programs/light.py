"""Help, listings and mistakes, in a process that has imported nothing before them.

Prints the heavy packages that they imported.
"""

import sys

from typer.testing import CliRunner

from compress.cli import app

HEAVY = {"torch", "diffusers", "transformers", "numpy", "scipy", "matplotlib"}
COMMANDS = {
    "--help": 0,
    "run --help": 0,
    "eval --help": 0,
    "recipes": 0,
    "run ddpm_gradflow --set method.keep_mac=1": 2,
    "run ddpm_gradflow --dry-run --set method.keep_macs=7": 2,
    "run ddpm_gradflow --output .": 2,
}

if __name__ == "__main__":
    for line, code in COMMANDS.items():
        result = CliRunner().invoke(app, line.split())
        if result.exit_code != code:
            sys.exit(result.output)
    print(*sorted(sys.modules.keys() & HEAVY))

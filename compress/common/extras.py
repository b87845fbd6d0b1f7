"""Optional dependencies: what only some work needs, installed as ``compress-models[EXTRA]``."""

import contextlib
from collections.abc import Iterator

DISTRIBUTION = "compress-models"
EXTRAS = {
    "ocr": "scores of text and OCR benchmarks",
    "report": "figures and rendered pages",
    "data": "data sets of the hub and PDFs",
    "serve": "the server of readers",
}


def command(name: str) -> str:
    """How to install an extra."""
    return f"pip install '{DISTRIBUTION}[{name}]'"


class MissingExtraError(ImportError):
    """A package that an extra of the distribution would bring is not installed."""


@contextlib.contextmanager
def extra(name: str, work: str) -> Iterator[None]:
    """Import packages of an extra within the context.

    Parameters
    ----------
    name : of the extra, one of `EXTRAS`.
    work : what the packages are needed for, as the subject of a sentence.

    Raises
    ------
    MissingExtraError : for a package that is not installed, naming the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "compress":
            raise  # a mistake of ours
        raise MissingExtraError(
            f"{work} needs the package {error.name}, which is not installed; run: {command(name)}",
            name=error.name,
        ) from error

"""Make diffusion models and OCR models smaller and faster: one recipe, command, checkpoint."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import apply as apply
    from compress.checkpoints.applied import Applied as Applied
    from compress.checkpoints.applied import Compressed as Compressed
    from compress.checkpoints.load import Reader as Reader
    from compress.checkpoints.load import load as load
    from compress.checkpoints.load import load_reader as load_reader
    from compress.methods.registry import *  # noqa: F403
    from compress.methods.training import Training as Training
    from compress.models.reading import read_pages as read_pages
    from compress.runs.run import run as run

__version__ = version("compress-models")

# where each public name lies; the methods' classes are those of the registry
_HOMES = {
    "Applied": "compress.checkpoints.applied",
    "Compressed": "compress.checkpoints.applied",
    "Reader": "compress.checkpoints.load",
    "Training": "compress.methods.training",
    "apply": "compress.api",
    "load": "compress.checkpoints.load",
    "load_reader": "compress.checkpoints.load",
    "read_pages": "compress.models.reading",
    "run": "compress.runs.run",
}


def _methods() -> dict[str, Any]:
    registry = import_module("compress.methods.registry")
    return {kind.__name__: kind for kind in registry.METHODS.values()}


def __getattr__(name: str) -> Any:
    # torch and diffusers are imported when first needed: `import compress` stays cheap
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__all__":
        return __dir__()
    if not name.startswith("_") and name in (methods := _methods()):
        return methods[name]
    raise AttributeError(f"module 'compress' has no attribute {name!r}; it has {__dir__()}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_methods(), "__version__"])

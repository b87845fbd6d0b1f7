"""Make diffusion models and OCR models smaller and faster: one recipe, command, checkpoint."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import apply
    from compress.checkpoints.slim import load, load_processor
    from compress.methods.fastocr import FastOCR
    from compress.methods.gradflow import GradFlow, OneShot
    from compress.methods.rtprune import RTPrune
    from compress.methods.training import Training
    from compress.runs.diffusion import run

__version__ = version("compress-models")
__all__ = [
    "FastOCR",
    "GradFlow",
    "OneShot",
    "RTPrune",
    "Training",
    "__version__",
    "apply",
    "load",
    "load_processor",
    "run",
]

_HOMES = {
    "FastOCR": "compress.methods.fastocr",
    "GradFlow": "compress.methods.gradflow",
    "OneShot": "compress.methods.gradflow",
    "Training": "compress.methods.training",
    "RTPrune": "compress.methods.rtprune",
    "apply": "compress.api",
    "load": "compress.checkpoints.slim",
    "load_processor": "compress.checkpoints.slim",
    "run": "compress.runs.diffusion",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers are imported when first needed: `import compress` stays cheap
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module 'compress' has no attribute {name!r}; it has {', '.join(__all__)}"
    )

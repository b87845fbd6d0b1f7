"""Make diffusion models and OCR models smaller and faster: one recipe, command, checkpoint."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.applying import apply
    from compress.checkpoint import load, load_processor
    from compress.fastocr import FastOCR
    from compress.gradflow import GradFlow, OneShot, Training
    from compress.pipeline import run
    from compress.rtprune import RTPrune

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
    "FastOCR": "compress.fastocr",
    "GradFlow": "compress.gradflow",
    "OneShot": "compress.gradflow",
    "Training": "compress.gradflow",
    "RTPrune": "compress.rtprune",
    "apply": "compress.applying",
    "load": "compress.checkpoint",
    "load_processor": "compress.checkpoint",
    "run": "compress.pipeline",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers are imported when first needed: `import compress` stays cheap
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module 'compress' has no attribute {name!r}; it has {', '.join(__all__)}"
    )

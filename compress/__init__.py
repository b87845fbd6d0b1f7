"""Make diffusion models smaller and faster: one recipe, one command, one checkpoint."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.checkpoint import load
    from compress.gradflow import GradFlow, OneShot, Training
    from compress.pipeline import apply, run

__version__ = version("compress-models")
__all__ = ["GradFlow", "OneShot", "Training", "__version__", "apply", "load", "run"]

_HOMES = {
    "GradFlow": "compress.gradflow",
    "OneShot": "compress.gradflow",
    "Training": "compress.gradflow",
    "apply": "compress.pipeline",
    "load": "compress.checkpoint",
    "run": "compress.pipeline",
}


def __getattr__(name: str) -> Any:
    # torch and diffusers are imported when first needed: `import compress` stays cheap
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(
        f"module 'compress' has no attribute {name!r}; it has {', '.join(__all__)}"
    )

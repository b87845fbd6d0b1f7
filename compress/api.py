"""``compress.apply``: one call for every method."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.checkpoints.applied import Applied, Compressed
from compress.methods.base import RuntimeMethod, WeightMethod

if TYPE_CHECKING:
    from compress.data.sources import ImageData, Images
    from compress.methods.training import Training


def apply(
    model: Any,
    method: WeightMethod | RuntimeMethod | Sequence[RuntimeMethod],
    *,
    data: "ImageData | Images | str | None" = None,
    training: "Training | None" = None,
    device: str | None = None,
) -> Compressed | Applied:
    """Compress a model in memory.

    Parameters
    ----------
    model : a diffusers pipeline, for methods that make new weights; a vision-language model of
        transformers, for those that change how it runs.
    method : one method; several that change how a model runs may be stacked, the first one applied
        first.
    data, training, device : as in :func:`compress.runs.diffusion.apply`; for pipelines only.

    Returns
    -------
    Of a pipeline a `Compressed` with a new ``model``. Otherwise an `Applied`: the methods are on
    the model until its ``remove()``, or until its ``with`` block is left.

    Raises
    ------
    ValueError : for a method that does not suit the model, or arguments that it has no use for.
    """
    methods = list(method) if isinstance(method, Sequence) else [method]
    at_run_time = [hasattr(m, "attach") for m in methods]
    if all(at_run_time):
        given = {"data": data, "training": training, "device": device}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(
                "methods that change how a model runs learn nothing and stay on its device; got "
                f"{', '.join(unused)}; leave them out"
            )
        return Applied(model, methods)  # type: ignore[arg-type]
    if len(methods) > 1:
        names = ", ".join(m.name for m in methods)
        raise ValueError(
            f"methods that make new weights are applied alone; got {names}; apply one after the "
            "other"
        )
    if data is None:
        raise ValueError(
            f"{methods[0].name} trains and measures on data; got none; give such as "
            'data="builtin:digits"'
        )
    from compress.runs.diffusion import apply as compress_pipeline

    return compress_pipeline(model, methods[0], data=data, training=training, device=device)  # type: ignore[arg-type]

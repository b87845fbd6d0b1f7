"""``compress.apply``: one call for every method."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch

from compress.checkpoints.applied import Applied, Compressed
from compress.common.environment import choose_device
from compress.common.events import drain
from compress.common.journal import Journal
from compress.common.settings import did_you_mean
from compress.data.sources import ImageData, Images, load_images
from compress.methods.base import Method, PruneJob, RuntimeMethod, WeightMethod
from compress.methods.registry import named
from compress.methods.training import Training
from compress.models.pipelines import cast, condition_of, denoiser, image_shape, plain, with_parts
from compress.parallel import distributed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@overload
def apply(
    model: "DiffusionPipeline",
    method: WeightMethod | str,
    *,
    data: ImageData | Images | str,
    training: Training | None = None,
    device: str | None = None,
) -> Compressed: ...


@overload
def apply(
    model: Any,
    method: RuntimeMethod | str | Sequence[RuntimeMethod | str],
    *,
    processor: Any = None,
) -> Applied: ...


def apply(
    model: Any,
    method: Method | str | Sequence[Method | str],
    *,
    data: ImageData | Images | str | None = None,
    training: Training | None = None,
    device: str | None = None,
    processor: Any = None,
    **unknown: Any,
) -> Compressed | Applied:
    """Compress a model in memory.

    Parameters
    ----------
    model : a diffusers pipeline, for methods that make new weights: it is not changed, they are
        trained in float32, and the result has the dtype of its denoiser; a vision-language model of
        transformers, for those that change how it runs.
    method : a method, or the name of one with its default settings; several that change how a model
        runs may be stacked, the first one applied first.
    data : for pipelines: a data source as in a recipe, or a data set of ``(channels, height,
        width)`` images in [-1, 1], whose every tenth image is held out; an `ImageData` with
        conditions for a pipeline that takes captions or labels.
    training : for pipelines: how weights are trained.
    device : for pipelines: where; CUDA if there is any when None.
    processor : for vision-language models: stored with a checkpoint of the result.

    Returns
    -------
    Of a pipeline a `Compressed` with a new ``model``. Otherwise an `Applied`: the methods are on
    the model until its ``remove()``, or until its ``with`` block is left.

    Raises
    ------
    ValueError : for a method that does not suit the model, arguments that it has no use for, and
        unknown ones.
    """
    if unknown:
        _refuse_unknown(method, unknown)
    several = isinstance(method, Sequence) and not isinstance(method, str)
    methods = [_instance(one) for one in (method if several else [method])]
    weights = [one for one in methods if isinstance(one, WeightMethod)]
    runtime = [one for one in methods if isinstance(one, RuntimeMethod)]
    names = ", ".join(one.name for one in methods)
    if weights and len(methods) > 1:
        raise ValueError(
            f"methods that make new weights are applied alone; got {names}; apply one after the "
            "other"
        )
    _check_kind(model, names, pipeline=bool(weights), reader=bool(runtime))
    if not weights:
        _refuse_unused(
            "methods that change how a model runs", data=data, training=training, device=device
        )
        if processor is not None and not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"a processor of transformers is expected; got {_kind(processor)}; give the "
                ".processor of what compress.load_reader returns, or leave it out"
            )
        return Applied(model, runtime, processor)
    _refuse_unused("methods that make new weights", processor=processor)
    if data is None:
        raise ValueError(
            f'{names} trains and measures on data; got none; give such as data="builtin:digits"'
        )
    if training is not None and not isinstance(training, Training):
        raise ValueError(
            f"training is expected as compress.Training(...); got {_kind(training)}; make one, or "
            "leave it out for its defaults"
        )
    return _prune(model, weights[0], data, training or Training(), choose_device(device))


def _instance(method: Any) -> Method:
    if isinstance(method, str):
        return named(method)()  # type: ignore[call-arg]
    if isinstance(method, Method):
        return method
    raise ValueError(
        f"a method is expected, or the name of one; got {_kind(method)}; make an instance by "
        "calling its class"
    )


def _refuse_unknown(method: Any, unknown: Mapping[str, Any]) -> None:
    """Refuse what is no argument of apply; the settings of a method are given to the method."""
    parameters = inspect.signature(apply).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    kind = named(method) if isinstance(method, str) else type(method)
    settings = [*kind.model_fields] if issubclass(kind, Method) else []
    message = f"compress.apply takes {', '.join(known)}"
    if settings:
        message += f", and {kind.__name__} is made with {', '.join(settings)}"
    got = "; ".join(f"{name}{did_you_mean(name, [*known, *settings])}" for name in unknown)
    example = kind.__name__ if settings else "METHOD"
    raise ValueError(f"{message}; got {got}; give settings as in apply(model, {example}(...))")


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def _check_kind(model: Any, names: str, *, pipeline: bool, reader: bool) -> None:
    """Refuse a method on a model of the other kind."""
    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    got = _kind(model)
    if pipeline and not isinstance(model, DiffusionPipeline):
        raise ValueError(
            f"{names} compresses a diffusers pipeline; got {got}; load one with compress.load"
        )
    if reader and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{names} changes how a vision-language model of transformers runs; got {got}; load "
            "one with compress.load_reader, and give its .model"
        )


def _refuse_unused(kind: str, **values: Any) -> None:
    unused = [name for name, value in values.items() if value is not None]
    if unused:
        raise ValueError(f"{kind} have no use for {', '.join(unused)}; leave them out")


def _check_image(images: Images, shape: tuple[int, ...], name: str) -> None:
    """Refuse what is no data set of images of this shape, by its first one."""
    try:
        first: Any = images[0]
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"a data set yields its images by number; {name}[0] failed with "
            f"{type(error).__name__}; give a list or a data set of tensors"
        ) from error
    if not isinstance(first, torch.Tensor):
        raise ValueError(
            f"images are expected as tensors {shape} in [-1, 1]; {name} yields {_kind(first)}; "
            "convert them, and give conditions in an ImageData"
        )
    if tuple(first.shape) != shape:
        raise ValueError(
            f"the model takes images {shape}, channels, height and width; {name} has "
            f"{tuple(first.shape)}; resize or convert them"
        )


def _prune(
    pipeline: "DiffusionPipeline",
    method: WeightMethod,
    data: ImageData | Images | str,
    training: Training,
    device: str,
) -> Compressed:
    part, dense = denoiser(pipeline)
    trained = plain(pipeline)
    size, channels = image_shape(trained)
    if isinstance(data, str):
        data = load_images(data, size, channels, condition_of(trained))
    elif not isinstance(data, ImageData):
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(
                "data is expected as a source such as builtin:digits, a data set of images or an "
                f"ImageData; got {_kind(data)}; give one of them"
            )
        data = ImageData.split("data", data)
    for images in (data.train, data.held_out):
        _check_image(images, (channels, *size), data.name)
    where = distributed.join(device)
    pruned = drain(method.prune(PruneJob(trained, data, training, where, Journal())))
    slim = cast(pruned.model, dense.dtype).to(dense.device)
    report = {
        **pruned.report,
        "method": method.model_dump(mode="json"),
        "widths": pruned.widths,
    }
    return Compressed(with_parts(pipeline, {part: slim}), report)

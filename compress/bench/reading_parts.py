"""Where the time of reading goes: preprocessing, vision encoder, prefill and decoding."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from compress.bench.timing import Marks
from compress.common.stages import watched
from compress.models.generation import replaced_method

PARTS = ("preprocess", "encoder", "prefill", "decode")


@contextmanager
def marked_parts(model: Any, marks: Marks) -> Iterator[None]:
    """Mark what :func:`compress.models.reading.try_pages` does inside, for :func:`in_parts`.

    Parameters
    ----------
    model : with its methods on it: what they do to the encoder's output counts as the encoder's.
    marks : get the spans.
    """
    # the first forward of a call of generate ends the prefill; pages may be encoded before it
    began: list[Any] = []

    def watch(name: str) -> AbstractContextManager[None]:
        if name == "generate":
            began[:] = [marks.now()]
        return marks.span(name)

    def after(*_: Any) -> None:
        if began:
            marks.add("prefill", began.pop())

    def _encode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with marks.span("encoder"):
            return original(*args, **kwargs)

    with (
        replaced_method(model.model, "get_image_features", _encode),
        watched(watch),
        model.register_forward_hook(after),
    ):
        yield


def in_parts(spans: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds of the disjoint parts of reading, from those that were marked."""
    encoder, prefill = spans.get("encoder", 0.0), spans.get("prefill", 0.0)
    return {
        "preprocess": spans.get("preprocess", 0.0),
        "encoder": encoder,
        "prefill": prefill - encoder,
        "decode": spans.get("generate", 0.0) - prefill,
    }

"""Attach a way of looking to a model, and take it off again.

What happens, call by call. ``generate``, or the model called by itself, is given ``input_ids`` and
whatever says how large the images are: a hook notes them (before generate encodes the images, and
with them drops what says so). The text model is called to read a prompt: a second hook adds the
layouts of its visual tokens under :data:`compress.models.visual.VISUAL_LAYOUTS`, unless somebody
did; another method that shortens the prompt, before or after this hook, replaces them by those of
what remains. Reading is dense and left alone. After it, a third hook looks at the layouts that the
text model was finally called with and at the cache that it filled: these make a :class:`Request`,
kept as long as the cache lives. In a decode step the second hook finds the request by the cache and
hands it down to the attention function as one more keyword. So nothing is shared between requests,
models or threads; one model serves one thread at a time (Qwen's classes keep a request's position
offsets on the model). A family that nobody tried passes a preflight ahead of its first prompt with
an image, or is refused: meanwhile the hooks sleep.
"""

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers.generation import GenerationMode

from compress.methods.fastocr.attention import NAME, REQUEST, register
from compress.methods.fastocr.crossover import crossover, read_table
from compress.methods.fastocr.state import Counts, Gaze, Pages, Request
from compress.models.cache_argument import cache_in
from compress.models.visual import (
    ADAPTERS,
    VISUAL_LAYOUTS,
    VisualLayout,
    text_model,
    visual_layouts,
)

OpenGaze = Callable[[Pages, int], Gaze]
Prompt = tuple[Sequence[VisualLayout], int]
Preflight = Callable[[Any, Mapping[str, Any]], None]  # of a model and a prompt
MinVisual = Literal["auto"] | int
LAYERS_READ = {"full_attention", "reference_sliding_attention"}  # the prompt stays in their cache

_logger = logging.getLogger(__name__)


def decoder(model: Any) -> Any:
    """The text model, whose layers are ``.layers``.

    Raises
    ------
    ValueError : naming what the model lacks.
    """
    config = model.config
    kind = config.model_type
    if kind in ADAPTERS:
        text = text_model(model)
    else:  # a family that nobody tried: what follows says whether it can work
        text = model.get_decoder()
    lacks = None
    if config.is_encoder_decoder:
        lacks = "a decoder that reads the image as part of the prompt: it is an encoder-decoder"
    elif getattr(config, "image_token_id", None) is None:
        lacks = "an image_token_id in its configuration, which says where the visual tokens are"
    elif text is model or not hasattr(text, "layers"):
        lacks = "a text model with layers"
    elif others := set(getattr(text.config, "layer_types", None) or []) - LAYERS_READ:
        lacks = f"a cache that keeps the prompt in all layers: some are {', '.join(sorted(others))}"
    if lacks:
        raise ValueError(
            f"FastOCR needs a model that decodes over cached visual tokens; {kind!r} lacks "
            f"{lacks}; use another model, or leave fastocr out"
        )
    return text


def _prompt(model: Any, inputs: dict[str, Any]) -> Prompt | None:
    """Layouts and length of a prompt, None without ``input_ids``."""
    ids = inputs.get("input_ids")
    if ids is None:
        return None
    if model.config.model_type in ADAPTERS:
        return visual_layouts(model, inputs), ids.shape[1]
    layouts = []
    for places in ids == model.config.image_token_id:  # no adapter: only the positions are known
        positions = places.nonzero()[:, 0]
        nowhere = positions.new_tensor([0, -1, -1]).expand(len(positions), -1)
        layouts.append(VisualLayout(positions, nowhere, torch.zeros_like(positions)))
    return layouts, ids.shape[1]


class Handle:
    """What an attached method has done so far."""

    def __init__(
        self,
        model: Any,
        text: Any,
        open_gaze: OpenGaze,
        preflight: Preflight | None,
        min_visual: MinVisual,
    ) -> None:
        self.model = model
        self.text = text
        self.open_gaze = open_gaze
        self.preflight = preflight  # None when it is passed, or not needed
        self.asleep = False
        self.implementations = [(c, c._attn_implementation) for c in _configs(model, text)]
        self.min_visual = min_visual
        self.table = read_table() if min_visual == "auto" else {}
        self.said: set[str] = set()
        self.counts = Counts(len(text.layers))
        self.requests: WeakKeyDictionary[Any, Request] = WeakKeyDictionary()
        # of the prompt about to be read: what the model was called with, or its layouts and length
        self._inputs: dict[str, Any] = {}
        self._prompt: Prompt | None = None
        self._own: Prompt | None = None

    def facts(self) -> dict[str, Any]:
        """What was attended to since the start or the last reset; see :class:`Counts`."""
        return self.counts.facts()

    def reset(self) -> None:
        """Count from here."""
        self.counts.reset()

    @contextmanager
    def generating(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Note a prompt while its answer is generated."""
        self._prompt = _prompt(self.model, inputs)
        try:
            yield
        finally:
            self._prompt = None

    def try_out(self, inputs: dict[str, Any]) -> None:
        """Let the model, as it was, pass the preflight before it answers a first prompt."""
        if self.preflight is None or not _has_image(self.model, inputs):
            return
        self.asleep = True
        try:
            with _implementations(self.implementations):
                self.preflight(self.model, inputs)
        finally:
            self.asleep = False
        self.preflight = None

    def before_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note what the prompt is; its layout is computed only where it is a new one."""
        if not self.asleep:
            self._inputs = kwargs

    def before_text(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the layouts to a prompt, the request to a decode step."""
        if self.asleep:
            return args, kwargs
        inputs, self._inputs, self._own = self._inputs, {}, None
        cache = cache_in(kwargs)
        given: Any = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        batch, new = given.shape[:2]
        if _length(cache) == 0:
            if VISUAL_LAYOUTS in kwargs:
                return args, kwargs
            if own := self._prompt or _prompt(self.model, inputs):
                # several answers to a prompt are several sequences
                layouts = [layout for layout in own[0] for _ in range(batch // len(own[0]))]
                self._own = layouts, own[1]
                kwargs[VISUAL_LAYOUTS] = layouts
            return args, kwargs
        request = self.requests.get(cache)
        if request and not any(request.pages.counts):  # no image: nothing to choose from
            return args, kwargs
        if request is None or request.length != _length(cache):
            raise RuntimeError(
                f"a cache with the {request.length if request else 0} tokens that were read inside "
                f"the context is expected; it has {_length(cache)}; read the whole prompt inside "
                "the context, and cut nothing off (assisted decoding does)"
            )
        if (batch, new) != (len(request.pages.counts), 1):
            raise RuntimeError(
                f"after its prompt a request of {len(request.pages.counts)} sequences reads one "
                f"token of each; got (sequences, tokens)={batch, new}; read the prompt in one "
                "call, and use greedy search or sampling"
            )
        request.start_step()
        if not request.off:
            kwargs[REQUEST] = request
        return args, kwargs

    def after_text(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Begin a request where a prompt was read into a cache."""
        if self.asleep:
            return
        cache, length = cache_in(output), output.last_hidden_state.shape[1]
        own, self._own = self._own, None
        if cache is None or _length(cache) != length:
            return
        layouts = kwargs.get(VISUAL_LAYOUTS)
        if layouts is None:
            raise ValueError(
                "the whole model's call with input_ids is expected, which say where the visual "
                "tokens are; got none; do not pass inputs_embeds or call the text model alone"
            )
        if own and own[0] is layouts and own[1] != length:
            raise ValueError(
                f"the prompt has {own[1]} positions, but the text model read {length}; a method "
                f"that shortens the prompt hands the text model {VISUAL_LAYOUTS}= of what remains"
            )
        pages = Pages.of(layouts, length, output.last_hidden_state.device)
        if self.preflight is not None and any(pages.counts):
            raise ValueError(
                "nobody tried FastOCR on this family, so that model.generate tries two steps of "
                f"the first prompt with an image; got a call of {self.model.config.model_type!r} "
                "instead; generate once before a loop of your own"
            )
        gaze = self.open_gaze(pages, len(self.text.layers))
        off = self._off(max(pages.counts), pages.rows.device)
        self.requests[cache] = Request(pages, gaze, self.counts, off)

    def _off(self, visual: int, device: torch.device) -> bool:
        """Whether a request is better off with dense attention; says once why."""
        least, why = self.min_visual, "min_visual"
        if least == "auto":
            least, why = crossover(device, self.table)
            if why not in self.said and not least:
                self.said.add(why)
                _logger.info("fastocr stays on whatever the number of visual tokens: %s", why)
        if not 0 < visual < least:
            return False
        if "off" not in self.said:
            self.said.add("off")
            _logger.warning(
                "fastocr switched itself off: %d visual tokens, and below %d dense decoding is "
                "faster (%s); min_visual=0 keeps it on",
                visual,
                least,
                why,
            )
        return True


def _length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


@contextmanager
def _implementations(names: Sequence[tuple[Any, str | None]]) -> Iterator[None]:
    """Let configurations name these attention functions inside."""
    before = [(config, config._attn_implementation) for config, _ in names]
    try:
        for config, name in names:
            config._attn_implementation = name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _has_image(model: Any, inputs: Mapping[str, Any]) -> bool:
    ids = inputs.get("input_ids")
    return ids is not None and bool((ids == model.config.image_token_id).any())


@contextmanager
def attached(
    model: Any,
    open_gaze: OpenGaze,
    preflight: Preflight | None = None,
    min_visual: MinVisual = 0,
) -> Iterator[Handle]:
    """Let the decode steps of ``model`` look as gazes say, until the context is left.

    Parameters
    ----------
    model : a vision-language model of transformers.
    open_gaze : (pages, number of layers) to the gaze of a new request.
    preflight : raises ValueError where (model, inputs of generate) do not go; called once, ahead of
        the first answer to a prompt with an image, with the model as it was.
    min_visual : visual tokens below which a request is decoded densely; "auto" looks them up.

    Raises
    ------
    ValueError : when the model lacks something (named), or one is attached already.
    """
    text = decoder(model)
    handle = Handle(model, text, open_gaze, preflight, min_visual)
    if NAME in [name for _, name in handle.implementations]:
        raise ValueError(
            "FastOCR is attached to this model already, or to one that shares its configuration; "
            "leave that context first, or copy the model"
        )
    register()
    with ExitStack() as stack:
        stack.enter_context(_implementations([(c, NAME) for c, _ in handle.implementations]))
        for hook in (
            model.base_model.register_forward_pre_hook(handle.before_model, with_kwargs=True),
            text.register_forward_pre_hook(handle.before_text, with_kwargs=True),
            text.register_forward_hook(handle.after_text, with_kwargs=True),
        ):
            stack.callback(hook.remove)
        stack.callback(_restore, model, "generate", vars(model).get("generate"))
        model.generate = _checked(model, model.generate, handle)
        yield handle


def _configs(model: Any, text: Any) -> list[Any]:
    """The text configuration, and its copies: layers read theirs, generate the model's own."""
    found = [model.config.get_text_config(), *(getattr(m, "config", None) for m in text.modules())]
    return list({id(config): config for config in found if config is not None}.values())


def _restore(model: Any, name: str, before: Any) -> None:
    if before is None:
        delattr(model, name)
    else:
        setattr(model, name, before)


def _checked(model: Any, generate: Callable[..., Any], handle: Handle) -> Callable[..., Any]:
    """``generate`` that notes its prompt and refuses what would move or cut the cache."""
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def _generate(*args: Any, **kwargs: Any) -> Any:
        if handle.asleep:
            return generate(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        settings = copy.deepcopy(model.generation_config)
        if given.get("generation_config") is not None:
            own = given["generation_config"].to_dict()
            settings.update(**{name: value for name, value in own.items() if value is not None})
        others = given.get("kwargs", {})
        prompt = settings.update(**others)
        mode = settings.get_generation_mode(given.get("assistant_model"))
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"FastOCR decodes by greedy search or sampling; got {mode.value}, which moves or "
                "cuts the cache; pass num_beams=1 and no assistant"
            )
        if settings.use_cache is False:
            raise ValueError(
                "FastOCR chooses what is read from the cache; got use_cache=False; leave it out"
            )
        # on a GPU transformers compiles the steps of a static cache, which these hooks cannot be
        if given.get("generation_config") is not None:
            given["generation_config"] = copy.deepcopy(given["generation_config"])
            given["generation_config"].disable_compile = True
        else:
            given["kwargs"] = {**others, "disable_compile": True}
        ids = given.get("inputs")
        prompt = prompt if ids is None else {**prompt, "input_ids": ids}
        kept = settings.cache_implementation
        handle.try_out(prompt if kept is None else {**prompt, "cache_implementation": kept})
        with handle.generating(prompt):
            return generate(*call.args, **call.kwargs)

    return _generate

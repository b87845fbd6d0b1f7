"""Hooks that let a model decode by an attention policy until a context is left.

In the order of their calls:

1. ``generate`` notes the prompt before it encodes the images, since it drops the inputs that say
   how large they are. A forward hook of the base model notes the inputs of a call without it.
2. A hook before the text model adds the layouts of a prompt's visual tokens under
   :data:`compress.models.visual.VISUAL_LAYOUTS`, unless they are there. Another method that
   shortens the prompt, before or after this hook, replaces them by those of what remains. The
   prompt itself is read densely.
3. A hook behind the text model takes the layouts that it was finally called with and the cache that
   it filled, and makes a :class:`DecodeState`, kept as long as the cache lives.
4. In a decode step the hook before the text model finds the state by the cache, and the text
   model's forward hands it down to the attention function as one more keyword. Where transformers
   would compile the steps (``generate`` with a static cache on a GPU, without ``disable_compile``),
   they are captured as a CUDA graph, as soon as two of them did the same.
5. A later turn, of several tokens into the same cache, is read densely. The fixation goes on; where
   the turn brings pages, their tokens join those of the pages before, in a new state.

So batches, models and threads share nothing; one model serves one thread at a time (Qwen's classes
keep the position offsets of a batch on the model). A family without an adapter passes a preflight
before its first prompt with an image, or is refused; the hooks are paused meanwhile.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig
from transformers.cache_utils import StaticLayer
from transformers.generation import GenerationMode

from compress.methods.fastocr.attention import NAME, STATE, register
from compress.methods.fastocr.choosing import SummaryPolicy
from compress.methods.fastocr.crossover import crossover, read_table
from compress.methods.fastocr.policy import AttentionPolicy
from compress.methods.fastocr.state import Counts, DecodeState
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.cache_argument import cache_in
from compress.models.captured_call import CapturedCall, kinds_of
from compress.models.generation import checked_generation, replaced_method, static_caches
from compress.models.growing_cache import growing_caches
from compress.models.visual import (
    ADAPTERS,
    VISUAL_LAYOUTS,
    VisualLayout,
    text_model,
    unplaced,
    visual_layouts,
)

MakePolicy = Callable[[VisualTokens, int], AttentionPolicy | SummaryPolicy]
Preflight = Callable[[Any, Mapping[str, Any]], None]  # of a model and the inputs of generate
MinVisual = Literal["auto"] | int
SLIDING = "reference_sliding_attention"  # over the answer alone
FULL_CACHES = {"full_attention", SLIDING}  # which keep the whole prompt

_logger = logging.getLogger(__name__)


def decoder(model: Any) -> Any:
    """The text model, whose layers are ``.layers``.

    Raises
    ------
    ValueError : naming what the model lacks.
    """
    config = model.config
    kind = config.model_type
    # without an adapter the checks below say whether the model can work
    text = text_model(model) if kind in ADAPTERS else model.get_decoder()
    lacks = None
    if config.is_encoder_decoder:
        lacks = "a decoder that reads the image as part of the prompt: it is an encoder-decoder"
    elif getattr(config, "image_token_id", None) is None:
        lacks = "an image_token_id in its configuration, which says where the visual tokens are"
    elif text is model or not hasattr(text, "layers"):
        lacks = "a text model with layers"
    elif others := set(getattr(text.config, "layer_types", None) or []) - FULL_CACHES:
        lacks = f"a cache that keeps the prompt in all layers: some are {', '.join(sorted(others))}"
    if lacks:
        raise ValueError(
            f"FastOCR needs a model that decodes over cached visual tokens; {kind!r} lacks "
            f"{lacks}; use another model, or leave fastocr out"
        )
    return text


@contextmanager
def attached(
    model: Any,
    make_policy: MakePolicy,
    preflight: Preflight | None = None,
    min_visual: MinVisual = 0,
) -> Iterator["Handle"]:
    """Let the decode steps of ``model`` attend as policies decide, until the context is left.

    Parameters
    ----------
    model : a vision-language model of transformers.
    make_policy : (visual tokens, number of layers) to the policy of a new batch.
    preflight : raises ValueError where a model does not work; called once, before the first answer
        to a prompt with an image, with the model as it was.
    min_visual : visual tokens below which a batch is decoded densely; "auto" looks them up.

    Raises
    ------
    ValueError : when the model lacks something (named), or one is attached already.
    """
    text = decoder(model)
    handle = Handle(model, text, make_policy, preflight, min_visual)
    if NAME in [name for _, name in handle.implementations]:
        raise ValueError(
            "FastOCR is attached to this model already, or to one that shares its configuration; "
            "leave that context first, or copy the model"
        )
    register()
    with ExitStack() as stack:
        for context in (
            _implementations([(config, NAME) for config, _ in handle.implementations]),
            model.base_model.register_forward_pre_hook(handle.before_model, with_kwargs=True),
            text.register_forward_pre_hook(handle.before_text, with_kwargs=True),
            text.register_forward_hook(handle.after_text, with_kwargs=True),
            replaced_method(text, "forward", handle.step),
            replaced_method(model, "generate", handle.generate),
            checked_generation(model, handle.check),
            growing_caches(model),
            static_caches(model, handle.captures),
        ):
            stack.enter_context(context)
        yield handle


class Handle:
    """What an attached method counted, and its hooks."""

    def __init__(
        self,
        model: Any,
        text: Any,
        make_policy: MakePolicy,
        preflight: Preflight | None,
        min_visual: MinVisual,
    ) -> None:
        self.model = model
        self.text = text
        self.make_policy = make_policy
        self.preflight = preflight  # None when it is passed, or not needed
        self.paused = False
        # layers read their own copy of the configuration, generate that of the model
        configs = [model.config.get_text_config()]
        configs += [m.config for m in text.modules() if getattr(m, "config", None) is not None]
        unique = {id(config): config for config in configs}.values()
        self.implementations = [(config, config._attn_implementation) for config in unique]
        self.min_visual = min_visual
        self.table = read_table() if min_visual == "auto" else {}
        self.warned = False
        self.slides = SLIDING in (getattr(text.config, "layer_types", None) or [])
        self.counts = Counts(len(text.layers))
        self.states: WeakKeyDictionary[Any, DecodeState] = WeakKeyDictionary()
        # of the prompt about to be read: what generate or the model was called with, and what
        # before_text made of it
        self._generated: dict[str, Any] = {}
        self._inputs: dict[str, Any] = {}
        self._own: tuple[Sequence[VisualLayout], int] | None = None
        self._stepped: DecodeState | None = None  # of a call that is a decode step
        self._captures = False  # whether generate lets its steps be captured
        self._refused = False  # whether a step of this model could not be

    def captures(self) -> bool:
        """Whether decode steps over a static cache, where one is asked for, are captured."""
        return (
            _records(self.model.device)
            and self.model._can_compile_fullgraph
            and not (self._spread or self.slides or self._refused)
        )

    @property
    def _spread(self) -> bool:
        """Whether the parts of the model are on several devices, which are not one graph."""
        return len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1

    def facts(self) -> dict[str, Any]:
        """What was attended to since the start or the last reset; see :class:`Counts`."""
        return self.counts.facts()

    def reset(self) -> None:
        """Count from zero."""
        self.counts.reset()

    # ---- generate ----------------------------------------------------------------------------

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the prompt while its answer is generated."""
        if self.paused:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        self._generated = dict(call.get("kwargs", {}))
        if call.get("inputs") is not None:
            self._generated["input_ids"] = call["inputs"]
        cache = cache_in(self._generated)
        # of a static cache that was emptied, a prompt of one token would pass for a decode step
        if cache is not None and not int(cache.get_seq_length()):
            self.states.pop(cache, None)
        try:
            return original(*args, **kwargs)
        finally:
            self._generated, self._captures, self._stepped = {}, False, None

    def check(self, mode: GenerationMode, config: GenerationConfig) -> None:
        """Refuse what would move or cut the cache; run the preflight where one is due."""
        if self.paused:
            return
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ValueError(
                f"FastOCR decodes by greedy search or sampling; got {mode.value}, which moves or "
                "cuts the cache; pass num_beams=1 and no assistant"
            )
        if config.use_cache is False:
            raise ValueError(
                "FastOCR chooses what is read from the cache; got use_cache=False; leave it out"
            )
        if config.prefill_chunk_size is not None:
            raise ValueError(
                "FastOCR reads a prompt in one call, where it finds the pages; got "
                f"prefill_chunk_size={config.prefill_chunk_size}; leave it out"
            )
        self._captures = not config.disable_compile and not self._spread
        ids = self._generated.get("input_ids")
        if self.preflight is None or ids is None:
            return
        if not bool((ids == self.model.config.image_token_id).any()):
            return
        prompt = {k: v for k, v in self._generated.items() if not hasattr(config, k)}
        if config.cache_implementation is not None:
            prompt["cache_implementation"] = config.cache_implementation
        self.paused = True
        try:
            with _implementations(self.implementations):
                self.preflight(self.model, prompt)
        finally:
            self.paused = False
        self.preflight = None

    # ---- forward hooks -------------------------------------------------------------------------

    def before_model(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the inputs; their layouts are computed only where they are a new prompt."""
        if not self.paused:
            self._inputs = kwargs

    def before_text(self, module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the layouts to a prompt, the state to a decode step."""
        if self.paused:
            return args, kwargs
        inputs, self._inputs, self._own = self._inputs, {}, None
        self._stepped = None
        cache = cache_in(kwargs)
        embeds: Any = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        batch, new = embeds.shape[:2]
        filled = self._filled(cache, new)
        if filled:
            state = self._state(cache, filled, batch)
            if new == 1:
                self._stepped = state
                return args, kwargs
        if self._generated.get("input_ids") is not None:
            inputs = self._generated
        ids = inputs.get("input_ids")
        if VISUAL_LAYOUTS not in kwargs and ids is not None:
            ids = ids[:, -new:] if filled else ids  # of a later turn generate may be given all
            layouts = _layouts(self.model, {**inputs, "input_ids": ids})
            # several answers to a prompt are several sequences
            layouts = [layout for layout in layouts for _ in range(batch // len(layouts))]
            self._own = layouts, ids.shape[1]
            kwargs[VISUAL_LAYOUTS] = layouts
        return args, kwargs

    def step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the text model; a decode step as a replay where it was captured."""
        state = self._stepped
        if state is None or self.paused:
            return original(*args, **kwargs)

        def begun(inputs: dict[str, Any]) -> Any:
            state.start_step()
            try:
                output = original(*args, **inputs, **({} if state.off else {STATE: state}))
            except BaseException:  # an interrupt, too
                state.counts.forget()
                raise
            state.counts.settle()
            return output

        captures = not args and self._captures and _fixed(cache_in(kwargs))
        output = self._captured(state, begun, kwargs) if captures else begun(kwargs)
        state.count_dense()
        return output

    def _captured(
        self, state: DecodeState, begun: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run a decode step over a static cache: the third that did the same is captured."""
        cache = cache_in(kwargs)
        # a state lives as long as its cache, and must not keep it
        [place] = [name for name, value in kwargs.items() if value is cache]
        inputs = {name: value for name, value in kwargs.items() if name != place}

        def run(inputs: dict[str, Any]) -> Any:
            output = begun({**inputs, place: cache})
            return type(output), {k: None if v is cache else v for k, v in output.items()}

        kinds, before = kinds_of(inputs), state.kinds
        state.kinds = kinds
        if state.captured and not state.begins_piece and state.captured.fits(inputs):
            state.length += 1
            state.captured.replay(inputs)
        elif (
            state.repeated > 1
            and kinds == before  # those of a prompt that was shortened may grow
            and not state.captured
            and not state.begins_piece
        ):
            try:
                state.captured = CapturedCall(run, inputs, cache.layers[0].device)
            except ValueError:
                self._refused = True
                raise
        else:
            return begun(kwargs)
        kind, values = state.captured.output
        return kind(**{k: cache if v is None else v for k, v in values.items()})

    def _filled(self, cache: Any, new: int) -> int:
        """Tokens in a cache that so many are added to, or were.

        The length of a static cache is on the device, and a decode step does not wait for it: there
        it is what the steps before it came to.
        """
        length = 0 if cache is None else cache.get_seq_length()
        if isinstance(length, int):
            return length
        state = self.states.get(cache) if new == 1 else None
        return int(length) if state is None else state.length

    def _state(self, cache: Any, filled: int, batch: int) -> DecodeState:
        """That of a cache with so many tokens of so many sequences."""
        state = self.states.get(cache)
        if state is None or state.length != filled:
            raise ValueError(
                f"FastOCR expects a cache with the {state.length if state else 0} tokens that were "
                f"read inside its context; it has {filled}; read the whole prompt inside, and "
                "neither copy the cache nor cut anything off (assisted decoding does)"
            )
        if batch != len(state.tokens.counts):
            raise ValueError(
                f"FastOCR goes on with all {len(state.tokens.counts)} sequences of a cache; got "
                f"{batch}; start a new prompt"
            )
        return state

    def after_text(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Make a state where a prompt was read into a cache, or a later turn."""
        if self.paused:
            return
        cache, new = cache_in(output), output.last_hidden_state.shape[1]
        own, self._own = self._own, None
        stepped, self._stepped = self._stepped, None
        if cache is None or stepped is not None:
            return
        filled = self._filled(cache, new) - new
        layouts = kwargs.get(VISUAL_LAYOUTS)
        if layouts is None:
            raise ValueError(
                "FastOCR expects a call of the whole model with input_ids, which say where the "
                "visual tokens are; got none; do not pass inputs_embeds or call the text model "
                "alone"
            )
        if own and own[0] is layouts and own[1] != new:
            raise ValueError(
                f"FastOCR expects the {own[1]} positions of the prompt; the text model read {new}; "
                f"whatever shortens a prompt hands the text model {VISUAL_LAYOUTS}= of what remains"
            )
        if filled:
            state = self.states[cache]
            # a sliding window forgets the pages of later turns, so there is no choosing from them
            if self.slides or not any(len(layout.positions) for layout in layouts):
                state.follow(new)
                return
            layouts = [
                before.followed_by(later, filled)
                for before, later in zip(state.tokens.layouts, layouts, strict=True)
            ]
        device = output.last_hidden_state.device
        least, why = self.min_visual, "min_visual"
        if least == "auto":
            least, why = crossover(device, self.table)
        tokens = VisualTokens.of(layouts, filled + new, device, least)
        if self.preflight is not None and any(tokens.counts):
            raise ValueError(
                f"FastOCR has no adapter for {self.model.config.model_type!r}, so model.generate "
                "tries two steps of its first prompt with an image; got another call of the model "
                "before that; generate once before a loop of your own"
            )
        if any(tokens.small) and not self.warned:
            self.warned = True
            _logger.warning(
                "fastocr switched itself off: %d visual tokens, and below %d dense decoding is "
                "faster (%s); min_visual=0 keeps it on",
                tokens.counts[tokens.small.index(True)],
                least,
                why,
            )
        policy = self.make_policy(tokens, len(self.text.layers))
        self.states[cache] = DecodeState(tokens, policy, self.counts)


def _fixed(cache: Any) -> bool:
    """Whether a cache is on a GPU, and reading it is the same in every step: not one that grows."""
    layers = getattr(cache, "layers", [])
    return {type(layer) for layer in layers} == {StaticLayer} and _records(layers[0].device)


def _records(device: torch.device) -> bool:
    """Whether calls on a device can be captured."""
    return device.type == "cuda"


def _layouts(model: Any, inputs: Mapping[str, Any]) -> list[VisualLayout]:
    """Where the visual tokens of a prompt are; without an adapter their positions alone."""
    if model.config.model_type in ADAPTERS:
        return visual_layouts(model, inputs)
    return unplaced((inputs["input_ids"] == model.config.image_token_id).cpu())


@contextmanager
def _implementations(names: Sequence[tuple[Any, str | None]]) -> Iterator[None]:
    """Let configurations name these attention functions until the context is left."""
    before = [(config, config._attn_implementation) for config, _ in names]
    try:
        for config, name in names:
            config._attn_implementation = name
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name

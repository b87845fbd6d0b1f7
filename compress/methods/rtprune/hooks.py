"""Hooks that shorten the prompt of a model's decoder until a context is left.

Three forward hooks and two replaced methods. ``get_image_features`` is where pages are encoded
(``generate`` calls it before the model). The decoder's hook shortens a prompt with pages; later
steps, which count the whole prompt, get the mask of what is in the cache.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerationMode

from compress.common.stages import stage
from compress.methods.rtprune.encoder_attention import EncoderRecorder
from compress.methods.rtprune.encoding import encoded_pages
from compress.methods.rtprune.pages import Handle, PrunedPage, prune_pages
from compress.methods.rtprune.prompt import ShortenedPrompt
from compress.methods.rtprune.sequence import attended_tokens, pages_in, shortened
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.generation import checked_generation, replaced_method
from compress.models.visual import (
    VISUAL_LAYOUTS,
    VisualLayout,
    adapter_for,
    layouts_of,
    text_model,
)

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune

FAMILIES = ("unlimited_ocr", "deepseek_ocr2")  # DeepSeek-OCR is an unlimited_ocr


@contextmanager
def attached(method: "RTPrune", model: Any) -> Iterator[Handle]:
    """:meth:`RTPrune.attach`."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            "RTPrune prunes DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2; got "
            f"{adapter_for(model.config).name} (model_type={model.config.model_type!r}); choose a "
            "model of these"
        )
    present = model._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), _Hooks) for hook in present):
        raise ValueError(
            "a model can be pruned by one RTPrune at a time; this one is being pruned already; "
            "leave the first context"
        )
    hooks = _Hooks(method, model)
    with ExitStack() as stack:
        if method.select == "visionzip":
            encoder = model.model.vision_tower.vision_encoder
            stack.enter_context(hooks.recorder.recording(encoder))
        stack.enter_context(replaced_method(model.model, "get_image_features", hooks._encode))
        stack.enter_context(checked_generation(model, hooks.check_generation))
        for module, hook in (
            (model, hooks.check_call),
            (model.model, hooks.begin),
            (text_model(model), hooks.shorten),
        ):
            # before the hooks of other methods, which then see what is left
            stack.enter_context(
                module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            )
        yield hooks.handle


@dataclass
class _Call:
    """A prompt between the model and its decoder."""

    input_ids: torch.Tensor | None
    encoded: Any


class _Hooks:
    """The state of one attached method, and its hooks."""

    def __init__(self, method: "RTPrune", model: Any) -> None:
        self.method = method
        self.model = model
        self.handle = Handle()
        self.recorder = EncoderRecorder()
        self.call: _Call | None = None
        self.pages: Any = WeakTensorKeyDictionary()  # features of a page -> EncodedPage
        self.prompts: WeakKeyDictionary[Any, ShortenedPrompt] = WeakKeyDictionary()  # by cache

    # ---- around the model ------------------------------------------------------------------------

    def check_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what has no meaning for a prompt that gets shorter."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "a model under RTPrune gives no loss: there are no logits at the places that it "
                "prunes; got labels; leave the context to train, or call without labels"
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise ValueError(
                "under RTPrune logits_to_keep is a number of last places, as the others move; got "
                "a tensor of places; give a number"
            )

    def check_generation(self, mode: GenerationMode, config: GenerationConfig) -> None:
        """Refuse to generate in ways that cut a prompt or take tokens back."""
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "RTPrune generates greedily, by sampling or with beams; got assisted generation, "
                "whose drafts would count as prompt; leave out the assistant or prompt lookup"
            )
        if config.prefill_chunk_size is not None:
            raise ValueError(
                "RTPrune prunes a page as a whole; got prefill_chunk_size="
                f"{config.prefill_chunk_size}, which cuts it; leave it out"
            )

    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the pages that the encoder encodes."""
        self.recorder.captured.clear()
        output = original(*args, **kwargs)
        if isinstance(output, tuple):  # return_dict=False: called by neither the model nor generate
            return output
        inputs = inspect.signature(original).bind(*args, **kwargs).arguments
        features = output.pooler_output
        with stage("selection"):
            pages = encoded_pages(self.method, self.model, features, inputs, self.recorder.captured)
        for of_page, page in zip(features, pages, strict=True):
            self.pages[of_page] = page
        if self.call is not None:
            self.call.encoded = output
        return output

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the prompt that is on its way to the decoder."""
        encoded = kwargs.get("mm_encoder_outputs") or {}
        self.call = _Call(kwargs.get("input_ids"), encoded.get("image"))

    # ---- at the decoder --------------------------------------------------------------------------

    def shorten(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Shorten a prompt with pages; give later steps the mask of what is in the cache."""
        call, self.call = self.call, None
        cache = cache_in(kwargs)
        filled = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and not filled:
            self.prompts.pop(cache, None)  # of an earlier prompt: the cache was reset
        if call is not None and call.encoded is not None:
            with stage("selection"):
                return args, self._shortened(call, filled, kwargs)
        if filled and cache in self.prompts:
            return args, self.prompts[cache].step(filled, kwargs)
        return None

    def _shortened(self, call: _Call, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords for a prompt with pages."""
        if call.input_ids is None or filled:
            came = "no input_ids" if call.input_ids is None else f"a cache of {filled} tokens"
            raise ValueError(
                "RTPrune prunes the pages of a first prompt and finds them by its input_ids; got "
                f"{came}; start a new prompt, and give its input_ids"
            )
        embeds = kwargs["inputs_embeds"]
        batch, length, dim = embeds.shape
        attended = attended_tokens(kwargs.get("attention_mask"), batch, length)
        is_visual = (call.input_ids == self.model.config.image_token_id).cpu()
        encoded = call.encoded.pooler_output
        if any(features not in self.pages for features in encoded):
            raise ValueError(
                "RTPrune has to see which page features come from; got mm_encoder_outputs that "
                "were made outside of its context; make them inside, or give pixel_values"
            )
        layouts = layouts_of(is_visual, [self.pages[features].grid for features in encoded])
        where = pages_in(layouts)
        pruned = self._pruned(encoded, where, embeds, attended & ~is_visual)
        if all(values is None for _, values in pruned):
            return kwargs
        stays, embeds = attended.clone(), embeds.clone()
        for (row, positions), (page, values) in zip(where, pruned, strict=True):
            if values is not None:
                stays[row, positions] = False
                stays[row, positions[page.kept_indices]] = True
                embeds[row, positions[page.kept_indices]] = values
        source = shortened(stays, attended)
        layouts = [layout.of_kept(row) for layout, row in zip(layouts, source, strict=True)]
        source = source.to(embeds.device)
        mask, source = source >= 0, source.clamp(min=0)
        ids = kwargs.get("position_ids")
        ids = torch.arange(length, device=embeds.device)[None] if ids is None else ids
        ids = ids.expand(batch, -1)
        prompt = ShortenedPrompt(mask, length - mask.shape[1], ids[:, -1:] + 1)
        return kwargs | {
            "inputs_embeds": embeds.gather(1, source[..., None].expand(-1, -1, dim)),
            "attention_mask": mask.long(),
            "position_ids": ids.gather(1, source),
            cache_argument(text_model(self.model)): self._cache(prompt, kwargs),
            VISUAL_LAYOUTS: [
                VisualLayout(
                    *(part.to(ids.device) for part in (at.positions, at.grid, at.image_of))
                )
                for at in layouts
            ],
        }

    def _cache(self, prompt: ShortenedPrompt, kwargs: dict[str, Any]) -> Any:
        """The cache that the shortened prompt goes into, if any, which now belongs to it."""
        cache, use_cache = cache_in(kwargs), kwargs.get("use_cache")
        config = text_model(self.model).config
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)  # as the decoder would
        if cache is not None:
            self.prompts[cache] = prompt
            for layer in cache.layers:
                # Unlimited-OCR: generate declares the length of the prompt; let the layer see it
                if getattr(layer, "prefill_length", None) is not None:
                    layer.prefill_length = None
        return cache

    def _pruned(
        self,
        encoded: Sequence[torch.Tensor],
        where: Sequence[tuple[int, torch.Tensor]],
        embeds: torch.Tensor,
        is_text: torch.Tensor,
    ) -> list[tuple[PrunedPage, torch.Tensor | None]]:
        """Each page pruned, those that several sequences share (beams, several answers) once."""
        first: dict[int, int] = {}
        for number, features in enumerate(encoded):
            first.setdefault(id(features), number)
        numbers = list(first.values())
        instructions = []
        for row, positions in (where[number] for number in numbers):
            text = is_text[row].nonzero()[:, 0]
            instructions.append(embeds[row, text[text > positions[-1]]])
        pruned = prune_pages(
            self.method,
            [self.pages[encoded[number]] for number in numbers],
            [embeds[where[number]] for number in numbers],
            instructions,
            self.model.model.multi_modal_projector.bias,
        )
        self.handle.pages += [page for page, _ in pruned]
        by_features = dict(zip(first, pruned, strict=True))
        return [by_features[id(features)] for features in encoded]

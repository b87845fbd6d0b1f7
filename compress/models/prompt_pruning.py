"""Leave visual tokens out of the prompts of a running model until a context is left.

What such methods have in common: ``get_image_features`` is where pages are encoded (``generate``
calls it before the model); a hook before the decoder shortens a prompt with pages, and gives later
steps, which count the whole prompt, the mask of what is in the cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerationMode

from compress.common.stages import stage
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.generation import checked_generation, replaced_method
from compress.models.shortened_prompt import ShortenedPrompt, attended_tokens, pages_in, shortened
from compress.models.visual import VISUAL_LAYOUTS, VisualLayout, layouts_of, text_model


class Page(Protocol):
    """A page that the vision encoder has encoded; its ``grid`` is that of a `VisualLayout`."""

    @property
    def grid(self) -> torch.Tensor:
        """(view, row, column) of its visual tokens, ``(tokens, 3)``, on the CPU."""
        ...


P = TypeVar("P", bound=Page)


class PrunedPages:
    """What was pruned since the start or the last :meth:`reset`.

    Parameters
    ----------
    counts : of the facts of a page, those that are summed over all pages.

    Attributes
    ----------
    pages : one for each that was pruned, in their order; its ``facts()`` are JSON.
    """

    def __init__(self, *counts: str) -> None:
        self.counts = counts
        self.pages: list[Any] = []

    def facts(self) -> dict[str, Any]:
        """Facts of each page, and the counts of all together, for JSON."""
        pages = [page.facts() for page in self.pages]
        total = {name: sum(page[name] for page in pages) for name in self.counts}
        return {"pages": pages, "total": total}

    def reset(self) -> None:
        """Forget the pages."""
        self.pages.clear()


@dataclass
class Prompt(Generic[P]):
    """A batch of prompts before the decoder.

    Parameters
    ----------
    pages : that they hold; one that several sequences share (beams, several answers) is there
        several times.
    features : of all visual tokens of each, ``(visual tokens, dim)``.
    embeds : of all tokens, ``(batch, length, dim)``.
    masks : which tokens are not padding, and which are visual, ``(2, batch, length)`` bool, on the
        device; use :attr:`attended` and :attr:`is_visual`.
    """

    pages: Sequence[P]
    features: Sequence[torch.Tensor]
    embeds: torch.Tensor
    masks: torch.Tensor

    def fetch(self, facts: torch.Tensor) -> torch.Tensor:
        """Facts on the device, on the CPU; the masks come along, so the device is waited for once.

        Until then, nothing should look at what is computed from the masks.
        """
        parts = facts.contiguous(), self.masks.to(facts.device)
        flat = torch.cat([part.flatten().view(torch.uint8) for part in parts]).cpu()
        of_facts, of_masks = flat.split([part.nbytes for part in parts])
        self._fetched = of_masks.view(torch.bool).view_as(self.masks)
        return of_facts.view(facts.dtype).view_as(facts)

    @cached_property
    def _fetched(self) -> torch.Tensor:
        return self.masks.cpu()

    @property
    def attended(self) -> torch.Tensor:
        """Which tokens are not padding, ``(batch, length)`` bool, on the CPU."""
        return self._fetched[0]

    @property
    def is_visual(self) -> torch.Tensor:
        """Which tokens are visual, ``(batch, length)`` bool, on the CPU."""
        return self._fetched[1]

    @cached_property
    def layouts(self) -> list[VisualLayout]:
        """Where each sequence has its visual tokens."""
        return layouts_of(self.is_visual, [page.grid for page in self.pages])

    @cached_property
    def where(self) -> list[tuple[int, torch.Tensor]]:
        """Sequence and positions of each page, ``(tokens,)``."""
        return pages_in(self.layouts)


@dataclass(frozen=True)
class Choice:
    """What becomes of a page.

    Parameters
    ----------
    kept : which of its tokens stay, ascending, on the CPU, ``(kept,)``.
    changed : those among them that change, on the CPU, ``(changed,)``, and what they become,
        ``(changed, dim)``; None where none does.
    """

    kept: torch.Tensor
    changed: tuple[torch.Tensor, torch.Tensor] | None = None


# the arguments of get_image_features, behind itself, to its output and one page for each of its
# features
Encode = Callable[..., tuple[Any, Sequence[P]]]
# for each page of a prompt; None where all of it stays as it is
Choose = Callable[[Prompt[P]], Sequence[Choice | None]]


@dataclass
class _Call:
    """A prompt between the model and its decoder."""

    input_ids: torch.Tensor | None
    encoded: Any


class PromptPruning(Generic[P]):
    """The hooks by which one method leaves visual tokens out of the prompts of one model.

    Parameters
    ----------
    method : its name, for messages.
    model : of a family with an adapter.
    encode, choose : what the method does with pages.
    """

    def __init__(self, method: str, model: Any, encode: Encode[P], choose: Choose[P]) -> None:
        self.method = method
        self.model = model
        self.encode = encode
        self.choose = choose
        self.call: _Call | None = None
        self.pages: Any = WeakTensorKeyDictionary()  # features of a page -> the page
        self.prompts: WeakKeyDictionary[Any, ShortenedPrompt] = WeakKeyDictionary()  # by cache

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Prune the prompts of the model until the context is left.

        Raises
        ------
        ValueError : when they are being pruned already.
        """
        model = self.model
        present = model._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), PromptPruning) for hook in present):
            raise ValueError(
                f"one method at a time prunes the prompts of a model; {self.method} was given one "
                "that is being pruned already; leave the first context"
            )
        with ExitStack() as stack:
            stack.enter_context(replaced_method(model.model, "get_image_features", self._encode))
            stack.enter_context(checked_generation(model, self.check_generation))
            for module, hook in (
                (model, self.check_call),
                (model.model, self.begin),
                (text_model(model), self.shorten),
            ):
                # before the hooks of other methods, which then see what is left
                stack.enter_context(
                    module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                )
            yield

    # ---- around the model ------------------------------------------------------------------------

    def check_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what has no meaning for a prompt that gets shorter."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                f"a model under {self.method} gives no loss: there are no logits at the places "
                "that it prunes; got labels; leave the context to train, or call without labels"
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise ValueError(
                f"under {self.method} logits_to_keep is a number of last places, as the others "
                "move; got a tensor of places; give a number"
            )

    def check_generation(self, mode: GenerationMode, config: GenerationConfig) -> None:
        """Refuse to generate in ways that cut a prompt or take tokens back."""
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"{self.method} generates greedily, by sampling or with beams; got assisted "
                "generation, whose drafts would count as prompt; leave out the assistant or prompt "
                "lookup"
            )
        if config.prefill_chunk_size is not None:
            raise ValueError(
                f"{self.method} prunes a page as a whole; got prefill_chunk_size="
                f"{config.prefill_chunk_size}, which cuts it; leave it out"
            )

    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the pages that the encoder encodes."""
        output, pages = self.encode(original, *args, **kwargs)
        if isinstance(output, tuple):  # return_dict=False: called by neither the model nor generate
            return output
        for features, page in zip(output.pooler_output, pages, strict=True):
            self.pages[features] = page
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
            return args, self.prompts[cache].step(filled, kwargs, module.config)
        return None

    def _shortened(self, call: _Call, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords for a prompt with pages."""
        if call.input_ids is None or filled:
            came = "no input_ids" if call.input_ids is None else f"a cache of {filled} tokens"
            raise ValueError(
                f"{self.method} prunes the pages of a first prompt and finds them by its "
                f"input_ids; got {came}; start a new prompt, and give its input_ids"
            )
        embeds = kwargs["inputs_embeds"]
        batch, length, dim = embeds.shape
        is_visual = call.input_ids == self.model.config.image_token_id
        attended = attended_tokens(kwargs.get("attention_mask"), is_visual)
        encoded = call.encoded.pooler_output
        if any(features not in self.pages for features in encoded):
            raise ValueError(
                f"{self.method} has to see which page features come from; got mm_encoder_outputs "
                "that were made outside of its context; make them inside, or give pixel_values"
            )
        pages = [self.pages[features] for features in encoded]
        features = [page.to(embeds) for page in encoded]
        whole = Prompt(pages, features, embeds, torch.stack([attended, is_visual]))
        choices = self.choose(whole)
        attended, layouts = whole.attended, whole.layouts
        if all(choice is None for choice in choices):
            return kwargs
        stays, places, values = attended.clone(), [], []
        for (row, positions), choice in zip(whole.where, choices, strict=True):
            if choice is not None:
                stays[row, positions] = False
                stays[row, positions[choice.kept]] = True
                if choice.changed is not None:
                    tokens, become = choice.changed
                    places.append((row, positions[tokens]))
                    values.append(become)
        if values:
            embeds = embeds.clone()
            index = torch.cat([row * length + positions for row, positions in places])
            index = index.to(embeds.device, non_blocking=True)
            embeds.flatten(0, 1).index_copy_(0, index, torch.cat(values))
        source = shortened(stays, attended, self.method)
        layouts = [layout.of_kept(row) for layout, row in zip(layouts, source, strict=True)]
        padded = bool((source < 0).any())
        source = source.to(embeds.device, non_blocking=True)
        mask, source = source >= 0, source.clamp(min=0)
        ids = kwargs.get("position_ids")
        ids = torch.arange(length, device=embeds.device)[None] if ids is None else ids
        ids = ids.expand(*ids.shape[:-2], batch, -1)
        dropped = length - mask.shape[1]
        prompt = ShortenedPrompt(self.method, mask, padded, dropped, ids[..., -1:] + 1)
        cache = self._cache(prompt, kwargs)
        return kwargs | {
            "inputs_embeds": embeds.gather(1, source[..., None].expand(-1, -1, dim)),
            # without a cache transformers takes position ids with gaps for several sequences
            "attention_mask": mask.long() if padded or cache is None else None,
            "position_ids": ids.gather(-1, source.expand(*ids.shape[:-2], -1, -1)),
            **_deepstack(kwargs, stays, source, mask),
            cache_argument(text_model(self.model)): cache,
            VISUAL_LAYOUTS: layouts,
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


def _deepstack(
    kwargs: dict[str, Any], stays: torch.Tensor, source: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any]:
    """Qwen3-VL: which tokens are visual, and what its first layers add to them."""
    if kwargs.get("visual_pos_masks") is None:
        return {}
    visual = kwargs["visual_pos_masks"]
    kept = stays.to(visual.device, non_blocking=True)[visual]
    return {
        "visual_pos_masks": visual.gather(1, source) & mask,
        "deepstack_visual_embeds": [
            features[kept] for features in kwargs["deepstack_visual_embeds"]
        ],
    }

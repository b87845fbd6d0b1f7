"""RTPrune on a running model: what the decoder is given is shortened, and decoding goes on from it.

Three hooks and two replaced methods, all of which leave with the context. ``get_image_features`` is
where pages are seen (``generate`` calls it ahead of the model); the decoder's pre-hook shortens a
prompt that holds pages, and gives later steps the mask of what is in the cache.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache
from transformers.generation import GenerationMode

from compress.models.visual import adapter_for, text_model, visual_layouts
from compress.rtprune.encoder_attention import EncoderAttention, token_values
from compress.rtprune.method import RTPrune
from compress.rtprune.pages import Page, PrunedPage, fingerprint, prune_pages
from compress.rtprune.ratio import textual_density
from compress.rtprune.sequence import attended_tokens, check_padding, shortened

FAMILIES = ("unlimited_ocr", "deepseek_ocr2")


class Handle:
    """What was pruned since the start or the last :meth:`reset`.

    Attributes
    ----------
    pages : one for each page of each prompt, in their order.
    """

    def __init__(self) -> None:
        self.pages: list[PrunedPage] = []

    def facts(self) -> dict[str, Any]:
        """Counts and ratios of each page and of all together, for JSON."""
        pages = [page.facts() for page in self.pages]
        total = {
            name: sum(page[name] for page in pages)
            for name in ("visual_tokens", "visual_kept", "prunable", "kept", "newlines_dropped")
        }
        return {"pages": pages, "total": total}

    def reset(self) -> None:
        """Forget the pages."""
        self.pages.clear()


@dataclass
class _Call:
    """A prompt between the model and its decoder."""

    input_ids: torch.Tensor | None
    encoded: Any


@dataclass
class _Request:
    """A shortened prompt in a cache.

    Parameters
    ----------
    mask : which of the places are attended, ``(batch, length)``.
    dropped : by how many places the prompt is shorter.
    next_position : position id that follows the prompt, ``(batch, 1)``.
    """

    mask: torch.Tensor
    dropped: int
    next_position: torch.Tensor


@contextmanager
def attached(method: RTPrune, model: Any) -> Iterator[Handle]:
    """:meth:`RTPrune.attach`."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            "RTPrune prunes DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2; got "
            f"{adapter_for(model.config).name} (model_type={model.config.model_type!r}); choose a "
            "model of these"
        )
    hooks = model._forward_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), _Patch) for hook in hooks):
        raise ValueError(
            "this model is being pruned already, and RTPrune cannot prune it twice; leave the "
            "first context"
        )
    patch = _Patch(method, model)
    with ExitStack() as stack:
        if method.select == "visionzip":
            encoder = model.model.vision_tower.vision_encoder
            stack.enter_context(patch.listener.attached(encoder))
        stack.enter_context(_replaced(model.model, "get_image_features", patch.encode))
        stack.enter_context(_replaced(model, "_validate_generation_mode", patch.check_mode))
        for module, hook in (
            (model, patch.check),
            (model.model, patch.begin),
            (text_model(model), patch.shorten),
        ):
            # ahead of the hooks of other methods, which then see what is left
            handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield patch.handle


@contextmanager
def _replaced(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Let ``owner.name(...)`` call ``wrapper(what it was, ...)`` inside."""
    before = getattr(owner, name)
    own = name in vars(owner)
    setattr(owner, name, functools.wraps(before)(functools.partial(wrapper, before)))
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


class _Patch:
    """The state of one attached method, and its hooks."""

    def __init__(self, method: RTPrune, model: Any) -> None:
        self.method = method
        self.model = model
        self.handle = Handle()
        self.listener = EncoderAttention()
        self.call: _Call | None = None
        self.pages: Any = WeakTensorKeyDictionary()  # what the encoder made -> the Page
        self.requests: WeakKeyDictionary[Any, _Request] = WeakKeyDictionary()  # by cache

    # ---- around the model ----------------------------------------------------------------------

    def check(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what has no meaning for a prompt that gets shorter."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "a model under RTPrune gives no loss: there are no logits at the places that it "
                "prunes; got labels; leave the context to train, or call without labels"
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise ValueError(
                "logits_to_keep must be a number of last places under RTPrune, as it moves the "
                "others; got a tensor of places; give a number"
            )

    def check_mode(self, before: Callable[..., Any], mode: Any, config: Any, given: Any) -> Any:
        """Refuse the ways to generate that cut the prompt themselves or take tokens back."""
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "generation assisted by drafts is not possible under RTPrune: drafts would count "
                "as prompt; got an assistant or prompt lookup; generate greedily, by sampling or "
                "with beams"
            )
        if config.prefill_chunk_size is not None:
            raise ValueError(
                "a page is pruned as a whole; got prefill_chunk_size="
                f"{config.prefill_chunk_size}, which cuts it; leave it out under RTPrune"
            )
        return before(mode, config, given)

    def encode(self, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the pages that the encoder reads."""
        self.listener.heard.clear()
        output = before(*args, **kwargs)
        if isinstance(output, tuple):  # return_dict=False: neither the model nor generate
            return output
        given = inspect.signature(before).bind(*args, **kwargs).arguments
        pages = self._seen(output.pooler_output, given)
        for features, page in zip(output.pooler_output, pages, strict=True):
            self.pages[features] = page
        if self.call is not None:
            self.call.encoded = output
        return output

    def _seen(self, features: Sequence[torch.Tensor], given: dict[str, Any]) -> list[Page]:
        pixels = given["pixel_values"]
        local = given.get("pixel_values_local")
        counts = [int(n) for n in given.get("num_local_patches") or [0] * len(features)]
        grids = given.get("patches_grid")
        cells = []
        for number, page in enumerate(features):
            inputs = {
                "input_ids": torch.full((1, len(page)), self.model.config.image_token_id),
                "pixel_values": pixels,
                "pixel_values_local": local,
                "num_local_patches": [counts[number]],
                "patches_grid": [(1, 1) if grids is None else grids[number]],
            }
            cells.append(visual_layouts(self.model, inputs)[0].grid.to(page.device))
        densities: Sequence[torch.Tensor | None] = [None] * len(features)
        if self.method.keep_tokens == "dynamic":
            whole = cells[0][cells[0][:, 0] == 0]
            rows, columns = (int(side) + 1 for side in whole[:, 1:].amax(0))
            densities = list(textual_density(pixels.float(), (rows, columns)))
        numbers = [0] * len(features)
        if self.method.select == "random":
            numbers = [fingerprint(page) for page in pixels]
        attention = self._attention(cells, counts, grids)
        return [Page(*facts) for facts in zip(cells, densities, numbers, attention, strict=True)]

    def _attention(
        self, cells: Sequence[torch.Tensor], counts: Sequence[int], grids: Any
    ) -> Sequence[tuple[torch.Tensor, torch.Tensor] | None]:
        if self.method.select != "visionzip":
            return [None] * len(cells)
        whole, *crops = self.listener.heard
        pages = []
        for number, grid in enumerate(cells):
            start, end = sum(counts[:number]), sum(counts[: number + 1])
            columns = None if grids is None else int(grids[number][0])
            pages.append(
                tuple(
                    token_values(
                        whole[which][number],
                        crops[0][which][start:end] if end > start else None,
                        grid[grid[:, 2] >= 0],
                        columns,
                    )
                    for which in (0, 1)
                )
            )
        return pages

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the prompt that is on its way to the decoder."""
        outputs = kwargs.get("mm_encoder_outputs") or {}
        self.call = _Call(kwargs.get("input_ids"), outputs.get("image"))

    # ---- at the decoder ------------------------------------------------------------------------

    def shorten(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Shorten a prompt with pages; give later steps the mask of what is in the cache."""
        call, self.call = self.call, None
        cache = kwargs.get("past_key_values")
        filled = 0 if cache is None else int(cache.get_seq_length())
        if call is not None and call.encoded is not None:
            return args, self._prompt(call, filled, kwargs)
        if filled and cache in self.requests:
            return args, self._step(self.requests[cache], filled, kwargs)
        if cache is not None:
            self.requests.pop(cache, None)  # a cache that was reset
        return None

    def _prompt(self, call: _Call, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if call.input_ids is None or filled:
            raise ValueError(
                "RTPrune prunes the pages of a first prompt, and finds them by their input_ids; got "
                f"{'no input_ids' if call.input_ids is None else f'a cache of {filled} places'}; "
                "start a new prompt from its input_ids"
            )
        embeds = kwargs["inputs_embeds"]
        batch, length = embeds.shape[:2]
        attended = attended_tokens(kwargs.get("attention_mask"), batch, length, embeds.device)
        where = self._where(call, embeds.device)
        pruned = self._pruned(call, embeds, attended, where)
        if all(values is None for _, values in pruned):
            return kwargs
        stays, embeds = attended.clone(), embeds.clone()
        for (row, columns), (page, values) in zip(where, pruned, strict=True):
            if values is not None:
                kept = columns[page.kept_indices]
                stays[row, columns] = False
                stays[row, kept] = True
                embeds[row, kept] = values
        check_padding(attended)
        left, mask = shortened(stays)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        positions = positions.expand(batch, -1)
        cache = kwargs.get("past_key_values")
        use_cache = kwargs.get("use_cache")
        if cache is None and (
            text_model(self.model).config.use_cache if use_cache is None else use_cache
        ):
            cache = DynamicCache(config=text_model(self.model).config)
        if cache is not None:
            self.requests[cache] = _Request(mask, length - mask.shape[1], positions[:, -1:] + 1)
            for layer in cache.layers:
                if getattr(layer, "prefill_length", None) is not None:
                    layer.prefill_length = (
                        None  # was declared for the whole prompt; the first update
                    )
        return kwargs | {
            "inputs_embeds": embeds.gather(1, left[..., None].expand(-1, -1, embeds.shape[2])),
            "attention_mask": mask.long(),
            "position_ids": positions.gather(1, left),
            "past_key_values": cache,
        }

    def _where(self, call: _Call, device: torch.device) -> list[tuple[int, torch.Tensor]]:
        """Row of the batch and places of each page of a prompt."""
        places = (call.input_ids == self.model.config.image_token_id).to(device)
        where = []
        left = [len(page) for page in call.encoded.pooler_output]
        for row, columns in enumerate(places):
            columns = columns.nonzero()[:, 0]
            while len(columns) and left and left[0] <= len(columns):
                where.append((row, columns[: left[0]]))
                columns = columns[left.pop(0) :]
            if len(columns):
                break
        if left:
            raise ValueError(
                f"pages of {', '.join(str(len(p)) for p in call.encoded.pooler_output)} visual "
                f"tokens do not fit the sequences, which have places for {places.sum(1).tolist()}; "
                "build both with one call of the processor"
            )
        return where

    def _pruned(
        self,
        call: _Call,
        embeds: torch.Tensor,
        attended: torch.Tensor,
        where: Sequence[tuple[int, torch.Tensor]],
    ) -> list[tuple[PrunedPage, torch.Tensor | None]]:
        encoded = call.encoded.pooler_output
        if any(features not in self.pages for features in encoded):
            raise ValueError(
                "RTPrune has to see the pages that features come from; got mm_encoder_outputs that "
                "were made outside of its context; make them inside, or give pixel_values"
            )
        # beams and several answers repeat a page: the same tensor
        first = {id(features): number for number, features in reversed([*enumerate(encoded)])}
        numbers = sorted(first.values())
        features, words = [], []
        for number in numbers:
            row, columns = where[number]
            features.append(embeds[row, columns])
            words.append(embeds[row, :0])
            if self.method.select == "cdpruner":
                text = attended[row] & (call.input_ids[row] != self.model.config.image_token_id).to(
                    embeds.device
                )
                text[: int(columns[-1])] = False
                words[-1] = embeds[row, text]
        pruned = prune_pages(
            self.method,
            [self.pages[encoded[number]] for number in numbers],
            features,
            words,
            self.model.model.multi_modal_projector.bias,
        )
        self.handle.pages += [page for page, _ in pruned]
        given = dict(zip(numbers, pruned, strict=True))
        return [given[first[id(features)]] for features in encoded]

    def _step(self, request: _Request, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        new = kwargs["inputs_embeds"].shape[1]
        behind = filled - request.mask.shape[1] + new  # places behind the prompt
        whole = filled + request.dropped + new
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
        expected = request.next_position + filled - request.mask.shape[1]
        if (flat and mask.shape[1] != whole) or (
            new > 1 and positions is not None and not bool((positions[:, :1] == expected).all())
        ):
            raise ValueError(
                f"the prompt in this cache was pruned from {whole - behind} places, after which "
                f"{behind} are expected with those that are given; got others; go on with the "
                "cache by calling the model, not by generate, or start a new prompt"
            )
        tail = (
            mask[:, -behind:].bool() if flat else request.mask.new_ones(len(request.mask), behind)
        )
        if positions is None:
            positions = torch.arange(new, device=expected.device) + filled + request.dropped
            positions = positions[None]
        return kwargs | {
            "attention_mask": torch.cat([request.mask, tail], 1).long(),
            "position_ids": positions,
        }

"""How a prompt gets shorter, padded on the left, and how decoding continues after it.

Callers count the whole prompt: their masks and position ids are as long as it was, or they give
none. What is in the cache is shorter. Which tokens stay is indices, computed on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from compress.models.cache_argument import cache_in
from compress.models.visual import VisualLayout


@dataclass(frozen=True)
class ShortenedPrompt:
    """A shortened prompt in a cache.

    Parameters
    ----------
    method : that shortened it, for messages.
    mask : which of its places are attended to, ``(batch, length)`` bool.
    padded : whether any is not, so that masks are needed at all.
    dropped : number of places by which it is shorter than it was.
    next_position : position id after it, ``(batch, 1)``, or ``(axes, batch, 1)``.
    """

    method: str
    mask: torch.Tensor
    padded: bool
    dropped: int
    next_position: torch.Tensor

    def step(self, filled: int, kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
        """The decoder's keywords for tokens after the prompt, with masks for what is in the cache.

        Parameters
        ----------
        filled : places of the cache that are in use.
        kwargs : that the decoder was called with, the cache among them.
        config : of the decoder.

        Raises
        ------
        ValueError : when mask or position ids are not those of the places after the prompt.
        """
        new = kwargs["inputs_embeds"].shape[1]
        answered = filled - self.mask.shape[1]
        mask: Any = kwargs.get("attention_mask")
        ids: Any = kwargs.get("position_ids")
        flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
        if ids is not None and ids.ndim == 3:
            # Qwen-VL counts them by the length of the cache, where what was dropped is missing
            ids = None
        expected = filled + self.dropped + new
        # looking at the position ids waits for the GPU, and those of a single token cannot be wrong
        first = self.next_position + answered
        wrong = new > 1 and ids is not None and not torch.equal(ids[:, :1].expand_as(first), first)
        if wrong or (flat and mask.shape[1] != expected):
            raise ValueError(
                f"{self.method} pruned the prompt in this cache: {new} more tokens make {expected} "
                "with those that were dropped; got a mask or position ids of another number; give "
                "generate, or the model, the new tokens alone, with the mask of all of them"
            )
        answer = self.mask.new_ones(len(self.mask), answered + new)
        if flat:
            answer = mask[:, mask.shape[1] - answered - new :].bool()
        if ids is None:
            ids = first + torch.arange(new, device=first.device)
        if mask is None and not self.padded:
            return kwargs | {"position_ids": ids}
        # where all layers slide over the answer, masks count places from where the window begins,
        # those of the prompt too: put them there (transformers 5.23 itself reads the wrong places)
        cache = cache_in(kwargs)
        sizes = [cache.get_mask_sizes(new, i) for i in range(len(cache.layers))]
        slid = min(int(first) for _, first in sizes)
        mask = torch.cat([answer[:, :slid], self.mask, answer[:, slid:]], 1)
        whole = {int(length) for length, _ in sizes} == {mask.shape[1]}
        if new == 1 and whole and _takes_whole_masks(config):
            # which transformers takes as it is, where it needs long for DeepSeek-OCR's own
            mask = mask[:, None, None]
        else:
            mask = mask.long()
        return kwargs | {"attention_mask": mask, "position_ids": ids}


def _takes_whole_masks(config: Any) -> bool:
    """Whether all layers attend to all that a mask ``(batch, 1, new, length)`` of bool says."""
    makes = ALL_MASK_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    return makes is sdpa_mask and set(getattr(config, "layer_types", ())) == {"full_attention"}


def attended_tokens(mask: Any, of_prompt: torch.Tensor) -> torch.Tensor:
    """Which tokens of a prompt are not padding, bool, as ``of_prompt`` in shape and device.

    Parameters
    ----------
    mask : of a call of the decoder: None, ``(batch, length)``, or, from ``generate`` with a static
        cache, ``(batch, 1, length, cache)`` in a dict by layer type.
    of_prompt : any ``(batch, length)``.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if mask is None:
        return torch.ones_like(of_prompt, dtype=torch.bool)
    if mask.ndim == 4:  # of the last token; added to the scores unless it is boolean
        mask = mask[:, 0, -1, : of_prompt.shape[1]]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask.bool().to(of_prompt.device)


def pages_in(layouts: Sequence[VisualLayout]) -> list[tuple[int, torch.Tensor]]:
    """Sequence and positions of each page of a batch."""
    return [
        (row, layout.positions[layout.image_of == number])
        for row, layout in enumerate(layouts)
        for number in layout.image_of.unique()
    ]


def shortened(stays: torch.Tensor, attended: torch.Tensor, method: str) -> torch.Tensor:
    """What to gather so that the tokens that stay are at the right, in their order.

    Parameters
    ----------
    stays : ``(batch, length)`` bool.
    attended : which tokens were not padding, ``(batch, length)`` bool.
    method : that shortens it, for the message.

    Returns
    -------
    Position of each token of the new sequence in the old one, -1 for padding, ``(batch, shorter)``:
    as long as the longest sequence needs.

    Raises
    ------
    ValueError : when padding is not on the left.
    """
    if bool((attended[:, :-1] & ~attended[:, 1:]).any()):
        raise ValueError(
            f"{method} expects padding on the left, where it pads a pruned prompt; got an "
            "attention_mask with padding behind tokens; pad on the left"
        )
    longest = int(stays.sum(1).max())
    # False sorts first, and the sort is stable
    source = stays.int().argsort(dim=1, stable=True)[:, stays.shape[1] - longest :]
    return source.masked_fill(~stays.gather(1, source), -1)

"""A shortened prompt in a cache, and how decoding continues after it.

Callers count the whole prompt: their masks and position ids are as long as it was, or they give
none. What is in the cache is shorter.
"""

from dataclasses import dataclass
from typing import Any

import torch

from compress.models.cache_argument import cache_in


@dataclass(frozen=True)
class ShortenedPrompt:
    """A shortened prompt in a cache.

    Parameters
    ----------
    mask : which of its places are attended to, ``(batch, length)`` bool.
    dropped : number of places by which it is shorter than it was.
    next_position : position id after it, ``(batch, 1)``.
    """

    mask: torch.Tensor
    dropped: int
    next_position: torch.Tensor

    def step(self, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The decoder's keywords for tokens after the prompt, with masks for what is in the cache.

        Parameters
        ----------
        filled : places of the cache that are in use.
        kwargs : that the decoder was called with, the cache among them.

        Raises
        ------
        ValueError : when mask or position ids are not those of the places after the prompt.
        """
        new = kwargs["inputs_embeds"].shape[1]
        answered = filled - self.mask.shape[1]
        mask: Any = kwargs.get("attention_mask")
        ids: Any = kwargs.get("position_ids")
        flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
        expected = filled + self.dropped + new
        # looking at the position ids waits for the GPU, and those of a single token cannot be wrong
        first = self.next_position + answered
        wrong = new > 1 and ids is not None and not torch.equal(ids[:, :1].expand_as(first), first)
        if wrong or (flat and mask.shape[1] != expected):
            raise ValueError(
                f"RTPrune pruned the prompt in this cache: {new} more tokens make {expected} with "
                "those that were dropped; got a mask or position ids of another number; give "
                "generate, or the model, the new tokens alone, with the mask of all of them"
            )
        answer = self.mask.new_ones(len(self.mask), answered + new)
        if flat:
            answer = mask[:, mask.shape[1] - answered - new :].bool()
        if ids is None:
            ids = torch.arange(new, device=answer.device)[None] + filled + self.dropped
        # where all layers slide over the answer, masks count places from where the window begins,
        # those of the prompt too: put them there (transformers 5.23 itself reads the wrong places)
        cache = cache_in(kwargs)
        slid = min(int(cache.get_mask_sizes(new, i)[1]) for i in range(len(cache.layers)))
        mask = torch.cat([answer[:, :slid], self.mask, answer[:, slid:]], 1)
        return kwargs | {"attention_mask": mask.long(), "position_ids": ids}

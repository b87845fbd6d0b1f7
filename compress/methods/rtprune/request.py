"""A shortened prompt in a cache, and how to go on from it.

Callers count the whole prompt: their masks are as long as it was, and so are their position ids, or
they give none. What stands in the cache is shorter.
"""

from dataclasses import dataclass
from typing import Any

import torch

from compress.models.cache_argument import cache_in


@dataclass(frozen=True)
class Request:
    """A shortened prompt in a cache.

    Parameters
    ----------
    mask : which of its places are attended, ``(batch, length)`` bool.
    dropped : by how many places it is shorter than it was.
    next_position : position id behind it, ``(batch, 1)``.
    """

    mask: torch.Tensor
    dropped: int
    next_position: torch.Tensor

    def step(self, filled: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the decoder is to be called with, for what it was called with behind the prompt.

        Parameters
        ----------
        filled : places of the cache that are in use.
        kwargs : of the decoder, the cache among them.

        Raises
        ------
        ValueError : when mask or position ids are not those of the places behind.
        """
        new = kwargs["inputs_embeds"].shape[1]
        answered = filled - self.mask.shape[1]
        mask: Any = kwargs.get("attention_mask")
        ids: Any = kwargs.get("position_ids")
        flat = isinstance(mask, torch.Tensor) and mask.ndim == 2
        expected = filled + self.dropped + new
        # looking at the position ids waits for the GPU, and those of a single token cannot be wrong
        first = self.next_position + answered
        jumped = new > 1 and ids is not None and not torch.equal(ids[:, :1].expand_as(first), first)
        if jumped or (flat and mask.shape[1] != expected):
            raise ValueError(
                f"the prompt in this cache was pruned, and {new} more tokens make {expected} with "
                "those that were dropped; got a mask or position ids of another number; do not "
                "give generate a pruned cache: call the model, or start a new prompt"
            )
        answer = self.mask.new_ones(len(self.mask), answered + new)
        if flat:
            answer = mask[:, mask.shape[1] - answered - new :].bool()
        if ids is None:
            ids = torch.arange(new, device=answer.device)[None] + filled + self.dropped
        # where all layers slide over the answer, masks count places from where the window begins,
        # those of the prompt too: put them there (unpruned, transformers 5.23 looks beside them)
        cache = cache_in(kwargs)
        slid = min(int(cache.get_mask_sizes(new, i)[1]) for i in range(len(cache.layers)))
        mask = torch.cat([answer[:, :slid], self.mask, answer[:, slid:]], 1)
        return kwargs | {"attention_mask": mask.long(), "position_ids": ids}

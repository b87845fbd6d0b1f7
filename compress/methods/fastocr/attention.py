"""Attention of one decode step, and the function that transformers calls for it.

Pure functions do the work: :func:`sparse_decode` reads some rows of the cache,
:func:`peripheral_decode` also summaries of the other visual tokens, :func:`choose_rows` chooses
rows by summaries or signs, :func:`focal_decode` reads all rows and returns the attention over
them, and :func:`top_rows` chooses the rows with most of it. On a GPU they are the kernels of
:mod:`compress.kernels.sparse_decode`, :mod:`compress.kernels.summaries`,
:mod:`compress.kernels.choice`, :mod:`compress.kernels.signs` and :mod:`compress.kernels.topk`,
elsewhere the plain torch beside them.

Shapes: ``query`` is ``(batch, heads, 1, dim)``; ``key`` ``(batch, kv_heads, length, dim)`` and
``value`` are those of the cache; ``heads`` is a multiple of ``kv_heads``. A mask is True where
attended, or is added to the logits.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.kernels import choice, topk
from compress.kernels import signs as bits
from compress.kernels import sparse_decode as kernels
from compress.kernels import summaries as groups
from compress.kernels.backend import use_triton
from compress.methods.fastocr.choosing import Index, Signs
from compress.methods.fastocr.fixation import Fixation, HeadReduce
from compress.methods.fastocr.periphery import Periphery

if TYPE_CHECKING:
    from compress.methods.fastocr.state import DecodeState

NAME = "compress_fastocr"  # of the attention function, in transformers' registry
STATE = "fastocr_state"  # the keyword under which a decode step hands its state to the layers


def sparse_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    rows_mask: torch.Tensor | None,
    dense: tuple[int, int],
    dense_mask: torch.Tensor | None,
    scaling: float,
    beside: kernels.Beside | None = None,
) -> torch.Tensor:
    """:func:`compress.kernels.sparse_decode.sparse_decode`, on any device and with any mask."""
    fast = _use_kernel("sparse_decode", query, key, value, rows_mask, dense_mask)
    decode = kernels.sparse_decode if fast else kernels.sparse_decode_reference
    return decode(query, key, value, rows, rows_mask, dense, dense_mask, scaling, beside)


def choose_rows(
    query: torch.Tensor, index: Index, budgets: torch.Tensor, width: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compress.kernels.choice.choose_rows` from the groups of a layer, on any device.

    With signs the tokens with the highest scores, of equal ones the first, whatever their group.
    """
    if index.signs:
        return _choose_by_signs(query, index, index.signs, budgets, width, scaling)
    fast = _use_kernel("choose_rows", query, index.keys, index.values)
    choose = choice.choose_rows if fast else choice.choose_rows_reference
    groups = index.keys, index.sizes, index.first, index.order
    return choose(query, *groups, budgets, width, scaling)


def _choose_by_signs(
    query: torch.Tensor,
    index: Index,
    signs: Signs,
    budgets: torch.Tensor,
    width: int,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    fast = _use_kernel("sign_scores", query, index.keys, index.values)
    score = bits.sign_scores if fast else bits.sign_scores_reference
    scores = score(query, index.keys, signs.member, signs.codes, signs.scales, scaling)
    heads, visual = index.order.shape[1:]
    places = torch.arange(visual, dtype=torch.int32, device=query.device)
    valid = places < index.sizes.sum(2)[..., None]
    # not negative, and in the same order, as top_rows wants them
    best = scores.masked_fill(~valid, -torch.inf).amax(2, keepdim=True)
    weights = (scores - best).exp().flatten(0, 1)
    each = budgets.repeat_interleave(heads, output_size=len(weights))
    chosen = torch.zeros(len(weights), width, dtype=torch.long, device=query.device)
    tokens = places.expand(len(weights), -1).contiguous()
    top_rows(weights, tokens, valid.flatten(0, 1), each, chosen, torch.zeros_like(chosen).int())
    chosen = chosen.unflatten(0, (-1, heads))
    inside = (places[:width] < budgets[:, None, None]).int().expand_as(chosen)
    member = signs.member.gather(2, chosen).long()
    opened = torch.zeros_like(index.sizes).scatter_add_(2, member, inside)
    return index.order.gather(2, chosen), (index.sizes - opened).log()


def peripheral_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    rows_mask: torch.Tensor | None,
    dense: tuple[int, int],
    dense_mask: torch.Tensor | None,
    scaling: float,
    periphery: Periphery,
    fixation: Fixation,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query to some rows of the cache, and to summaries of the visual rest.

    Parameters
    ----------
    query, key, value : see the module.
    rows, rows_mask, dense, dense_mask, scaling : as in the kernel; the fixation's rows come first.
    periphery : of the layer.
    fixation : the visual tokens that ``rows`` begin with.

    Returns
    -------
    ``(batch, heads, 1, dim)``, equal to attention over the whole cache in which each visual token
    outside the fixation has the mean key and value of those of its group that are outside too; and
    how many summaries were read, summed over the sequences.
    """
    fast = _use_kernel("sparse_decode", query, key, value, rows_mask, dense_mask)
    means = groups.summaries if fast else groups.summaries_reference
    sums = periphery.keys, periphery.values, periphery.sizes
    beside = means(key, value, rows, fixation.index, fixation.valid, periphery.member, sums)
    decode = kernels.sparse_decode if fast else kernels.sparse_decode_reference
    output = decode(query, key, value, rows, rows_mask, dense, dense_mask, scaling, beside)
    return output, (beside[2] > -torch.inf).sum(2).amax(1).sum()


def _use_kernel(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *masks: torch.Tensor | None,
) -> bool:
    return use_triton(kernel, query.device, kernels.why_unsupported(query, key, value, *masks))


def focal_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    head_reduce: HeadReduce = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compress.kernels.sparse_decode.focal_decode`, on any device and with any mask.

    ``head_reduce`` may be "max", too, for the highest weight of a head, in plain torch.
    """
    if head_reduce == "mean" and _use_kernel("focal_decode", query, key, value, mask):
        return kernels.focal_decode(query, key, value, mask, scaling)
    return kernels.focal_decode_reference(query, key, value, mask, scaling, head_reduce)


def top_rows(
    weights: torch.Tensor,
    tokens: torch.Tensor,
    valid: torch.Tensor | None,
    budgets: torch.Tensor,
    index: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """:func:`compress.kernels.topk.top_rows`, on any device and of any number of tokens."""
    fast = use_triton("top_rows", weights.device, topk.why_unsupported(tokens))
    choose = topk.top_rows if fast else topk.top_rows_reference
    choose(weights, tokens, valid, budgets, index, rows)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: SDPA, but for a decode step with a state."""
    state: DecodeState | None = kwargs.pop(STATE, None)
    if state is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = state.attend(module.layer_idx, query, key, value, attention_mask, scaling)
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Register the attention function with transformers, with SDPA's masks.

    A mask name that is not registered would give it no mask, and a padded batch would attend to its
    padding. The names stay registered: they hold no state, which comes with each call.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)

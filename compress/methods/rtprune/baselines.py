"""The peers that RTPrune is compared with, implemented here for the tokens behind the projector.

Each selects ``keep`` of the tokens of one page, ``(tokens, dim)``, and returns their indices,
ascending; as many as RTPrune keeps, and newlines and separators stay as with RTPrune.
"""

import torch
import torch.nn.functional as F

from compress.methods.rtprune.selection import check_keep, ranked

CONTEXTUAL_SHARE = 10 / 64  # VisionZip's setting: 54 dominant and 10 contextual tokens of 64
EXHAUSTED = 1e-5  # share of a token that the selected ones do not span, below which it counts as 0


def random_tokens(features: torch.Tensor, keep: int, seed: int) -> torch.Tensor:
    """Tokens drawn without replacement; the same for the same seed on any device."""
    check_keep(features, keep)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(features.shape[0], generator=generator)[:keep]
    return chosen.sort().values.to(features.device)


def divprune(features: torch.Tensor, keep: int) -> torch.Tensor:
    """The tokens that are most diverse.

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR
    2025, arXiv 2503.02175): greedily, the token whose least cosine distance to those that are
    selected is largest; first the one that is farthest from its nearest. As published it compares
    the tokens behind the projector, which DeepSeek-OCR has too: nothing is adapted.
    """
    check_keep(features, keep)
    directions = F.normalize(features.float(), dim=-1)
    distance = 1 - directions @ directions.t()
    nearest = distance.clone().fill_diagonal_(torch.inf).amin(0)
    closest = torch.full_like(nearest, torch.inf)
    chosen = []
    for _ in range(keep):
        best = nearest.argmax()
        chosen.append(best)
        closest = torch.minimum(closest, distance[best])
        closest[best] = -torch.inf  # once is enough, even where all others are copies of it
        nearest = closest
    return torch.stack(chosen).sort().values


def cdpruner(features: torch.Tensor, keep: int, instruction: torch.Tensor) -> torch.Tensor:
    """The tokens that are most diverse and most similar to the instruction.

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token
    Pruning in MLLMs" (NeurIPS 2025, arXiv 2506.10967): greedy MAP inference of a determinantal
    point process whose kernel is ``r_i cos(x_i, x_j) r_j``, with relevance ``r`` scaled to (0, 1].

    With LLaVA, relevance comes from CLIP's text encoder (with a minus, since CLIP's patches
    are least similar to the text that they show). DeepSeek-OCR has no text encoder: as for other
    models without one, it is the mean cosine between a token and the decoder's embeddings of the
    instruction, without the minus. Where the determinant is exhausted (more tokens than dimensions)
    the most relevant and then the first tokens follow.

    Parameters
    ----------
    features : ``(tokens, dim)``.
    keep : how many to select.
    instruction : embeddings of the prompt's text, ``(words, dim)``; none makes all tokens equally
        relevant.
    """
    check_keep(features, keep)
    directions = F.normalize(features.float(), dim=-1)
    relevance = _relevance(directions, F.normalize(instruction.float(), dim=-1))
    kernel = relevance[:, None] * (directions @ directions.t()) * relevance
    gain = kernel.diagonal().clone()
    quality = gain.clone()
    factors = kernel.new_zeros(keep, len(kernel))
    chosen = []
    for step in range(keep):
        adds = gain > EXHAUSTED * kernel.diagonal()
        best = torch.where(adds.any(), gain.where(adds, -torch.inf), quality).argmax()
        past = factors[:step]
        row = (kernel[best] - past[:, best] @ past) / gain[best].clamp(min=1e-30).sqrt()
        factors[step] = torch.where(adds.any(), row, 0.0)
        gain = gain - factors[step].square()
        gain[best] = quality[best] = -torch.inf
        chosen.append(best)
    return torch.stack(chosen).sort().values


def _relevance(directions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    if not len(words):
        return torch.ones_like(directions[:, 0])
    relevance = (directions @ words.t()).mean(1)
    low, high = relevance.aminmax()
    return torch.where(high > low, (relevance - low + 1e-6) / (high - low).clamp(min=1e-12), 1.0)


def visionzip(
    features: torch.Tensor,
    keep: int,
    attention: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that the encoder attends to, and some that the others are merged into.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (CVPR
    2025, arXiv 2412.04467): 54/64 of the tokens are dominant, those with the most attention; of
    the others, evenly spaced ones become contextual: to each the mean of those is added whose
    keys are most similar to its own.

    Published for one image through CLIP. Here views are pooled, with attention in units of its mean
    in the view; see ``encoder_attention`` for where it comes from. The published sum is taken in
    front of the projector. DeepSeek-OCR's is linear: behind it, the sum of two tokens has its bias
    twice, hence ``bias``.

    Parameters
    ----------
    features : ``(tokens, dim)``.
    keep : how many to select.
    attention : that each token gets, ``(tokens,)``.
    keys : of each token in the encoder, ``(tokens, key dim)``.
    bias : of the projector, ``(dim,)``.

    Returns
    -------
    Indices ``(keep,)`` and the features there ``(keep, dim)``.
    """
    check_keep(features, keep)
    contextual = round(keep * CONTEXTUAL_SHARE)
    order = ranked(attention.float())
    dominant = order[: keep - contextual].sort().values
    if not contextual:
        return dominant, features[dominant]
    others = order[keep - contextual :].sort().values
    step = len(others) // contextual
    targets = others[: step * contextual : step]
    merged = others[~torch.isin(others, targets)]
    directions = F.normalize(keys.float(), dim=-1)
    nearest = (directions[merged] @ directions[targets].t()).argmax(1)
    share = F.one_hot(nearest, contextual).float()
    share = share / share.sum(0).clamp(min=1)
    moved = share.t() @ (features[merged].float() - bias.float())
    values = features.clone()
    values[targets] = (features[targets].float() + moved).to(features.dtype)
    indices = torch.cat([dominant, targets]).sort().values
    return indices, values[indices]

"""The attention of the vision encoder to its tokens: VisionZip's measure of importance.

DeepSeek-OCR and Unlimited-OCR: what CLIP's class token gives to each patch in the last layer, all
heads together, and the keys of that layer (LLaVA uses the last but one, as it takes that one's
output). DeepSeek-OCR-2 has no class token but causal queries: the mean attention that a query gets
from those that can see it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import apply_rotary_pos_emb

# attention (views, tokens), in units of its mean in the view, and keys (views, tokens, dim)
Captured = tuple[torch.Tensor, torch.Tensor]


class EncoderRecorder:
    """Records the attention in the last layer of a vision encoder.

    Attributes
    ----------
    captured : of each call of the encoder, oldest first.
    """

    def __init__(self) -> None:
        self.captured: list[Captured] = []

    @contextmanager
    def recording(self, encoder: Any) -> Iterator[None]:
        """Record calls of ``encoder`` (``model.model.vision_tower.vision_encoder``) inside."""
        outputs: dict[str, Any] = {}

        def remember(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[name] = output

            return hook

        causal = hasattr(encoder, "rotary_emb")
        layer = (encoder.layers if causal else encoder.encoder.layers)[-1].self_attn
        heads = encoder.config.num_attention_heads

        def finish(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if causal:
                captured = _received(outputs, heads, layer.head_dim, kwargs["num_patches"])
            else:
                captured = _of_class_token(outputs, heads, layer.head_dim)
            self.captured.append(captured)
            outputs.clear()

        modules = {"q": layer.q_proj, "k": layer.k_proj}
        if causal:
            modules["rope"] = encoder.rotary_emb
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(module.register_forward_hook(remember(name)))
            stack.enter_context(encoder.register_forward_hook(finish, with_kwargs=True))
            yield


def _of_class_token(outputs: Any, heads: int, dim: int) -> Captured:
    query, key = (outputs[name].float().unflatten(-1, (heads, dim)) for name in "qk")
    scores = torch.einsum("bhd,bnhd->bhn", query[:, 0], key) * dim**-0.5
    attention = scores.softmax(-1).sum(1)[:, 1:]
    return attention / attention.mean(1, keepdim=True), key[:, 1:].mean(2)


def _received(outputs: Any, heads: int, dim: int, patches: int) -> Captured:
    query, key = (outputs[name].float().unflatten(-1, (-1, dim)).transpose(1, 2) for name in "qk")
    metric = key[:, :, patches:].mean(1)
    query, key = apply_rotary_pos_emb(query, key, *(part.float() for part in outputs["rope"]))
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query[:, :, patches:] @ key.transpose(-1, -2) * dim**-0.5
    queries = scores.shape[2]
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(patches + 1)
    attention = scores.masked_fill(later, -torch.inf).softmax(-1)[..., patches:].mean(1).sum(1)
    attention = attention / torch.arange(queries, 0, -1, device=scores.device)
    return attention / attention.mean(1, keepdim=True), metric


def token_values(
    whole: torch.Tensor, crops: torch.Tensor | None, grid: torch.Tensor, columns: int | None
) -> torch.Tensor:
    """Values of each view in the order of the page's tokens.

    Parameters
    ----------
    whole : of the view of the whole page, ``(tokens, ...)``.
    crops : of the crops, ``(crops, tokens, ...)``.
    grid : (view, row, column) of the tokens that have a place, ``(tokens of the page, 3)``.
    columns : of crops, where they are laid out as one mosaic; None where each is a view.
    """
    side = round(len(whole) ** 0.5)
    view, row, column = grid.unbind(1)
    if crops is None:
        return whole[row * side + column]
    of_crop = round(crops.shape[1] ** 0.5)
    crop = view - 1 if columns is None else row // of_crop * columns + column // of_crop
    inside = row % of_crop * of_crop + column % of_crop
    of_whole = view == 0
    values = whole.new_empty(len(grid), *whole.shape[1:])
    values[of_whole] = whole[row[of_whole] * side + column[of_whole]]
    values[~of_whole] = crops[crop[~of_whole], inside[~of_whole]]
    return values

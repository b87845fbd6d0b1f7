"""Train `reader-deep`: python compress/models/builtin/train_reader_deep.py --run DIR.

reader-qwen's architecture with 24 text layers, for pages of 448x576 pixels, 1,008 visual tokens and
600 characters and more: 5% of reader-qwen's 312 tokens are 16, too few to read a page from,
whatever chooses them. 5.3 million parameters, 10.5 MB in float16. It is meant for a GPU::

    train_reader_deep.py --run DIR --device cuda --bf16 --workers 14

A page of the last level takes 0.14 TFLOP forward and back, so 1,500 batches of 32 take 6.7 PFLOP:
110 s at 60 TFLOP/s, 6% of an H100's peak, as products of width 128 are bound by memory. Launches,
of the layers, of the encoder's windows and of Muon, take longer: 0.2 s a step, by their number. So
five minutes for the last level, two for those before, and one for reading validation pages: an
estimate, not measured. Fourteen processes render 350 pages a second, twice what is read.

``--warm-start`` begins with reader-qwen's weights: each layer is followed by copies that add
nothing yet (as in LLaMA Pro, arXiv 2401.02415), so that it reads reader-qwen's pages as well as
that does. ``--small`` is for a CPU: 16 layers, and pages of 560 visual tokens.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compress.data.pages import Difficulty
from compress.models.builtin.reader_training import LEVELS as TO_PAGES
from compress.models.builtin.reader_training import Level, Plan, Reader, arguments, run
from compress.models.builtin.train_reader_qwen import (
    build_model,
    build_processor,
    encode,
    read,
    save,
)
from compress.models.vlm import load_vlm

LAYERS, SMALL_LAYERS = 24, 16
MOST_NEW_TOKENS = 1024
MIDDLE = Difficulty((320, 448), (14, 18), (18, 26), (14, 18), wear=0.5)
LARGE = Difficulty((448, 576), (20, 24), (26, 36), (14, 18), wear=0.5)
SMALL_LEVELS = (*TO_PAGES, Level(MIDDLE, 4))
# batches of some 50 thousand tokens
BATCHES = (512, 384, 256, 192, 96, 64, 48)
LEVELS = (
    *(replace(level, batch=n) for level, n in zip(SMALL_LEVELS, BATCHES, strict=True)),
    Level(LARGE, 32),
)


@torch.no_grad()
def deepen(model: Any, stored: Any) -> None:
    """Give a model the weights of one with fewer layers, so that both compute the same.

    Of the layers that take a stored one's weights the first takes all; what the others write into
    the residual stream is zero.
    """
    deep, shallow = model.state_dict(), stored.state_dict()
    count, of = (m.config.text_config.num_hidden_layers for m in (model, stored))
    source = [layer * of // count for layer in range(count)]
    for name, tensor in deep.items():
        before, found, rest = name.partition("language_model.layers.")
        if not found:
            tensor.copy_(shallow[name])
            continue
        layer, _, rest = rest.partition(".")
        tensor.copy_(shallow[f"{before}{found}{source[int(layer)]}.{rest}"])
        copied = source.index(source[int(layer)]) < int(layer)
        if copied and rest in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            tensor.zero_()


def build(layers: int, warm_start: bool, device: str) -> Reader:
    """The reader before training."""
    processor = build_processor()
    model = build_model(processor, layers)
    model.generation_config.max_new_tokens = MOST_NEW_TOKENS
    if warm_start:
        deepen(model, load_vlm("builtin:reader-qwen")[0])
    return Reader(
        model,
        partial(encode, processor, device=device),
        partial(read, processor),
        partial(save, processor),
    )


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.set_defaults(final=1500)
    parser.add_argument(
        "--warm-start", action="store_true", help="begin with reader-qwen's weights"
    )
    parser.add_argument("--small", action="store_true", help="a smaller one, for a CPU")
    args = parser.parse_args()
    layers, levels = (SMALL_LAYERS, SMALL_LEVELS) if args.small else (LAYERS, LEVELS)
    first = len(TO_PAGES) if args.warm_start else 0
    run(
        parser,
        args,
        partial(build, layers, args.warm_start, args.device),
        Plan(first=first, every=1000, levels=levels),
    )

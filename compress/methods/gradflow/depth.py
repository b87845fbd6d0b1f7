"""Depth: transformer blocks that go whole, so that the result is a plain, shallower model.

A block's mask is a gate on what it adds to the residual stream: it multiplies weights and biases of
the projections into the stream. At 0 the block is exactly the identity, which surgery leaves out.
Blocks of the same shape are one selection block: they compete, and cost the same.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from compress.common.cost import unet_cost
from compress.data.batches import Batch
from compress.methods.gradflow.groups import ChannelGroup, Slot
from compress.methods.gradflow.layout import Layout
from compress.parallel import distributed

if TYPE_CHECKING:
    from compress.methods.gradflow.masks import SoftUNet

CRITERIA = ("uniform_depth", "block_influence")


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind that run one after the other.

    Attributes
    ----------
    name : of the list of blocks.
    count : the entry of the configuration that says how many there are.
    branches : a block's projections into the residual streams, as far as it has them.
    fixed : positions of blocks that always stay.
    """

    name: str
    count: str
    branches: tuple[str, ...]
    fixed: tuple[int, ...] = ()


# of blocks that read and write the streams of image and text
JOINT = ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")
# by the name of the class, since importing them all takes seconds
STACKS: Mapping[str, tuple[Stack, ...]] = {
    # the output layer reads the embedding of time and label that is in the first block
    "DiTTransformer2DModel": (
        Stack("transformer_blocks", "num_layers", ("attn1.to_out.0", "ff.net.2"), fixed=(0,)),
    ),
    "PixArtTransformer2DModel": (
        Stack("transformer_blocks", "num_layers", ("attn1.to_out.0", "attn2.to_out.0", "ff.net.2")),
    ),
    # the last block reads the text and does not write it
    "SD3Transformer2DModel": (
        Stack("transformer_blocks", "num_layers", (*JOINT, "attn2.to_out.0"), fixed=(-1,)),
    ),
    "FluxTransformer2DModel": (
        Stack("transformer_blocks", "num_layers", JOINT),
        Stack("single_transformer_blocks", "num_single_layers", ("proj_out",)),
    ),
}


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of a transformer; none of anything else."""
    return next((STACKS[c.__name__] for c in type(model).__mro__ if c.__name__ in STACKS), ())


def check_granularity(model: nn.Module, granularity: str, allocation: str) -> None:
    """Refuse a granularity that a model has not, or free widths where blocks go."""
    has = ("block", "unit", "both") if stacks_of(model) else ("fine", "coarse")
    if granularity not in has:
        raise ValueError(
            f"a {type(model).__name__} is pruned with granularity {' or '.join(has)}; got "
            f"granularity {granularity!r}; choose one"
        )
    if granularity in ("block", "both") and allocation == "global":
        raise ValueError(
            f"allocation 'global' lets layers compete for units, and granularity {granularity!r} "
            "removes layers; choose allocation 'uniform' or granularity 'unit'"
        )


def depth_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """For every kind of blocks that may go, a group with a unit and a slot for each of them."""
    groups = []
    for stack in stacks_of(model):
        blocks: Any = model.get_submodule(stack.name)
        kinds: dict[tuple[Any, ...], list[int]] = {}
        stays = {position % len(blocks) for position in stack.fixed}
        for position, block in enumerate(blocks):
            shapes = tuple((name, p.shape) for name, p in block.named_parameters())
            if position not in stays:
                kinds.setdefault(shapes, []).append(position)
        for positions in kinds.values():
            name = f"{stack.name}.{positions[0]}"
            slots = [Slot(f"{stack.name}.{p}", "gate", (0,), (i,)) for i, p in enumerate(positions)]
            groups.append(ChannelGroup(name, 0, len(slots), 1, tuple(slots)))
    return tuple(groups)


def depth_layout(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    keep_macs: float,
    even_within: float,
    *,
    units: bool = False,
) -> Layout:
    """Lay out a gate for every block that may go.

    Parameters
    ----------
    model : the dense transformer.
    groups : from :func:`depth_groups`.
    keep_macs : fraction of the MACs to keep, in (0, 1].
    even_within : fraction of the MACs that evenness may cost.
    units : whether inner units go as well, so that blocks leave them about as much to do.

    Raises
    ------
    ValueError : where no block may go, or too few.
    """
    if not groups:
        raise ValueError(
            f"granularity 'block' needs blocks that may go; this {type(model).__name__} has none "
            "beside those that always stay; choose a deeper model"
        )
    offsets = [0, *np.cumsum([group.units for group in groups]).tolist()]
    gates = {
        slot.module: offset + slot.channels[0]
        for group, offset in zip(groups, offsets, strict=False)
        for slot in group.slots
    }
    branches = {stack.name: stack.branches for stack in stacks_of(model)}
    modules: dict[str, Any] = dict(model.named_modules())
    gated = {
        f"{name}.{branch}": torch.full((modules[f"{name}.{branch}"].out_features,), unit)
        for name, unit in gates.items()
        for branch in branches[name.rpartition(".")[0]]
        if f"{name}.{branch}" in modules
    }
    sizes = torch.tensor([group.units for group in groups])
    counts = choose_counts(model, groups, keep_macs, even_within, units=units)
    return Layout(
        groups=tuple(groups),
        offsets=tuple(offsets[:-1]),
        units=offsets[-1],
        block=torch.arange(len(groups)).repeat_interleave(sizes),
        keep_counts=torch.tensor(counts),
        inputs={},
        outputs={},
        norms={},
        queries={},
        unaligned=(),
        widths=counts,
        gates=gates,
        gated=gated,
    )


def choose_counts(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    keep_macs: float,
    even_within: float,
    *,
    units: bool,
) -> tuple[int, ...]:
    """How many blocks of each kind stay: as evenly as possible, with at most ``keep_macs``.

    Where ``units`` go as well, blocks keep what is nearest to the root of ``keep_macs``, and not
    less than ``keep_macs``. Evenness may cost at most ``even_within`` of the MACs.

    Raises
    ------
    ValueError : where the blocks that must stay keep more than ``keep_macs``.
    """
    grid, kept = _legal_counts(model, groups)
    if not units and kept.min() > keep_macs:
        raise ValueError(
            f"keep_macs must be at least {math.ceil(kept.min() * 1e4) / 1e4:.4f} for this "
            f"{type(model).__name__}, what is left without the blocks that may go; got "
            f"keep_macs={keep_macs}; raise it"
        )
    # what keeps all keeps 1 but for rounding
    if units:  # they decide whether the rest is possible
        legal, off = kept >= keep_macs - 1e-9, np.abs(kept - math.sqrt(keep_macs))
    else:
        legal, off = kept <= keep_macs + 1e-9, -kept
    fits = legal & (off <= off[legal].min() + even_within)
    grid, off = grid[fits], off[fits]
    shares = grid / np.array([group.units for group in groups])
    best = np.lexsort((off, (shares.max(1) - shares.min(1)).round(9)))[0]
    return tuple(int(count) for count in grid[best])


def _legal_counts(
    model: nn.Module, groups: Sequence[ChannelGroup]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """How many blocks of each kind may stay, ``(choices, kinds)``, and the MACs kept by each."""
    total = unet_cost(model).macs
    prices = np.array([total - unet_cost(_without(model, group.name)).macs for group in groups])
    sizes = np.array([group.units for group in groups])
    stacks = [group.name.rpartition(".")[0] for group in groups]
    stays = {name: len(model.get_submodule(name)) for name in stacks}  # type: ignore[arg-type]
    for stack, group in zip(stacks, groups, strict=True):
        stays[stack] -= group.units
    # a stack never becomes empty
    least = [0 if stays[stack] else 1 for stack in stacks]
    axes = [np.arange(low, size + 1) for low, size in zip(least, sizes, strict=True)]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    return grid, 1 - (sizes - grid) @ prices / total


def _without(model: Any, block: str) -> nn.Module:
    """The model on the meta device without one block."""
    with torch.device("meta"):
        copy = type(model).from_config(model.config)
    stack, _, position = block.rpartition(".")
    del copy.get_submodule(stack)[int(position)]
    return copy


def kept_blocks(model: nn.Module, layout: Layout, mask: torch.Tensor) -> dict[str, list[int]]:
    """The positions of the blocks that stay, by stack; nothing where no block may go."""
    gone = closed(layout, mask)
    return {
        stack.name: [
            i
            for i in range(len(model.get_submodule(stack.name)))  # type: ignore[arg-type]
            if f"{stack.name}.{i}" not in gone
        ]
        for stack in (stacks_of(model) if layout.gates else ())
    }


def shallow_config(model: Any, layout: Layout, mask: torch.Tensor) -> dict[str, Any]:
    """What changes in the configuration; of an SD3 transformer it depends on which blocks go."""
    changes: dict[str, Any] = dict(counts_of(model, layout))
    dual = model.config.get("dual_attention_layers")
    if dual and layout.gates:
        (kept,) = kept_blocks(model, layout, mask).values()
        changes["dual_attention_layers"] = tuple(i for i, old in enumerate(kept) if old in dual)
    return changes


def counts_of(model: nn.Module, layout: Layout) -> dict[str, int]:
    """How many blocks stay, by the entry of the configuration."""
    # the same number whichever they are
    return {
        stack.count: len(model.get_submodule(stack.name))  # type: ignore[arg-type]
        - sum(
            group.units - kept
            # groups of inner units come after those of blocks
            for group, kept in zip(layout.groups, layout.widths, strict=False)
            if group.name.rpartition(".")[0] == stack.name
        )
        for stack in stacks_of(model)
    }


def cut_blocks(
    tensors: Mapping[str, torch.Tensor], layout: Layout, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Leave out the tensors of blocks that go, and count the others anew; see ``surgery.cut``."""
    gone, result = closed(layout, mask), {}
    for name, tensor in tensors.items():
        stack, position, rest = _parts(name)
        if f"{stack}.{position}" in gone:
            continue
        if rest:
            before = sum(f"{stack}.{i}" in gone for i in range(int(position)))
            name = f"{stack}.{int(position) - before}.{rest}"
        result[name] = tensor
    return result


def closed(layout: Layout, mask: torch.Tensor) -> set[str]:
    """The names of the blocks that go."""
    return {name for name, unit in layout.gates.items() if mask[unit] < 0.5}


def _parts(name: str) -> tuple[str, str, str]:
    """List, position and rest of a parameter's name; the name alone where it is in no list."""
    head, _, tail = name.partition(".")
    position, _, rest = tail.partition(".")
    return (head, position, rest) if position.isdigit() else (name, "", "")


def block_of(name: str) -> str:
    """The name of the block that a module or parameter lies in; of no block where it is in none."""
    return ".".join(name.split(".")[:2])


def depth_scores(
    soft: "SoftUNet", batches: Sequence[Batch], loss: Callable[[Batch], Any], criterion: str
) -> torch.Tensor:
    """Keep-scores ``(units,)`` of whole blocks, larger = keep.

    - ``uniform_depth``: what is nearest to evenly spaced places in each stack, from its first to
      its last block.
    - ``block_influence``: one minus the mean cosine between a block's input and its output, over
      all tokens (Men et al., "ShortGPT", arXiv 2403.03853).

    Parameters
    ----------
    soft : the network, with all gates open.
    batches : for the influence.
    loss : runs the network on a batch.
    criterion : as above.
    """
    layout = soft.layout
    if criterion == "uniform_depth":
        counts = counts_of(soft.unet, layout)
        scores = torch.zeros(layout.units, device=soft.mask.device)
        for stack in stacks_of(soft.unet):
            length = len(soft.unet.get_submodule(stack.name))
            places = torch.linspace(0, length - 1, counts[stack.count]).round()
            for position in range(length):
                if (unit := layout.gates.get(f"{stack.name}.{position}")) is not None:
                    scores[unit] = -(places - position).abs().min()
        return scores
    total = torch.zeros(layout.units, device=soft.mask.device)

    def watch(unit: int) -> Any:
        def hook(_: Any, arguments: Any, named: Any, output: Any) -> None:
            before = named["hidden_states"] if "hidden_states" in named else arguments[0]
            after = output[-1] if isinstance(output, tuple) else output
            total[unit] += (1 - F.cosine_similarity(before, after, dim=-1)).mean() / len(batches)

        return hook

    handles = [
        soft.unet.get_submodule(name).register_forward_hook(watch(unit), with_kwargs=True)
        for name, unit in layout.gates.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return distributed.mean({"influence": total})["influence"]

"""Optimal brain surgery of heads and feed-forward channels, in one calibration pass.

After OBS-Diff (ICLR 2026): the Hessian of the error of a linear layer's output is the second moment
of its input, and timesteps with much noise, where sampling begins, weigh more. The form of that
weight, and that all layers are cut at once, on the inputs of the dense model, are ours.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from compress.common.memory import check_memory
from compress.data.batches import Batch
from compress.methods.gradflow.masks import SoftUNet
from compress.parallel import distributed

CRITERION = "obs"
# of the mean of the diagonal, added to it
DAMPING = 0.01


def hessians(
    soft: SoftUNet, batches: Sequence[Batch], loss: Callable[[Batch], Any], timesteps: int
) -> dict[str, torch.Tensor]:
    """Second moments ``(width, width)`` of what the layers that read units get, in float64.

    Parameters
    ----------
    soft : the network, with all masks open.
    batches : of the calibration.
    loss : runs the network on a batch.
    timesteps : of the noise schedule. Timestep t weighs ``1 - log(T - t) / log(T + 1)``.

    Raises
    ------
    ValueError : where the moments do not fit into the memory.
    """
    layers: list[Any] = [soft.unet.get_submodule(name) for name in soft.layout.inputs]
    check_memory(
        8 * sum(layer.in_features**2 for layer in layers),
        str(soft.mask.device),
        "a matrix of second moments is held for each layer that reads units",
        "choose another criterion, or a machine with more memory",
    )
    total: dict[str, torch.Tensor] = {}
    weight = torch.empty(0)

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor]], None]:
        def hook(_: Any, inputs: tuple[torch.Tensor]) -> None:
            tokens = inputs[0].double()
            weighted = tokens * (weight / (tokens.shape[1] * len(batches))).view(-1, 1, 1)
            moment = weighted.flatten(0, 1).T @ tokens.flatten(0, 1)
            total[name] = total[name] + moment if name in total else moment

        return hook

    handles = [
        soft.unet.get_submodule(name).register_forward_pre_hook(watch(name))
        for name in soft.layout.inputs
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                left = (timesteps - batch.timesteps).double()
                weight = 1 - left.log() / math.log(timesteps + 1)
                loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _damped(moment) for name, moment in distributed.mean(total).items()}


def _damped(moment: torch.Tensor) -> torch.Tensor:
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def scores(soft: SoftUNet, moments: dict[str, torch.Tensor]) -> torch.Tensor:
    """Keep-scores ``(units,)``: how much of the layers' output no refit can make up for.

    Of the columns u of a weight W, ``tr(W_u ((H^-1)_uu)^-1 W_u^T)``.
    """
    total = torch.zeros(soft.layout.units, dtype=torch.float64, device=soft.mask.device)
    for name, moment in moments.items():
        weight: Any = soft.unet.get_submodule(name).weight.detach().double()
        index, inverse = soft.layout.inputs[name].to(moment.device), torch.linalg.inv(moment)
        for unit in index.unique().tolist():
            columns = (index == unit).nonzero().squeeze(1)
            removed = weight[:, columns].T
            total[unit] += (
                removed * torch.linalg.solve(inverse[columns][:, columns], removed)
            ).sum()
    return total.to(soft.mask.dtype)


def greedy_scores(soft: SoftUNet, moments: dict[str, torch.Tensor]) -> torch.Tensor:
    """Keep-scores ``(units,)`` of units that go one by one, each time the cheapest of its layer.

    The root of the error of the layer's output once a unit and all before it are gone, and what is
    left is refitted: of two units that stand in for each other only one goes early (after Frantar &
    Alistarh, "Optimal Brain Compression", arXiv 2208.11580).
    """
    total = torch.zeros(soft.layout.units, dtype=torch.float64, device=soft.mask.device)
    for name, moment in moments.items():
        weight: Any = soft.unet.get_submodule(name).weight.detach().double()
        index, inverse = soft.layout.inputs[name].to(moment.device), torch.linalg.inv(moment)
        units = [(index == unit).nonzero().squeeze(1) for unit in index.unique()]
        # of the units that are left: heads, and the channels that some layers read beside them
        stacks = [
            torch.stack([columns for columns in units if len(columns) == size])
            for size in sorted({len(columns) for columns in units})
        ]
        error = 0.0
        while stacks:
            costs = []
            for left in stacks:
                own = inverse[left[:, :, None], left[:, None, :]]
                removed = weight[:, left].permute(1, 2, 0)
                costs.append((removed * torch.linalg.solve(own, removed)).sum((1, 2)))
            number = min(range(len(stacks)), key=[float(cost.min()) for cost in costs].__getitem__)
            left, cheapest = stacks[number], int(costs[number].argmin())
            columns = left[cheapest]
            error += float(costs[number][cheapest])
            total[index[columns[0]]] += error
            share = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
            weight = weight - weight[:, columns] @ share
            inverse = inverse - inverse[:, columns] @ share
            stacks[number] = left[torch.arange(len(left)) != cheapest]
            stacks = [left for left in stacks if len(left)]
    return total.sqrt().to(soft.mask.dtype)


@torch.no_grad()
def refit(soft: SoftUNet, moments: dict[str, torch.Tensor]) -> None:
    """Fit the columns of the kept units to what all columns gave, in place.

    ``W_K <- W H_:K (H_KK)^-1``, the least-squares fit, for a binary mask.
    """
    kept = soft.layout.extend(soft.mask) > 0.5
    for name, moment in moments.items():
        weight: Any = soft.unet.get_submodule(name).weight
        stays = kept[soft.layout.inputs[name].to(kept.device)]
        product = (weight.double() @ moment[:, stays]).T
        weight[:, stays] = torch.linalg.solve(moment[stays][:, stays], product).T.to(weight)

"""Keep-scores of units, from the loss or its gradient's norm.

The gradient-flow criterion removes what raises the gradient norm: removing group i changes
``||grad L||^2`` by about ``-2 sum_{j in i} theta_j (H g)_j`` (Wan et al., arXiv 2501.09464; the
GraSP direction). Near a converged model the signed sum is noise, so the default sums absolute
values per weight, for which Lubana & Dick (arXiv 2009.11839) argue on other nets (our choice).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from diffusers import SchedulerMixin
from torch.nn.attention import SDPBackend, sdpa_kernel

from compress.data.batches import Batch
from compress.methods.gradflow import depth, obs
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.masks import SoftUNet
from compress.models.objective import prediction_target
from compress.parallel import distributed

Tensors = dict[str, torch.Tensor]
LossOf = Callable[[Batch], torch.Tensor]

# Relative error against the exact product in float32: 1e-3 at 1e-4, 5e-5 at 1e-5, 60% at 1e-2
FINITE_STEP = 3e-5
CRITERIA = ("gradient_flow", "lookahead", "taylor", "magnitude", "random")


@contextlib.contextmanager
def _criterion_passes(soft: SoftUNet) -> Iterator[None]:
    """Without dropout and in full precision inside."""
    training = soft.training
    soft.eval()
    try:
        with full_precision():
            yield
    finally:
        soft.train(training)


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Finite differences drown in autocast's and TF32's rounding: both are off inside."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = saved


def denoising_loss(
    soft: SoftUNet, scheduler: SchedulerMixin, mask: torch.Tensor | None = None
) -> LossOf:
    """Mean squared error of the prediction for a batch, in float32.

    ``SoftUNet.forward`` is called on the class: accelerate replaces the instance's forward by one
    that enters autocast.
    """

    def loss(batch: Batch) -> torch.Tensor:
        noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
        predicted = SoftUNet.forward(soft, noisy, batch.timesteps, mask, batch.condition)
        return (predicted - prediction_target(scheduler, batch)).square().mean()

    return loss


def mean_gradient(
    loss: LossOf, parameters: Tensors, batches: Sequence[Batch]
) -> tuple[Tensors, float]:
    """Mean gradient over batches and processes, by parameter name, and the mean loss.

    Each process has its own, equally large, share of every batch.
    """
    leaves = list(parameters.values())
    total = _sums(parameters)
    value = 0.0
    for batch in batches:
        current = loss(batch)
        gradients = torch.autograd.grad(current, leaves, allow_unused=True)
        value += current.item() / len(batches)
        for sum_, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                sum_ += gradient
    return _mean(total, parameters, len(batches)), distributed.mean_value(value, leaves[0].device)


def _sums(parameters: Tensors) -> Tensors:
    """Zeros to add to: in float64, so that the order of batches and processes leaves no trace."""
    return {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}


def _mean(total: Tensors, parameters: Tensors, count: int) -> Tensors:
    """Sums of ``count`` terms on each process, averaged and rounded to the parameters' dtype."""
    averaged = distributed.mean({name: sum_ / count for name, sum_ in total.items()})
    return {name: averaged[name].to(p.dtype) for name, p in parameters.items()}


def norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Euclidean norm over all tensors."""
    return sum(t.detach().double().square().sum().item() for t in tensors.values()) ** 0.5


def finite_hvp(
    loss: LossOf,
    parameters: Tensors,
    batches: Sequence[Batch],
    direction: Tensors,
    relative_step: float = FINITE_STEP,
) -> Tensors:
    """Hessian-vector product by a central difference along ``direction``.

    ``[grad L(theta + eta v) - grad L(theta - eta v)] / (2 eta)`` with
    ``eta = relative_step * ||theta|| / ||v||``: two more backward passes, no second-order graph.
    The parameters are restored from copies, bit for bit.
    """
    length = norm(direction)
    if length == 0:
        return {name: torch.zeros_like(v) for name, v in direction.items()}
    eta = relative_step * norm(parameters) / length
    original = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        sides = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for name, p in parameters.items():
                    p.copy_(original[name]).add_(direction[name], alpha=sign * eta)
            sides.append(mean_gradient(loss, parameters, batches)[0])
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(original[name])
    return {name: (sides[0][name] - sides[1][name]) / (2 * eta) for name in parameters}


def exact_hvp(
    loss: LossOf, parameters: Tensors, batches: Sequence[Batch], direction: Tensors
) -> Tensors:
    """Hessian-vector product by double backward: the reference of :func:`finite_hvp`."""
    names, leaves = list(parameters), list(parameters.values())
    total = _sums(parameters)
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradients = torch.autograd.grad(
                loss(batch), leaves, create_graph=True, allow_unused=True
            )
            used = [(n, g) for n, g in zip(names, gradients, strict=True) if g is not None]
            product = torch.stack([(g * direction[n]).sum() for n, g in used]).sum()
            second = torch.autograd.grad(product, leaves, allow_unused=True)
            for name, value in zip(names, second, strict=True):
                if value is not None:
                    total[name] += value
    return _mean(total, parameters, len(batches))


def per_unit(
    values: Mapping[str, torch.Tensor], layout: Layout, sides: Sequence[str] = ("in", "out", "norm")
) -> torch.Tensor:
    """Sum a quantity that lives on weights over the slices of every unit.

    Parameters
    ----------
    values : by parameter name (without any prefix), shaped like the parameters.
    layout : where each unit acts.
    sides : which slices count: a consumer's columns ("in"), a producer's rows and bias ("out"),
        norm weights and biases ("norm").

    Returns
    -------
    ``(units,)``.
    """
    device = next(iter(values.values())).device
    total = torch.zeros(layout.units + 1, device=device)
    tables = {"in": layout.inputs, "out": layout.outputs, "norm": layout.norms}
    for name, value in values.items():
        module = name.rpartition(".")[0]
        # everything in a transformer's block is of its gate
        if (gate := layout.gates.get(depth.block_of(name))) is not None:
            total[gate] += value.sum()
        for side in sides:
            index = tables[side].get(module)
            if index is None:
                continue
            if side == "in":
                if value.dim() < 2:
                    continue
                flat = value.transpose(0, 1).flatten(1).sum(1)
            else:
                flat = value.flatten(1).sum(1) if value.dim() > 1 else value
            total.index_add_(0, index.to(device), flat.to(total.dtype))
    return total[: layout.units]


def fisher_scores(
    soft: SoftUNet, scheduler: SchedulerMixin, batches: Sequence[Batch], *, parts: int = 1
) -> torch.Tensor:
    """Keep-scores ``sqrt(E (dL/dm)^2)`` of all units: the diagonal of the Fisher information.

    Near a minimum the mean of the mask's gradient is noise, and its square over minibatches is
    proportional to the curvature, so to what removing the unit costs (optimal brain damage; Theis
    et al., arXiv 1801.05787, on other nets). Every optimiser step of a soft stage gives such a
    gradient for nothing, though not quite the same: of the training loss, distillation included,
    with the model's dropout and in training's precision.

    Parameters
    ----------
    batches, parts : as in :func:`diff_pruning_scores`; one gradient per minibatch.
    """
    squares = torch.zeros_like(soft.mask, dtype=torch.float64)
    minibatches = [batches[first : first + parts] for first in range(0, len(batches), parts)]
    with _criterion_passes(soft):
        for minibatch in minibatches:
            mask = soft.mask.detach().clone().requires_grad_()
            loss = denoising_loss(soft, scheduler, mask)
            squares += mean_gradient(loss, {"mask": mask}, minibatch)[0]["mask"].double().square()
    return (squares / len(minibatches)).sqrt().to(soft.mask.dtype)


def raw_scores(
    soft: SoftUNet,
    scheduler: SchedulerMixin,
    batches: Sequence[Batch],
    *,
    criterion: str,
    reduction: str = "absolute",
    hvp: str = "finite",
    horizon: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:
    """Keep-scores of all units, larger = keep; no normalisation.

    With g the mean gradient of the denoising loss at theta * m, H its Hessian, and sums over the
    slices of a unit:

    - ``gradient_flow``: ``sum |theta Hg|``; signed: ``2 sum theta Hg``, minus the first-order
      change of ``||g||^2`` when the unit goes.
    - ``lookahead``: ``sum |theta (g - 2 horizon Hg)|``; signed: its negative sum, the first-order
      rise of ``L - horizon ||g||^2`` when the unit goes.
    - ``taylor``: ``sum |theta g|``; signed: ``-sum theta g``, the first-order rise of the loss.
    - ``magnitude``: ``sqrt(sum theta^2)``.
    - ``random``: uniform, a function of ``seed`` alone.

    Parameters
    ----------
    soft : the masked network; evaluated without dropout, in full precision.
    scheduler : a diffusers scheduler, for ``add_noise``.
    batches : shared by all passes.
    criterion, reduction, hvp : as above; "absolute" or "signed"; "finite" or "exact".
    horizon : in learning rate x steps of SGD; capped so that ``horizon ||g||^2 <= L / 2``, since
        the energy is unbounded below.
    seed : of ``random``.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}; got {criterion!r}")
    layout = soft.layout
    parameters = dict(soft.unet.named_parameters())
    device = next(iter(parameters.values())).device
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(layout.units, generator=generator).to(device)
    if criterion == "magnitude":
        squares = {name: p.detach().square() for name, p in parameters.items()}
        return per_unit(squares, layout).sqrt()
    loss = denoising_loss(soft, scheduler)
    with _criterion_passes(soft):
        gradient, value = mean_gradient(loss, parameters, batches)
        if criterion != "taylor":
            times_hessian = exact_hvp if hvp == "exact" else finite_hvp
            product = times_hessian(loss, parameters, batches, gradient)
    direction, sign = gradient, -1.0
    if criterion == "gradient_flow":
        direction, sign = product, 2.0
    elif criterion == "lookahead":
        horizon = min(horizon, 0.5 * value / max(norm(gradient) ** 2, 1e-30))
        direction = {n: gradient[n] - 2 * horizon * product[n] for n in gradient}
    contributions = {name: p.detach() * direction[name] for name, p in parameters.items()}
    if reduction == "signed":
        return sign * per_unit(contributions, layout)
    return per_unit({name: c.abs() for name, c in contributions.items()}, layout)


def diff_pruning_scores(
    soft: SoftUNet,
    scheduler: SchedulerMixin,
    batches: Sequence[Batch],
    *,
    threshold: float,
    parts: int = 1,
    timesteps: int = 50,
) -> torch.Tensor:
    """Keep-scores of Diff-Pruning (Fang et al., NeurIPS 2023, arXiv 2305.10924).

    Gradients are accumulated over timesteps whose relative loss ``L_t / max L_t`` exceeds
    ``threshold``; the score is ``sum |theta g|`` over a unit's slices.

    Parameters
    ----------
    batches : their images and noise are used at every timestep.
    threshold : 0 takes all timesteps; 0.05 is the paper's default on CIFAR-10.
    parts : how many consecutive batches make up the minibatch of one timestep.
    timesteps : how many evenly spaced timesteps are looked at, at most (the paper walks all; our
        choice).
    """
    parameters = dict(soft.unet.named_parameters())
    loss = denoising_loss(soft, scheduler)
    length = scheduler.config.num_train_timesteps
    timesteps = min(timesteps, length)
    gradients, losses = [], []
    with _criterion_passes(soft):
        for k in range(timesteps):
            t = min(length - 1, round(k * length / timesteps))
            first = k * parts % len(batches)
            minibatch = [
                batch._replace(timesteps=torch.full_like(batch.timesteps, t))
                for batch in batches[first : first + parts]
            ]
            gradient, value = mean_gradient(loss, parameters, minibatch)
            losses.append(value)
            gradients.append(gradient)
    chosen = [
        g for g, value in zip(gradients, losses, strict=True) if value > threshold * max(losses)
    ]
    total = {name: torch.stack([g[name] for g in chosen]).sum(0) for name in parameters}
    return per_unit({n: (p.detach() * total[n]).abs() for n, p in parameters.items()}, soft.layout)


def depth_scores(
    soft: SoftUNet, scheduler: SchedulerMixin, batches: Sequence[Batch], criterion: str
) -> torch.Tensor:
    """Keep-scores of whole blocks; see :func:`compress.methods.gradflow.depth.depth_scores`."""
    with _criterion_passes(soft):
        return depth.depth_scores(soft, batches, denoising_loss(soft, scheduler), criterion)


def obs_moments(soft: SoftUNet, scheduler: SchedulerMixin, batches: Sequence[Batch]) -> Tensors:
    """See :func:`compress.methods.gradflow.obs.hessians`."""
    length = scheduler.config.num_train_timesteps
    with _criterion_passes(soft):
        return obs.hessians(soft, batches, denoising_loss(soft, scheduler), length)


def normalise(scores: torch.Tensor, layout: Layout, criterion: str) -> torch.Tensor:
    """Scores in units of the layer's mean absolute score.

    ``lookahead`` is an energy and keeps the proportions between layers: it is divided by one
    number, the mean over all units, which only sets the unit of the flow rate.
    """
    if criterion == "lookahead":
        return scores / scores.abs().mean().clamp(min=1e-30)
    result = torch.empty_like(scores)
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        part = scores[offset : offset + group.units]
        result[offset : offset + group.units] = part / part.abs().mean().clamp(min=1e-30)
    return result

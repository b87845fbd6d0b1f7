"""Scores: Hessian-vector products, what the slice sums mean, and every criterion by an oracle."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import nn

from builders import models
from builders.tiers import few
from compress.data.batches import Batch
from compress.methods.gradflow import method
from compress.methods.gradflow.criterion import (
    CRITERIA,
    denoising_loss,
    diff_pruning_scores,
    exact_hvp,
    finite_hvp,
    fisher_scores,
    full_precision,
    mean_gradient,
    norm,
    normalise,
    per_unit,
    raw_scores,
)
from compress.methods.gradflow.flow import spearman
from compress.methods.gradflow.masks import SoftUNet


def softened(name="one_level", widths=(4,), *, double=True, mask="soft", **changes):
    """A soft UNet in evaluation, its scheduler and two batches."""
    unet = models.build(name, **changes)
    layout = models.layout(name, widths)
    soft = SoftUNet(unet, layout).eval()
    if mask == "soft":
        soft.mask.copy_(models.soft_mask(layout))
    data = models.batches(unet)
    if double:
        soft, data = soft.double(), models.in_double(data)
    return soft, models.scheduler(), data


def parameters_of(soft) -> dict[str, torch.Tensor]:
    return dict(soft.unet.named_parameters())


def units_to_try(layout) -> list[tuple]:
    """One unit of every group: (index, group, unit in the group)."""
    tried = []
    for number, (group, offset) in enumerate(zip(layout.groups, layout.offsets, strict=True)):
        unit = number % group.units
        tried.append((offset + unit, group, unit))
    return tried


def two_layers():
    """A two-layer net with a smooth loss; a "batch" is a pair of tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(5, 3).double(), torch.randn(5, 2).double()) for _ in range(2)]
    return net, data, lambda batch: (net(batch[0]) - batch[1]).square().mean()


def test_hessian_products_equal_the_full_hessian():
    net, data, loss = two_layers()
    parameters = dict(net.named_parameters())
    shapes = [p.shape for p in parameters.values()]
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])

    def of_flat(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        values = {n: v.view(s) for n, v, s in zip(parameters, parts, shapes, strict=True)}
        outputs = [(torch.func.functional_call(net, values, (x,)), y) for x, y in data]
        return torch.stack([(o - y).square().mean() for o, y in outputs]).mean()

    hessian = torch.autograd.functional.hessian(of_flat, flat)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    expected = hessian @ torch.cat([v.flatten() for v in direction.values()])
    exact = exact_hvp(loss, parameters, data, direction)
    assert torch.allclose(torch.cat([v.flatten() for v in exact.values()]), expected, rtol=1e-10)
    finite = finite_hvp(loss, parameters, data, direction)
    actual = torch.cat([v.flatten() for v in finite.values()])
    assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_finite_product_agrees_with_the_exact_one_on_a_unet():
    soft, scheduler, data = softened(double=False)
    loss, parameters = denoising_loss(soft, scheduler), parameters_of(soft)
    gradient, _ = mean_gradient(loss, parameters, data)
    finite = finite_hvp(loss, parameters, data, gradient)
    exact = exact_hvp(loss, parameters, data, gradient)
    error = norm({name: finite[name] - exact[name] for name in exact}) / norm(exact)
    assert error < 0.02  # float32; see FINITE_STEP


def test_finite_product_restores_parameters_bit_for_bit():
    soft, scheduler, data = softened(double=False)
    loss, parameters = denoising_loss(soft, scheduler), parameters_of(soft)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    gradient, _ = mean_gradient(loss, parameters, data)
    finite_hvp(loss, parameters, data, gradient)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert all(p.grad is None for p in parameters.values())
    calls = []

    def breaks(batch):
        calls.append(1)
        if len(calls) == 3:  # on the second side
            raise FloatingPointError("broken")
        return loss(batch)

    with pytest.raises(FloatingPointError, match="broken"):
        finite_hvp(breaks, parameters, data, gradient)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_product_along_nothing_is_nothing():
    net, data, loss = two_layers()
    parameters = dict(net.named_parameters())
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    product = finite_hvp(loss, parameters, data, zeros)
    assert all(not v.any() for v in product.values())


@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_full_precision_turns_tf32_and_autocast_off_and_back(flags):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = matmul.allow_tf32, cudnn.allow_tf32
    a = torch.randn(4, 4)
    try:
        matmul.allow_tf32, cudnn.allow_tf32 = flags
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with pytest.raises(RuntimeError, match="stop"), full_precision():
                assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
                assert (a @ a).dtype == torch.float32
                raise RuntimeError("stop")
            assert (a @ a).dtype == torch.bfloat16
        assert (matmul.allow_tf32, cudnn.allow_tf32) == flags
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = saved


def score(soft, scheduler, data, criterion, **settings):
    if criterion == "fisher":
        return fisher_scores(soft, scheduler, data)
    if criterion == "diff_pruning":
        return diff_pruning_scores(soft, scheduler, data, threshold=0.05, timesteps=2)
    return raw_scores(soft, scheduler, data, criterion=criterion, **settings)


# the horizon is of those that are the gradient, or its product with the Hessian, alone
@pytest.mark.parametrize(
    "criterion",
    few(
        ["fisher", "taylor", "gradient_flow", "lookahead", "diff_pruning"],
        *("fisher", "lookahead", "diff_pruning"),
    ),
)
def test_scoring_ignores_dropout_and_restores_the_mode(criterion):
    soft, scheduler, data = softened(double=False, dropout=0.5)
    before = {name: p.detach().clone() for name, p in parameters_of(soft).items()}
    scores = score(soft, scheduler, data, criterion, horizon=1e-3)
    assert not soft.training and scores.shape == (soft.layout.units,)
    soft.train()
    again = score(soft, scheduler, data, criterion, horizon=1e-3)
    assert soft.training and soft.unet.up_blocks.training
    assert torch.equal(scores, again)
    assert all(torch.equal(p, before[n]) for n, p in parameters_of(soft).items())
    assert all(p.grad is None for p in parameters_of(soft).values())

    def breaks(*_):
        raise FloatingPointError("broken")

    broken = SimpleNamespace(add_noise=breaks, config=scheduler.config)
    with pytest.raises(FloatingPointError):
        score(soft, broken, data, criterion)
    assert soft.training


def mask_gradient(soft, scheduler, data) -> torch.Tensor:
    """dL/dm by autograd, the mean over batches."""
    mask = soft.mask.clone().requires_grad_()
    loss = denoising_loss(soft, scheduler, mask)
    (gradient,) = torch.autograd.grad(sum(loss(b) for b in data) / len(data), mask)
    return gradient


def slice_sums(soft, scheduler, data, sides) -> torch.Tensor:
    """The signed sum of theta * gradient over the slices of every unit."""
    parameters = parameters_of(soft)
    gradient, _ = mean_gradient(denoising_loss(soft, scheduler), parameters, data)
    products = {name: p.detach() * gradient[name] for name, p in parameters.items()}
    return per_unit(products, soft.layout, sides)


def assert_sums_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the rounding of sums, whose terms may cancel, in float32."""
    size = expected.abs().max().item()
    assert size > 1e-6
    assert torch.allclose(actual.double(), expected.double(), rtol=1e-4, atol=1e-5 * size)


def inner_units(layout) -> torch.Tensor:
    """Units inside attention: no norm reads them, so the mask acts in weights alone."""
    inner = torch.zeros(layout.units, dtype=torch.bool)
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        if all(slot.side != "norm" for slot in group.slots) and ".to_" in group.name:
            inner[offset : offset + group.units] = True
    return inner


def test_consumer_slices_of_attention_are_the_masks_gradient():
    soft, scheduler, data = softened("plain", (4, 8))
    inner = inner_units(soft.layout)
    assert inner.sum() == 4 * 4  # four modules of four heads
    expected = (soft.mask * mask_gradient(soft, scheduler, data))[inner]
    actual = slice_sums(soft, scheduler, data, ["in"])[inner]
    assert_sums_equal(actual, expected)


def test_consumer_slices_are_the_masks_gradient_wherever_norms_do_not_read_it():
    # with the mask taken out of the norms' statistics the identity holds for every unit
    soft, scheduler, data = softened()
    bare = SoftUNet(models.build("one_level"), dataclasses.replace(soft.layout, norms={})).double()
    bare.mask.copy_(soft.mask)
    expected = soft.mask * mask_gradient(bare, scheduler, data)
    assert_sums_equal(slice_sums(bare, scheduler, data, ["in"]), expected)


def test_slice_sums_correlate_with_the_masks_gradient_over_all_units():
    # norms' statistics are the difference; the sum over slices is an estimate where they are
    soft, scheduler, data = softened("plain", (4, 8))
    gradient = soft.mask * mask_gradient(soft, scheduler, data)
    consumers = slice_sums(soft, scheduler, data, ["in"])
    # measured: 0.81 and 0.70
    assert spearman(consumers, gradient) > 0.7
    everywhere = slice_sums(soft, scheduler, data, ["in", "out", "norm"])
    assert 0.5 < spearman(everywhere, gradient) < spearman(consumers, gradient)


@pytest.mark.parametrize("criterion", ["taylor", "gradient_flow", "lookahead"])
def test_signed_scores_are_first_order_changes(criterion):
    """Scaling all slices of a unit by s changes L, ||g||^2 or the energy as the score says."""
    horizon = 0.01  # of no effect on the first two
    soft, scheduler, data = softened()
    parameters, loss = parameters_of(soft), denoising_loss(soft, scheduler)
    scores = raw_scores(
        soft,
        scheduler,
        data,
        criterion=criterion,
        reduction="signed",
        hvp="exact",
        horizon=horizon,
    )

    def measured() -> float:
        gradient, value = mean_gradient(loss, parameters, data)
        squared = norm(gradient) ** 2
        assert horizon * squared < value / 2  # the cap is not at work
        kept = {"taylor": -value, "gradient_flow": squared}
        return kept.get(criterion, horizon * squared - value)

    step = 1e-4
    for index, group, unit in units_to_try(soft.layout)[::4]:
        places = list(models.slices(soft.unet, group, unit))
        ends = []
        for factor in (1 + step, 1 - step):
            saved = [parameters[name].detach()[where].clone() for name, _, where in places]
            with torch.no_grad():
                for (name, _, where), value in zip(places, saved, strict=True):
                    parameters[name][where] = factor * value
            ends.append(measured())
            with torch.no_grad():
                for (name, _, where), value in zip(places, saved, strict=True):
                    parameters[name][where] = value
        expected = (ends[0] - ends[1]) / (2 * step)
        tolerance = 1e-4 * scores.abs().max().item()
        assert scores[index].item() == pytest.approx(expected, abs=tolerance), group.name


def test_gradient_flow_is_the_change_of_the_gradients_norm_per_consumer_column():
    """For a head, whose mask acts in the columns of to_out alone."""
    soft, scheduler, data = softened()
    parameters, loss = parameters_of(soft), denoising_loss(soft, scheduler)
    gradient, _ = mean_gradient(loss, parameters, data)
    product = exact_hvp(loss, parameters, data, gradient)
    slopes = per_unit(
        {n: 2 * p.detach() * product[n] for n, p in parameters.items()}, soft.layout, ["in"]
    )
    step = 1e-4
    for index in inner_units(soft.layout).nonzero().flatten().tolist()[::6]:
        ends, kept = [], soft.mask[index].clone()
        # moving a head's mask scales its columns, but the gradient must be taken as if the
        # weights had moved: the columns themselves are scaled
        group, offset = next(
            (g, o)
            for g, o in zip(soft.layout.groups, soft.layout.offsets, strict=True)
            if o <= index < o + g.units
        )
        places = [p for p in models.slices(soft.unet, group, index - offset) if p[1] == "in"]
        for factor in (1 + step, 1 - step):
            with torch.no_grad():
                for name, _, where in places:
                    parameters[name][where] *= factor
            ends.append(norm(mean_gradient(loss, parameters, data)[0]) ** 2)
            with torch.no_grad():
                for name, _, where in places:
                    parameters[name][where] /= factor
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slopes[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-9)
        assert soft.mask[index] == kept


def summed(soft, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of values over the slices of every unit, as an explicit loop."""
    totals = []
    for group in soft.layout.groups:
        for unit in range(group.units):
            parts = [
                values[name][where].sum()
                for name, _, where in models.slices(soft.unet, group, unit)
            ]
            totals.append(torch.stack(parts).sum())
    return torch.stack(totals)


def test_magnitude_is_the_norm_of_a_units_slices():
    soft, scheduler, data = softened()
    squares = {name: p.detach().square() for name, p in parameters_of(soft).items()}
    expected = summed(soft, squares).sqrt()
    assert torch.allclose(score(soft, scheduler, data, "magnitude").double(), expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", ["taylor", "gradient_flow", "lookahead"])
def test_absolute_scores_sum_absolute_values_over_slices(criterion):
    soft, scheduler, data = softened()
    parameters, loss = parameters_of(soft), denoising_loss(soft, scheduler)
    gradient, _ = mean_gradient(loss, parameters, data)
    product = exact_hvp(loss, parameters, data, gradient)
    direction = {
        "taylor": gradient,
        "gradient_flow": product,
        "lookahead": {n: gradient[n] - 2 * 0.01 * product[n] for n in gradient},
    }[criterion]
    expected = summed(soft, {n: (p.detach() * direction[n]).abs() for n, p in parameters.items()})
    actual = score(soft, scheduler, data, criterion, hvp="exact", horizon=0.01)
    assert torch.allclose(actual.double(), expected, rtol=1e-5)
    finite = score(soft, scheduler, data, criterion, hvp="finite", horizon=0.01)
    assert torch.allclose(finite, actual, rtol=0.02)


@pytest.mark.parametrize("parts", [1, 2])
def test_fisher_is_the_root_mean_square_of_the_mask_gradients_of_minibatches(parts):
    soft, scheduler, data = softened()
    data = data + data[::-1]
    scores = fisher_scores(soft, scheduler, data, parts=parts)
    step, loss = 1e-5, denoising_loss(soft, scheduler)
    for index, group, _ in units_to_try(soft.layout)[::3]:
        kept, ends = soft.mask[index].clone(), []
        for sign in (1, -1):
            soft.mask[index] = kept + sign * step
            with torch.no_grad():
                ends.append(torch.stack([loss(batch) for batch in data]))
        soft.mask[index] = kept
        slopes = ((ends[0] - ends[1]) / (2 * step)).view(-1, parts).mean(1)
        expected = slopes.square().mean().sqrt().item()
        assert scores[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-9), group.name


def test_mean_gradient_is_the_gradient_of_the_mean_loss():
    soft, scheduler, data = softened()
    loss, parameters = denoising_loss(soft, scheduler), parameters_of(soft)
    gradient, value = mean_gradient(loss, parameters, data)
    mean = sum(loss(batch) for batch in data) / len(data)
    expected = torch.autograd.grad(mean, list(parameters.values()))
    assert value == pytest.approx(mean.item())
    for name, tensor in zip(parameters, expected, strict=True):
        assert torch.allclose(gradient[name], tensor, rtol=1e-8, atol=1e-14)


def test_the_order_of_batches_leaves_no_trace_in_a_mean_gradient():
    soft, _, _ = softened(double=False)
    parameters = parameters_of(soft)
    size = sum(p.numel() for p in parameters.values())
    # of very different sizes, so that float32 would round each order in another way
    slopes = [torch.randn(size) * 10.0**k for k in (-3, 2, 0, -1)]

    def loss(slope):
        return torch.cat([p.flatten() for p in parameters.values()]) @ slope

    found = [mean_gradient(loss, parameters, list(order))[0] for order in (slopes, slopes[::-1])]
    expected = (torch.stack(slopes).double().sum(0) / 4).float()
    for gradient in found:
        assert torch.equal(torch.cat([g.flatten() for g in gradient.values()]), expected)


def test_random_scores_depend_on_the_seed_alone():
    soft, scheduler, data = softened(double=False)
    first = score(soft, scheduler, data, "random", seed=3)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.normal_()
    torch.manual_seed(99)
    assert torch.equal(score(soft, scheduler, data[:1], "random", seed=3), first)
    assert not torch.equal(score(soft, scheduler, data, "random", seed=4), first)


def test_the_readme_says_what_each_criterion_is():
    readme = Path(method.__file__).with_name("README.md").read_text(encoding="utf8")
    for kind in (method.GradFlow, method.OneShot):
        for name in get_args(kind.model_fields["criterion"].annotation):
            # those of whole blocks stand in the text
            assert f"| `{name}`" in readme or f"`criterion: {name}`" in " ".join(readme.split())
    assert f"| `{method.GradFlow().criterion}` (default) |" in readme


def test_the_horizon_of_lookahead_is_capped():
    soft, scheduler, data = softened()
    loss, parameters = denoising_loss(soft, scheduler), parameters_of(soft)
    gradient, value = mean_gradient(loss, parameters, data)
    cap = 0.5 * value / norm(gradient) ** 2
    far, at_cap, near = (
        score(soft, scheduler, data, "lookahead", hvp="exact", horizon=h)
        for h in (1e9, cap, cap / 2)
    )
    assert torch.allclose(far, at_cap, rtol=1e-9)
    assert not torch.allclose(near, at_cap, rtol=1e-3)
    taylor = score(soft, scheduler, data, "taylor")
    assert torch.allclose(score(soft, scheduler, data, "lookahead", horizon=0.0), taylor)


def diff_pruning_oracle(soft, scheduler, data, times, chosen) -> torch.Tensor:
    parameters = parameters_of(soft)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for k in chosen:
        batch = data[k % len(data)]
        noisy = scheduler.add_noise(batch.images, batch.noise, torch.tensor([times[k]]))
        loss = (soft(noisy, torch.tensor([times[k]])) - batch.noise).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient
    return summed(soft, {n: (p.detach() * total[n]).abs() for n, p in parameters.items()})


def test_diff_pruning_takes_the_timesteps_above_its_threshold():
    soft, scheduler, data = softened()
    times = [0, 200, 400, 600, 800]
    losses = []
    for k, t in enumerate(times):
        batch = data[k % 2]
        at = Batch(batch.images, batch.noise, torch.full((4,), t))
        losses.append(denoising_loss(soft, scheduler)(at).item())
    relative = [loss / max(losses) for loss in losses]
    middle = sorted(relative)[-2] * 0.999
    assert middle > sorted(relative)[-3]
    largest = [losses.index(max(losses))]
    for threshold, chosen in (
        (0.0, range(5)),
        (middle, [k for k in range(5) if relative[k] > middle]),
        (0.9999, largest),
    ):
        actual = diff_pruning_scores(soft, scheduler, data, threshold=threshold, timesteps=5)
        expected = diff_pruning_oracle(soft, scheduler, data, times, chosen)
        assert torch.allclose(actual.double(), expected, rtol=1e-5)


def test_diff_pruning_takes_a_whole_minibatch_at_every_timestep():
    soft, scheduler, data = softened()
    halves = [
        Batch(batch.images[at], batch.noise[at], batch.timesteps[at])
        for batch in data
        for at in (slice(0, 2), slice(2, 4))
    ]
    whole, cut = (
        diff_pruning_scores(soft, scheduler, batches, threshold=0.05, timesteps=4, parts=parts)
        for batches, parts in ((data, 1), (halves, 2))
    )
    assert torch.allclose(whole, cut, rtol=1e-8)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "lookahead"] + ["diff_pruning"])
def test_normalised_scores_are_in_units_of_their_layers_mean(criterion):
    layout = models.layout("plain", (4, 8))
    raw = torch.randn(layout.units) * torch.linspace(0.1, 50, layout.units)
    normal = normalise(raw, layout, criterion)
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        part = slice(offset, offset + group.units)
        assert normal[part].abs().mean().item() == pytest.approx(1, rel=1e-5)
        assert spearman(normal[part], raw[part]) == pytest.approx(1)
    assert torch.equal(normal.sign(), raw.sign())


def test_lookahead_keeps_the_proportions_between_layers():
    layout = models.layout("plain", (4, 8))
    raw = torch.randn(layout.units) * torch.linspace(0.1, 50, layout.units)
    normal = normalise(raw, layout, "lookahead")
    assert normal.abs().mean().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(normal / raw, (normal / raw)[0].expand_as(raw))
    assert not normalise(torch.zeros(layout.units), layout, "taylor").any()


def test_an_unknown_criterion_is_an_error():
    soft, scheduler, data = softened()
    with pytest.raises(ValueError, match="one of gradient_flow, .*, random; got 'hessian'"):
        raw_scores(soft, scheduler, data, criterion="hessian")

"""Free inner widths: bought by score per MAC under one budget, legal, and meaning removal."""

import dataclasses
import itertools
import math
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from builders import models, pruning
from builders.events import leave
from builders.tiers import few
from compress.common.cost import unet_cost
from compress.common.events import drain
from compress.methods.gradflow import GradFlow, OneShot, surgery
from compress.methods.gradflow.allocation import REACH, Allocator, legal_step, plan, spend
from compress.methods.gradflow.layout import build_layout
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.train import PruningRun
from compress.methods.gradflow.unets import find_groups
from compress.methods.training import Training
from compress.models.free_width import FreeWidthUNet2DModel

pytestmark = pytest.mark.usefixtures("quick_runs")

# half the widths, with a little room: 27% of the MACs and a few points between the widths' steps
KEEP = 0.27
MODELS = {
    "plain": (16, 32),
    "one_head": (16, 32),
    "scale_shift": (16, 32),
    "odd_norm_groups": (24, 48),
}


@cache
def planned(name: str, widths=None, **knobs):
    """The dense model, its uniform layout and the allocator; none of them is ever modified."""
    changes = {} if name == "built_in" else {"block_out_channels": widths or MODELS[name]}
    unet = models.build(name, **changes)
    method = GradFlow(**({"keep_macs": KEEP, "allocation": "global"} | knobs))
    layout, allocator = plan(unet, find_groups(unet), method)
    return unet, layout, allocator


def scores(layout, seed: int = 0) -> torch.Tensor:
    """Scores whose size differs from layer to layer, so that widths come out unequal."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(layout.units, generator=generator)
    for group, offset in zip(layout.groups, layout.offsets, strict=True):
        found[offset : offset + group.units] *= 10 ** torch.rand(1, generator=generator)
    return found


# ---- buying ---------------------------------------------------------------------------------


def brute_force(gains, prices, budget):
    """The largest gain of all affordable choices, by trying each of them."""
    best = 0.0
    for counts in itertools.product(*[range(len(row) + 1) for row in gains]):
        if sum(c * p for c, p in zip(counts, prices, strict=True)) <= budget:
            best = max(best, sum(sum(r[:c]) for r, c in zip(gains, counts, strict=True)))
    return best


def market(seed: int, *, one_price: bool):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.rand(k, generator=generator).sort(descending=True).values for k in (3, 4, 2)]
    prices = torch.randint(1, 9, (3,), generator=generator).tolist()
    budget = float(torch.randint(1, 30, (1,), generator=generator))
    return [r.tolist() for r in rows], [3] * 3 if one_price else prices, budget


@pytest.mark.parametrize("seed", range(25))
def test_spending_equals_brute_force_at_one_price_and_lacks_less_than_a_step_at_many(seed):
    for one_price in (True, False):
        gains, prices, budget = market(seed, one_price=one_price)
        counts, left = spend(gains, prices, budget)
        bought = sum(sum(row[:c]) for row, c in zip(gains, counts, strict=True))
        spent = sum(c * p for c, p in zip(counts, prices, strict=True))
        assert left == budget - spent >= 0
        # nothing that is left over could still be bought
        unbought = [p for p, c, row in zip(prices, counts, gains, strict=True) if c < len(row)]
        assert all(p > left for p in unbought)
        best = brute_force(gains, prices, budget)
        if one_price:
            assert bought == pytest.approx(best)
        else:
            assert best - max(max(row) for row in gains) < bought <= best + 1e-12


def test_the_gain_counts_per_price():
    # the dear layer gains more by step and less by price
    gains, prices = [[3.0, 3.0], [2.0, 2.0, 2.0, 2.0]], [5.0, 1.0]
    assert spend(gains, prices, 5.0) == ([0, 4], 1.0)
    assert brute_force(gains, prices, 5.0) == 8.0
    assert spend(gains, prices, 9.0) == ([1, 4], 0.0)


@pytest.mark.parametrize("seed", range(25))
def test_raising_one_layers_gains_never_shrinks_it(seed):
    gains, prices, budget = market(seed, one_price=False)
    before, _ = spend(gains, prices, budget)
    for layer in range(3):
        for factor in (1.1, 2.0, 10.0):
            raised = [
                [g * factor for g in row] if k == layer else row for k, row in enumerate(gains)
            ]
            assert spend(raised, prices, budget)[0][layer] >= before[layer]
    # and enough of a rise buys all that the budget allows
    raised = [[g + 1e6 for g in gains[0]], *gains[1:]]
    assert spend(raised, prices, budget)[0][0] == min(len(gains[0]), budget // prices[0])


@pytest.mark.parametrize(
    ("width", "base", "step"),
    [
        (128, 4, 8),  # eights for tensor cores
        (32, 4, 8),
        (24, 4, 4),  # eights would leave three widths
        (16, 4, 4),
        (8, 2, 2),
        (128, 32, 32),  # what 32 norm groups force
        (48, 3, 12),  # a multiple of four of what three norm groups force
        (12, 3, 3),
        (8, 8, 8),  # no choice at all
        (20, 5, 5),
    ],
)
def test_steps_are_multiples_of_eight_where_the_layer_is_wide_enough(width, base, step):
    assert legal_step(width, base) == step


# ---- on models ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_free_widths_are_legal_and_keep_what_was_asked(name):
    unet, uniform, allocator = planned(name)
    total = unet_cost(unet).macs
    different = set()
    for seed in range(2):
        layout = allocator.layout(scores(uniform, seed))
        with torch.device("meta"):
            cost = unet_cost(surgery.slim_unet(unet, layout))
        assert KEEP - 0.03 <= cost.macs / total <= KEEP
        low, high = allocator.macs_range()
        assert low <= cost.macs <= high
        low, high = allocator.params_range()
        assert low <= cost.params <= high
        assert layout.widths == uniform.widths
        different.add(tuple(layout.inner.values()))
        for free in allocator.free:
            width = layout.inner[free.name]
            own = uniform.keep_counts[list(free.blocks)].sum().item() * free.unit
            dense = (free.units.stop - free.units.start) * free.unit
            assert width % free.step == 0 and width <= dense
            assert own / REACH <= width <= own * REACH
            # every norm group keeps the same number of channels, attention whole heads
            assert len(set(layout.keep_counts[list(free.blocks)].tolist())) == 1
        # blocks of the levels keep what they keep in the uniform allocation
        inner = {block for free in allocator.free for block in free.blocks}
        outer = [b for b in range(len(uniform.keep_counts)) if b not in inner]
        assert torch.equal(layout.keep_counts[outer], uniform.keep_counts[outer])
    assert len(different) == 2


def test_prices_equal_the_difference_that_one_step_makes_to_the_model():
    unet, _, allocator = planned("scale_shift")
    least = allocator.layout_of(allocator.least_keep_counts())

    def cost(inner):
        with torch.device("meta"):
            return unet_cost(surgery.slim_unet(unet, dataclasses.replace(least, inner=inner)))

    start = cost(least.inner)
    assert (start.macs, start.params) == (allocator.least_macs, allocator.least_params)
    for free in allocator.free:
        more = cost(least.inner | {free.name: least.inner[free.name] + free.step})
        assert more.macs - start.macs == free.macs * free.step
        assert more.params - start.params == free.params * free.step


def test_raising_one_layers_scores_never_shrinks_it():
    _, uniform, allocator = planned("plain")
    value = scores(uniform)
    before = allocator.layout(value).inner
    grown = 0
    for free in allocator.free:
        raised = value.clone()
        raised[free.units] *= 5
        after = allocator.layout(raised).inner
        assert after[free.name] >= before[free.name]
        grown += after[free.name] > before[free.name]
    assert grown > 0


def test_the_best_units_of_each_block_decide_what_a_width_is_worth():
    _, uniform, allocator = planned("plain")
    resnet = next(f for f in allocator.free if len(f.blocks) > 1 and f.most - f.least > 1)
    value = torch.full((uniform.units,), 1e-3)
    # a few units with large scores make a layer worth a small width, not a large one
    for block in resnet.blocks:
        unit = (uniform.block == block).nonzero()[: (resnet.least + 1) * resnet.units_per_step]
        value[unit] = 1.0
    assert allocator.layout(value).inner[resnet.name] >= (resnet.least + 1) * resnet.step
    assert allocator.layout(torch.ones_like(value)).inner != allocator.layout(value).inner


@pytest.mark.parametrize(
    ("name", "widths", "granularity"),
    [
        *[(name, None, "fine") for name in MODELS],
        ("no_attention", (16, 32), "fine"),
        pytest.param("no_middle", (16, 32), "fine", marks=pytest.mark.slow),
        pytest.param("not_square", (16, 32), "fine", marks=pytest.mark.slow),
        pytest.param("deeper", (16, 32, 48), "fine", marks=pytest.mark.slow),
        ("built_in", (24, 32, 64, 112), "coarse"),  # tiny nets have no steps left
    ],
)
def test_masked_equals_slim(name, widths, granularity):
    keep = 0.3 if name == "built_in" else KEEP
    unet, uniform, allocator = planned(name, widths, granularity=granularity, keep_macs=keep)
    layout = allocator.layout(scores(uniform))
    soft = SoftUNet(unet, uniform).eval()
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    slim = surgery.perform(soft.unet, layout, soft.mask).eval()
    assert isinstance(slim, FreeWidthUNet2DModel)
    assert dict(slim.config.inner_widths) == layout.inner
    # a class of its own has the dense sinusoid, whatever its first level
    assert slim.time_proj.num_channels == unet.config.block_out_channels[0] > layout.widths[0]
    assert slim.config.freq_shift == unet.config.freq_shift
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        masked, cut = soft(sample, timestep), slim(sample, timestep).sample
    assert cut.abs().mean() > 0.1
    assert (masked - cut).abs().max() < 1e-5


def test_keeping_everything_is_bit_identical():
    unet, uniform, allocator = planned("plain", keep_macs=1.0)
    layout = allocator.layout(scores(uniform))
    assert torch.equal(layout.keep_counts, layout.sizes())
    slim = surgery.perform(unet, layout, torch.ones(layout.units)).eval()
    assert list(slim.state_dict()) == list(unet.state_dict())
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        assert torch.equal(slim(sample, timestep).sample, unet(sample, timestep).sample)


# ---- what is refused ------------------------------------------------------------------------


def test_another_class_is_refused_by_name():
    unet = models.build("plain", block_out_channels=(16, 32))
    layout = build_layout(unet, find_groups(unet), (8, 16))
    other = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises(ValueError, match="UNet2DConditionModel; choose allocation 'uniform'"):
        Allocator(other, layout, KEEP)


def test_smallest_inner_widths_above_the_budget_are_refused():
    unet = models.build("no_attention")
    layout = build_layout(unet, find_groups(unet), (4, 8))
    with pytest.raises(ValueError, match=r"smallest inner widths must .*keep_macs=0\.1; "):
        Allocator(unet, layout, 0.1)


def test_hard_removal_is_refused_since_widths_may_grow_again():
    with pytest.raises(ValueError, match="'global' .* process 'hard'"):
        planned("plain", process="hard")
    # units of a transformer compete for a number of them that never rises
    GradFlow(keep_macs=KEEP, allocation="global", process="hard", granularity="unit")


# ---- in a run -------------------------------------------------------------------------------


def run_of(unet, method, folder=None, *, resume=False) -> PruningRun:
    training = Training(steps=2, batch=4, lr=1e-3, save_every=3)
    return pruning.start(method, training, unet, folder=folder, resume=resume)


def flow(**changes) -> GradFlow:
    knobs = {
        "keep_macs": KEEP,
        "allocation": "global",
        "steps": 10,
        "update_every": 1,
        "criterion_every": 1,
        "criterion_batches": 1,
        "max_move": 0.25,
        "settle": 0.2,
    }
    return GradFlow(**(knobs | changes))


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    """What runs begin from; they train copies."""
    return models.build("resnets", block_out_channels=(16, 32))


def ended(run: PruningRun):
    """The run, what it made, and the ranges of parameters and MACs that were predicted."""
    predicted = (
        run.mask_scheduler.allocator.params_range(),
        run.mask_scheduler.allocator.macs_range(),
    )
    return run, drain(run.events()), *predicted


@pytest.fixture(scope="module")
def whole(unet):
    return ended(run_of(unet, flow()))


def test_quotas_move_with_the_scores_and_rest_in_the_second_half(unet):
    run = run_of(unet, flow())
    # every estimate finds another layer important
    layers = itertools.cycle(
        [f.units for f in run.mask_scheduler.allocator.free if f.most > f.least]
    )

    def estimate(soft, **options):
        run.mask_scheduler.state.shared_scores[next(layers)] *= 100
        return real(soft, **options)

    real, run.mask_scheduler.estimate = run.mask_scheduler.estimate, estimate
    keep_counts, masks = [], []
    events = run.events()
    for _ in range(8):
        next(events)
        keep_counts.append(run.mask_scheduler.state.keep_counts.clone())
        masks.append(run._plain().mask.clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(keep_counts)]
    assert any(changed[:3]) and not any(changed[3:])
    # continuity holds although the keep counts jump
    for before, after in itertools.pairwise([torch.ones_like(masks[0]), *masks]):
        assert (after - before).abs().max() <= 0.25 + 1e-6
    pruned = drain(events)
    free = {f.name: f for f in run.mask_scheduler.allocator.free}
    assert len(pruned.widths) > 2
    for name, width in pruned.model.config.inner_widths.items():
        blocks = list(free[name].blocks)
        assert width == int(keep_counts[-1][blocks].sum()) * free[name].unit
    # with its masks the slim model is what the flow had at the end
    assert run.surgery_facts["max_difference"] < 1e-5


@pytest.mark.parametrize(
    ("steps", "granularity", "expected"),
    [(100, "fine", [0, 7, 14, 21, 28, 35, 42]), (20, "coarse", list(range(9)))],
)
def test_widths_are_chosen_at_each_twelfth_of_the_updates_of_the_first_half(
    unet, monkeypatch, steps, granularity, expected
):
    changes = {"max_move": None, "criterion_every": None, "settle": 0.1, "criterion": "random"}
    run = run_of(unet, flow(steps=steps, granularity=granularity, **changes))
    chosen, soft = [], run._plain()
    for step in range(run.method.binarised_at):
        monkeypatch.setattr(run.mask_scheduler, "allocate", lambda step=step: chosen.append(step))
        run.mask_scheduler.move(soft, step)
    assert chosen == expected


@pytest.mark.parametrize("kind", few(["soft", "one shot"], "soft"))
def test_a_run_makes_the_model_that_was_predicted(unet, whole, kind):
    shot = OneShot(
        keep_macs=KEEP, allocation="global", criterion="taylor", steps=2, criterion_batches=1
    )
    run, pruned, params, macs = whole if kind == "soft" else ended(run_of(unet, shot))
    assert isinstance(pruned.model, FreeWidthUNet2DModel)
    inner = {row["level"]: row["compressed"] for row in pruned.widths[2:]}
    assert inner == dict(pruned.model.config.inner_widths)
    cost = unet_cost(pruned.model)
    assert params[0] <= cost.params <= params[1] and macs[0] <= cost.macs <= macs[1]
    assert math.isfinite(sum(p.sum().item() for p in pruned.model.parameters()))
    assert run.surgery_facts["max_difference"] < 1e-5


# while keep counts move, after binarisation, after surgery
@pytest.mark.parametrize("stop", few([3, 9, 11], 3))
def test_a_resumed_run_has_the_same_widths_and_weights(unet, whole, tmp_path, stop):
    leave(run_of(unet, flow(), tmp_path).events(), stop)
    again = drain(run_of(unet, flow(), tmp_path, resume=True).events())
    expected = whole[1]
    assert again.widths == expected.widths
    for (name, one), other in zip(
        again.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name

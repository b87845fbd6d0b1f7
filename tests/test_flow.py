"""The mask's flow: projection against independent oracles, and the laws of every step."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr

from builders.tiers import few
from compress.methods.gradflow import GradFlow
from compress.methods.gradflow.flow import (
    binarise,
    block_sums,
    energy_gradient,
    flow_step,
    project,
    spearman,
    updates_fit,
)
from compress.methods.gradflow.schedule import removed_share, steepest_fall


def problem(seed: int, units: int = 40, blocks: int = 6):
    """A random feasible projection in float64, with some bounds of no width."""
    random = np.random.default_rng(seed)
    block = np.concatenate([np.arange(blocks), random.integers(0, blocks, units - blocks)])
    low = random.uniform(0, 0.5, units)
    high = low + random.uniform(0, 0.5, units) * (random.uniform(size=units) > 0.1)
    share = random.choice([0.0, 0.3, 0.8, 1.0], blocks)
    least = np.bincount(block, low, blocks)
    most = np.bincount(block, high, blocks)
    budget = least + share * (most - least)
    point = random.normal(0.4, 1.0, units)
    return [torch.from_numpy(a) for a in (point, low, high, budget, block)]


@pytest.mark.parametrize("seed", range(20))
def test_projection_satisfies_the_optimality_conditions(seed):
    point, low, high, budget, block = problem(seed)
    projected = project(point, low, high, budget, block)
    assert bool(((projected >= low) & (projected <= high)).all())
    assert torch.allclose(block_sums(projected, block, 6), budget, rtol=0, atol=1e-9)
    # Karush-Kuhn-Tucker: one multiplier per block; the move is below it only for units stopped
    # by their upper bound and above it only for units stopped by their lower bound
    move = projected - point
    for index in range(6):
        mine = block == index
        free = mine & (projected > low + 1e-9) & (projected < high - 1e-9)
        can_grow = mine & (projected < high - 1e-9)
        can_shrink = mine & (projected > low + 1e-9)
        if free.any():
            assert move[free].max() - move[free].min() < 1e-9
        if can_grow.any() and can_shrink.any():
            assert move[can_shrink].max() <= move[can_grow].min() + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_projection_equals_a_general_solver(seed):
    point, low, high, budget, block = problem(seed, units=10, blocks=2)
    solved = minimize(
        lambda m: ((m - point.numpy()) ** 2).sum(),
        x0=((low + high) / 2).numpy(),
        jac=lambda m: 2 * (m - point.numpy()),
        bounds=list(zip(low.tolist(), high.tolist(), strict=True)),
        constraints=[
            {"type": "eq", "fun": lambda m, b=b: m[(block == b).numpy()].sum() - budget[b].item()}
            for b in range(2)
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    projected = project(point, low, high, budget, block)
    assert np.allclose(projected.numpy(), solved.x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_projection_is_idempotent_and_keeps_the_type(seed):
    point, low, high, budget, block = problem(seed)
    once = project(point, low, high, budget, block)
    assert torch.allclose(project(once, low, high, budget, block), once, rtol=0, atol=1e-9)
    single = project(*(t.float() for t in (point, low, high, budget)), block)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), once, rtol=0, atol=1e-6)


def test_blocks_are_projected_independently():
    point, low, high, budget, block = problem(3)
    together = project(point, low, high, budget, block)
    for index in range(6):
        mine = block == index
        zeros = torch.zeros(int(mine.sum()), dtype=torch.long)
        alone = project(point[mine], low[mine], high[mine], budget[index : index + 1], zeros)
        assert torch.allclose(together[mine], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_an_infeasible_budget_is_an_error_that_names_the_block(shift):
    point, low, high, _, block = problem(0)
    edge = block_sums(low if shift < 0 else high, block, 6)
    budget = (block_sums(low, block, 6) + block_sums(high, block, 6)) / 2
    budget[4] = edge[4] + shift
    with pytest.raises(ValueError, match=f"block 4 must sum to {budget[4]:.4f}.*max_move"):
        project(point, low, high, budget, block)


def test_energy_gradient_is_the_energys():
    scores = torch.randn(30, dtype=torch.float64)
    mask = torch.rand(30, dtype=torch.float64, requires_grad=True)
    for gamma in (0.0, 0.7, 3.0):
        energy = -(scores * mask).sum() + gamma * (mask * (1 - mask)).sum()
        (expected,) = torch.autograd.grad(energy, mask)
        actual = energy_gradient(mask.detach(), scores, gamma)
        assert torch.allclose(actual, expected, rtol=0, atol=1e-14)


def flow(units: int = 64, blocks: int = 4, **changes):
    """Arguments of one flow step inside a half-spent budget."""
    torch.manual_seed(5)
    block = torch.arange(units) % blocks
    mask = project(
        torch.rand(units),
        torch.zeros(units),
        torch.ones(units),
        torch.full((blocks,), 0.7 * units / blocks),
        block,
    )
    settings = {"gamma": 0.5, "rate": 0.3, "max_move": 0.1, "block": block}
    settings["budget"] = torch.full((blocks,), 0.68 * units / blocks)
    return mask, torch.randn(units).exp(), settings | changes


@pytest.mark.parametrize("max_move", [0.03, 0.1, 1.0])
@pytest.mark.parametrize("rate", [0.01, 10.0])
def test_a_flow_step_obeys_all_its_bounds(max_move, rate):
    mask, scores, settings = flow(max_move=max_move, rate=rate)
    moved = flow_step(mask, scores, **settings)
    assert (moved - mask).abs().max() <= max_move + 1e-6
    assert 0 <= moved.min() and moved.max() <= 1
    sums = block_sums(moved, settings["block"], 4)
    assert torch.allclose(sums, settings["budget"], atol=1e-4)


def test_a_flow_step_favours_higher_scores():
    mask, scores, settings = flow(gamma=0.0)
    mask = torch.full_like(mask, 0.7)
    settings["budget"] = torch.full((4,), 0.68 * 16)
    moved = flow_step(mask, scores, **settings)
    for index in range(4):
        mine = settings["block"] == index
        order = scores[mine].argsort()
        assert bool((moved[mine][order].diff() >= -1e-6).all())
        assert moved[mine][order[-1]] > moved[mine][order[0]]


def test_gamma_drives_masks_apart():
    mask, _, settings = flow(gamma=2.0)
    settings["budget"] = block_sums(mask, settings["block"], 4)
    equal = torch.ones_like(mask)
    moved = flow_step(mask, equal, **settings)
    assert (moved * (1 - moved)).sum() < (mask * (1 - mask)).sum()


@pytest.mark.parametrize("schedule", few(["s_shaped", "cubic"], "s_shaped"))
def test_the_flow_reaches_its_target_within_a_bound_that_was_accepted(schedule):
    # 2 of 16 are kept: units that are out early cannot take part in later drops
    sizes, keep_counts, block = torch.tensor([16.0]), torch.tensor([2.0]), torch.zeros(16).long()
    accepted = 0
    for updates, derived in itertools.product([*range(1, 8), *range(8, 48, 8)], (True, False)):
        max_move = 0.1 if schedule == "s_shaped" else 0.25
        if derived:
            knobs = {"steps": updates, "update_every": 1, "settle": 0, "budget": schedule}
            max_move = GradFlow(**knobs).max_move
        try:
            updates_fit(updates, sizes, keep_counts, max_move, schedule)
        except ValueError:
            assert not derived
            continue
        accepted += 1
        mask, scores = torch.ones(16), torch.linspace(0, 2, 16)
        for update in range(updates):
            progress = (update + 1) / updates
            before = mask
            mask = flow_step(
                mask,
                scores,
                gamma=progress,
                rate=0.1,
                max_move=max_move,
                budget=sizes - removed_share(progress, schedule) * (sizes - keep_counts),
                block=block,
            )
            assert (mask - before).abs().max() <= max_move + 1e-6
        binary = binarise(mask, scores, block, keep_counts.long())
        assert binary.nonzero().flatten().tolist() == [14, 15]
        if updates > 30:  # with time to spare the budget is met
            assert mask.sum().item() == pytest.approx(2, abs=1e-3)
    assert accepted > 5


@pytest.mark.parametrize("schedule", ["s_shaped", "cubic"])
def test_removal_rises_from_nothing_to_all(schedule):
    shares = [removed_share(p / 100, schedule) for p in range(101)]
    assert shares[0] == 0 and shares[-1] == 1
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False))
    assert removed_share(-0.5, schedule) == 0 and removed_share(1.5, schedule) == 1


def test_s_shaped_is_symmetric_and_cubic_removes_most_first():
    for p in (0.0, 0.1, 0.25, 0.4, 0.5):
        assert removed_share(p, "s_shaped") + removed_share(1 - p, "s_shaped") == pytest.approx(1)
        assert removed_share(p, "cubic") >= removed_share(p, "s_shaped")
    assert removed_share(0.01, "s_shaped") < 0.001 < removed_share(0.01, "cubic")
    assert removed_share(0.5, "cubic") == 0.875


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match="'s_shaped' or 'cubic'; got 'linear'"):
        removed_share(0.5, "linear")


@pytest.mark.parametrize("seed", range(5))
def test_binarise_keeps_each_blocks_quota_of_the_highest(seed):
    torch.manual_seed(seed)
    block = torch.cat([torch.arange(5), torch.randint(0, 5, (45,))])
    sizes = torch.bincount(block)
    keep_counts = (sizes * torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0])).long()
    mask = torch.randperm(50) / 50.0  # all different
    binary = binarise(mask, torch.randn(50), block, keep_counts)
    assert set(binary.tolist()) <= {0.0, 1.0} and binary.dtype == mask.dtype
    assert torch.equal(block_sums(binary, block, 5).long(), keep_counts)
    for index in range(5):
        kept, gone = mask[(block == index) & (binary == 1)], mask[(block == index) & (binary == 0)]
        if len(kept) and len(gone):
            assert kept.min() > gone.max()


def test_scores_break_ties_of_the_mask():
    block, keep_counts = torch.zeros(6, dtype=torch.long), torch.tensor([3])
    scores = torch.tensor([0.1, 5.0, 0.3, 9.0, 0.2, 0.4])
    assert binarise(torch.ones(6), scores, block, keep_counts).tolist() == [0, 1, 0, 1, 0, 1]
    mask = torch.tensor([1.0, 0.5, 0.5, 0.5, 1.0, 0.0])  # the mask comes first
    assert binarise(mask, scores, block, keep_counts).tolist() == [1, 0, 0, 1, 1, 0]


def test_a_bound_too_small_for_the_schedule_is_an_error():
    sizes, keep_counts = torch.tensor([10.0, 10.0]), torch.tensor([8.0, 4.0])
    # steepest s-shaped drop of 10 updates: f(0.5) - f(0.4) = 0.148, times 0.6 removed
    with pytest.raises(ValueError, match=r"0\.0888 \(over 10 updates\); got max_move=0\.08"):
        updates_fit(10, sizes, keep_counts, 0.08, "s_shaped")
    updates_fit(10, sizes, keep_counts, 0.09, "s_shaped")
    with pytest.raises(ValueError, match=r"0\.1626"):  # cubic: 1 - 0.9 ** 3 = 0.271, times 0.6
        updates_fit(10, sizes, keep_counts, 0.1, "cubic")


def test_spearman_equals_scipys():
    torch.manual_seed(0)
    a = torch.randn(50)
    for b in (torch.randn(50), a.exp(), -a, a + torch.randn(50)):
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_spearman_shares_ranks_between_equal_scores():
    a = torch.tensor([1.0, 1.0, 2.0, 3.0, 3.0, 3.0])
    b = torch.tensor([4.0, 2.0, 2.0, 5.0, 1.0, 1.0])
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0)))


@pytest.mark.parametrize("schedule", ["s_shaped", "cubic"])
def test_the_steepest_fall_is_the_largest_of_all(schedule):
    for updates in (1, 2, 3, 4, 7, 54):
        shares = [removed_share(k / updates, schedule) for k in range(updates + 1)]
        largest = max(b - a for a, b in itertools.pairwise(shares))
        assert steepest_fall(updates, schedule) == pytest.approx(largest, rel=1e-12)


def test_update_every_and_max_move_follow_the_steps_unless_they_are_set():
    assert GradFlow().max_move == GradFlow(steps=100).max_move == 0.1
    assert [GradFlow(steps=n).update_every for n in (5, 199, 300, 10_000)] == [1, 1, 3, 100]
    four = {"steps": 20, "update_every": 5}
    assert GradFlow(**four).max_move == 0.34375  # 4 updates: f(0.5) - f(0.25)
    assert GradFlow(steps=1).max_move == 1
    assert GradFlow(**four, budget="cubic", max_move=None).max_move == 0.578125
    assert GradFlow(steps=20, max_move=0.2).max_move == 0.2
    # nine estimates of the scores, or as many as there are updates
    assert [GradFlow(steps=n).criterion_every for n in (5, 100, 199)] == [1, 10, 20]
    assert GradFlow(steps=100, update_every=10).criterion_every == 1
    with pytest.raises(ValueError, match="^GradFlow: steps: Input .*; got 'many'; correct it$"):
        GradFlow(steps="many")

"""RTPrune's selection, newlines, optimal transport and merging, each against its definition."""

import pytest
import torch

from compress.methods.rtprune.baselines import divprune
from compress.methods.rtprune.selection import by_norm, drop_adjacent_newlines
from compress.methods.rtprune.transport import (
    merge,
    nearest_plan,
    similarity,
    transport_plans,
)


def transport_plan(scores, **options):
    """The plans of pages of one size, ``(..., kept, pruned)``."""
    pages = scores.reshape(-1, *scores.shape[-2:])
    return transport_plans(pages, **options).reshape(scores.shape)


def select(features, keep):
    """The tokens that stay, in their order."""
    return by_norm(features)[..., :keep].sort(dim=-1).values


def superglue(scores, dustbin=0.2, iterations=100):
    """SuperGlue's iteration: the rows first, float64."""
    m, n = scores.shape
    z = torch.full((m + 1, n + 1), dustbin, dtype=torch.double)
    z[:m, :n] = scores
    a, b = torch.ones(m + 1).double(), torch.ones(n + 1).double()
    a[m], b[n] = n, m
    a, b = (a / (m + n)).log(), (b / (m + n)).log()
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(iterations):
        u = a - (z + v).logsumexp(1)
        v = b - (z + u[:, None]).logsumexp(0)
    return (z + u[:, None] + v).exp()[:m, :n] * (m + n)


# ---- selection ---------------------------------------------------------------------------------


def test_the_largest_norms_stay_in_their_order():
    features = torch.randn(3, 11, 4)
    for page, kept in zip(features, select(features, 6), strict=True):
        norms = [sum(x * x for x in token) for token in page.tolist()]
        expected = sorted(range(11), key=lambda i: -norms[i])[:6]
        assert kept.tolist() == sorted(expected)


def test_of_equal_norms_the_first_stay_in_a_batch_as_alone():
    features = torch.ones(2, 300, 4)
    features[:, 200] = 2.0
    expected = [*range(49), 200]
    assert select(features, 50).tolist() == [expected, expected]
    assert select(features[0], 50).tolist() == expected


def test_norms_of_halves_are_taken_in_float32():
    features = torch.full((1, 3, 64), 100.0).half()  # the squares overflow
    features[0, 2] = 200.0
    assert select(features, 1).tolist() == [[2]]


@pytest.mark.parametrize("keep", [0, 4])
def test_more_tokens_than_there_are_cannot_be_kept(keep):
    with pytest.raises(ValueError, match=f"1 to 3 tokens.*keep={keep}"):
        divprune(torch.zeros(3, 4), keep)


def test_tokens_and_newlines_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., tokens, dim\) are expected; got \(4,\)"):
        by_norm(torch.zeros(4))
    with pytest.raises(
        ValueError, match=r"of one page are expected, \(kept,\); got shape \(2, 3\)"
    ):
        drop_adjacent_newlines(torch.zeros(2, 3), torch.zeros(1))


# ---- newlines ----------------------------------------------------------------------------------


def _without_adjacent(indices, newlines):
    left, after_newline = [], False
    for index in indices:
        if index in newlines and after_newline:
            continue
        left.append(index)
        after_newline = index in newlines
    return left


def test_of_neighbouring_newlines_the_first_stays():
    newlines = torch.tensor([2, 5, 8, 11])
    indices = torch.tensor([0, 2, 5, 8, 9, 11, 12])  # two emptied rows
    assert drop_adjacent_newlines(indices, newlines).tolist() == [0, 2, 9, 11, 12]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        indices = (torch.rand(12, generator=generator) < 0.6).nonzero()[:, 0]
        expected = _without_adjacent(indices.tolist(), newlines.tolist())
        assert drop_adjacent_newlines(indices, newlines).tolist() == expected


def test_without_newlines_all_stay():
    indices = torch.tensor([1, 2, 7])
    assert torch.equal(drop_adjacent_newlines(indices, indices[:0]), indices)
    assert drop_adjacent_newlines(indices[:0], torch.tensor([3])).tolist() == []


# ---- transport ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (2, 9), (30, 11)])
def test_the_plan_is_superglue_s(shape):
    scores = torch.rand(shape) * 2 - 1
    torch.testing.assert_close(
        transport_plan(scores).double(), superglue(scores.double()), rtol=1e-4, atol=0
    )
    other = transport_plan(scores, dustbin=1.0, iterations=7).double()
    # POT begins with the columns: what is alike before it converges is close only
    torch.testing.assert_close(other, superglue(scores.double(), 1.0, 50), rtol=0.05, atol=1e-3)


def test_nothing_is_moved_twice_and_a_full_dustbin_moves_nothing():
    scores = torch.rand(6, 4) * 2 - 1
    plan = transport_plan(scores)
    assert (plan > 0).all() and (plan.sum(0) < 1).all() and (plan.sum(1) < 1).all()
    assert transport_plan(scores, dustbin=30.0).max() < 1e-9
    # the more alike, the more is moved
    assert (
        transport_plan(scores.index_fill(1, torch.tensor(2), 0.99))[:, 2].sum() > plan[:, 2].sum()
    )


def test_a_batch_is_one_by_one_and_keeps_its_dtype():
    scores = torch.rand(2, 3, 4, 5)
    plans = transport_plan(scores)
    halves = torch.rand(2, 6).bfloat16()
    for scores_of, plan in zip(scores.flatten(0, 1), plans.flatten(0, 1), strict=True):
        assert torch.equal(transport_plan(scores_of), plan)
    assert transport_plan(halves).dtype == halves.dtype
    ragged = torch.full((2, 4, 6), torch.nan)  # padding is not read, and nothing is moved to it
    ragged[0, :, :3], ragged[1, :2] = scores[0, 0, :, :3], halves.float()
    plans = transport_plans(ragged, [4, 2], [3, 6])
    assert torch.equal(plans[0, :, :3], transport_plan(ragged[0, :, :3]))
    assert torch.equal(plans[1, :2], transport_plan(ragged[1, :2]))
    assert plans[0, :, 3:].eq(0).all() and plans[1, 2:].eq(0).all()


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_the_cpu():
    scores, sizes = torch.rand(2, 340, 900) * 2 - 1, ([340, 57], [60, 900])
    plans = transport_plans(scores.cuda(), *sizes)
    torch.testing.assert_close(plans.cpu(), transport_plans(scores, *sizes), rtol=1e-4, atol=0)


# ---- merging -----------------------------------------------------------------------------------


def test_merging_adds_what_the_plan_moves():
    kept, pruned, plan = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 3, 5)
    expected = kept + 0.3 * torch.einsum("bmp,bpd->bmd", plan, pruned)
    torch.testing.assert_close(merge(kept, pruned, plan, 0.3), expected)
    assert torch.equal(merge(kept, pruned, plan, 0.0), kept)
    halves = merge(kept.half(), pruned.half(), plan)
    assert halves.dtype == torch.float16
    assert torch.equal(halves, merge(kept.half().float(), pruned.half().float(), plan).half())


def test_the_nearest_plan_moves_each_token_to_the_most_similar():
    kept, pruned = torch.randn(4, 8), torch.randn(6, 8)
    scores = similarity(kept, pruned)
    torch.testing.assert_close(scores, torch.cosine_similarity(kept[:, None], pruned[None], dim=-1))
    plan = nearest_plan(scores)
    assert torch.equal(plan.sum(0), torch.ones(6))
    assert torch.equal(plan.argmax(0), scores.argmax(0))

"""Summaries that choose, against loops over single heads and exact cases."""

import pytest
import torch

from compress.kernels.choice import choose_rows_reference
from compress.methods.fastocr.choosing import Index, SummaryPolicy, group_count, kmeans, runs
from compress.methods.fastocr.state import Counts, DecodeState
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.visual import VisualLayout

HEADS, KV_HEADS, DIM, SCALING = 6, 2, 8, 0.4
COUNTS, LENGTH, WRITTEN = [20, 7, 0], 26, 3  # visual tokens, of a prompt, of an answer


def _draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _tokens(counts=COUNTS, min_visual=0):
    """Visual tokens that begin at row 4, every second one while there is room."""
    layouts = []
    for count in counts:
        positions = torch.tensor(sorted([*range(4, LENGTH, 2), *range(5, LENGTH, 2)][:count]))
        grid = torch.zeros(count, 3, dtype=torch.long)
        layouts.append(VisualLayout(positions.long(), grid, grid[:, 0]))
    return VisualTokens.of(layouts, LENGTH, torch.device("cpu"), min_visual)


def _cache(seed=1):
    query = _draw(len(COUNTS), HEADS, 1, DIM, seed=seed)
    size = len(COUNTS), KV_HEADS, LENGTH + WRITTEN, DIM
    return query, _draw(*size, seed=seed + 1), _draw(*size, seed=seed + 2)


def _step(policy, mask=None, seed=1):
    counts = Counts(1)
    state = DecodeState(policy.tokens, policy, counts)
    for _ in range(WRITTEN):
        state.start_step()
    return state.attend(0, *_cache(seed), mask, SCALING), counts


def _oracle(policy, mask):
    """Sorted groups, opened token by token, and attention in float64."""
    query, key, value = (part.double() for part in _cache())
    index, output = policy.indexes[0], torch.zeros(query.shape, dtype=torch.float64)
    opened = []
    for b, layout in enumerate(policy.tokens.layouts):
        visual = layout.positions.tolist()
        for kv in range(KV_HEADS):
            groups, own = [], index.order[b, kv].tolist()
            for size, first in zip(index.sizes[b, kv], index.first[b, kv], strict=True):
                groups.append(own[int(first) : int(first + size)])
            assert sorted(sum(groups, [])) == visual
            members = query[b].view(KV_HEADS, -1, DIM)[kv]
            means = [key[b, kv, rows].mean(0) if rows else None for rows in groups]
            scores = [
                -torch.inf if mean is None else (members @ mean * SCALING).exp().sum().item()
                for mean in means
            ]
            order = sorted(range(len(groups)), key=lambda g: -scores[g])
            best = sum((groups[g] for g in order), [])[: policy.kept[b]]
            opened.append(best)
            for head, one in enumerate(members):
                rows = [row for row in range(LENGTH + WRITTEN) if row not in visual or row in best]
                rows = [row for row in rows if mask is None or mask[b, 0, 0, row]]
                logits, values = [key[b, kv, rows] @ one * SCALING], [value[b, kv, rows]]
                for mean, group in zip(means, groups, strict=True):
                    left = [row for row in group if row not in best]
                    if left:
                        logits.append((one @ mean * SCALING)[None] + torch.tensor(len(left)).log())
                        values.append(value[b, kv, group].mean(0)[None])
                weights = torch.cat(logits).softmax(0)
                output[b, kv * len(members) + head, 0] = weights @ torch.cat(values)
    return output, opened


@pytest.mark.parametrize("masked", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("grouping", ["kmeans", "runs"])
@pytest.mark.parametrize("keep, groups", [(0.05, "auto"), (0.3, 4), (0.7, 6), (0.9, 1)])
def test_a_layer_reads_the_best_groups_and_the_means_of_the_rest(keep, groups, grouping, masked):
    mask = None
    if masked:
        mask = torch.ones(len(COUNTS), 1, 1, LENGTH + WRITTEN, dtype=torch.bool)
        mask[1, ..., :2] = mask[2, ..., :9] = False
    policy = SummaryPolicy(_tokens(), keep=keep, groups=groups, grouping=grouping)
    result, counts = _step(policy, mask)
    expected, opened = _oracle(policy, mask)
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)
    assert [len(rows) for rows in opened] == [kept for kept in policy.kept for _ in range(KV_HEADS)]
    used = (policy.indexes[0].sizes > 0).sum(2).amax(1).sum()
    assert counts.facts()["attended"] == (sum(policy.kept) + used) / sum(COUNTS) / WRITTEN
    assert grouping == "kmeans" or used == sum(group_count(groups, count) for count in COUNTS)


def test_the_index_is_built_once():
    policy = SummaryPolicy(_tokens(), keep=0.2)
    _step(policy)
    index = policy.indexes[0]
    _step(policy, seed=7)  # another query and cache
    assert policy.indexes == {0: index}


def test_nothing_is_chosen_where_all_would_be_opened():
    for keep, least, off in ((1.0, 0, True), (0.9, 0, False), (0.1, 21, True), (0.1, 8, False)):
        policy = SummaryPolicy(_tokens(min_visual=least), keep=keep)
        assert DecodeState(policy.tokens, policy, Counts(1)).off is off


def test_runs_are_neighbours_in_reading_order():
    tokens = _tokens([7, 20, 0])
    member = runs(tokens, torch.tensor([[3], [20], [0]]))
    assert member[0, :7].tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert member[1].tolist() == list(range(20))


def _grouped(keys, values, groups, valid=None):
    """Groups of k-means that begins with runs, ``(visual,)``, of the first head."""
    keys, values = (part.float().view(1, 1, *part.shape) for part in (keys, values))
    start = (torch.arange(keys.shape[2]) * groups // keys.shape[2]).view(1, 1, -1)
    valid = torch.ones(1, keys.shape[2], dtype=torch.bool) if valid is None else valid
    return kmeans(keys, values, valid, start, groups)[0, 0]


@pytest.mark.parametrize("part", ["keys", "values"])
def test_alike_tokens_are_in_one_group_at_any_scale(part):
    kinds = torch.tensor([0, 0, 0, 1, 0, 1, 1, 1, 0, 1])
    apart = 1e-3 * (2.0 * kinds[:, None] - 1).expand(10, DIM)
    same = torch.full((10, DIM), 7.0)
    member = _grouped(*((apart, same) if part == "keys" else (same, apart)), 2)
    assert torch.equal(member[:, None] == member, kinds[:, None] == kinds)


def test_a_mean_is_nearer_to_its_tokens_than_that_of_a_run():
    tokens = _tokens([22])
    keys, values = (_draw(1, KV_HEADS, 22, DIM, seed=seed) for seed in (1, 2))
    keys = keys + 3 * _draw(5, DIM)[torch.arange(22) % 5]
    spread = {}
    for grouping in ("kmeans", "runs"):
        index = Index.of(keys, values, tokens, torch.tensor([[5]]), 5, grouping, 0)
        member = torch.repeat_interleave(index.sizes[0, 0])
        own = keys[0, 0, index.order[0, 0] - 4]
        spread[grouping] = (own - index.keys[0, 0, member]).square().mean()
    assert spread["kmeans"] < 0.8 * spread["runs"]


def test_groups_of_a_page_do_not_depend_on_its_batch():
    keys, values = (_draw(3, KV_HEADS, 20, DIM, seed=seed) for seed in (1, 2))

    def index(counts, rows):
        policy = SummaryPolicy(_tokens(counts), keep=0.2)
        size = max(counts)
        return Index.of(
            keys[rows, :, :size],
            values[rows, :, :size],
            policy.tokens,
            policy.counts,
            policy.most,
            "kmeans",
            0,
        )

    together, alone = index([20, 7, 0], [0, 1, 2]), index([7], [1])
    assert torch.equal(together.order[1, :, :7], alone.order[0])
    assert torch.equal(together.keys[1, :, :3], alone.keys[0])
    assert not together.sizes[1, :, 3:].any() and not together.sizes[2].any()


def test_equal_scores_open_the_first_group():
    sizes = torch.tensor([[[2, 0, 3]]], dtype=torch.int32)
    rows, left = choose_rows_reference(
        torch.zeros(1, 2, 1, 4),
        torch.zeros(1, 1, 3, 4),
        sizes,
        (sizes.cumsum(2) - sizes).int(),
        torch.tensor([[[5, 9, 6, 7, 8]]], dtype=torch.int32),
        torch.tensor([3], dtype=torch.int32),
        3,
        1.0,
    )
    assert rows.tolist() == [[[5, 9, 6]]] and left.exp().tolist() == [[[0, 0, 2]]]

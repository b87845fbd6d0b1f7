"""Summaries of what lies outside the fixation, against loops and exact cases."""

import pytest
import torch

from compress.methods.fastocr.attention import peripheral_decode, sparse_decode
from compress.methods.fastocr.fixation import Fixation
from compress.methods.fastocr.periphery import Periphery, cluster

BATCH, HEADS, KV_HEADS, TEXT, VISUAL, DIM = 3, 6, 2, 5, 17, 8


def _draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _case(valid=None):
    """A cache whose last rows are visual, and a fixation of 4, 2 and 0 of them."""
    length = TEXT + VISUAL
    query = _draw(BATCH, HEADS, 1, DIM, seed=1)
    key, value = (_draw(BATCH, KV_HEADS, length, DIM, seed=s) for s in (2, 3))
    index = torch.tensor([[3, 9, 0, 16], [5, 1, 0, 0], [0, 0, 0, 0]])
    chosen = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    valid = torch.ones(BATCH, VISUAL, dtype=torch.bool) if valid is None else valid
    return query, key, value, Fixation(index, chosen), valid


def _read(key, value, fixation, valid, summaries):
    rows = torch.cat([TEXT + fixation.index, torch.arange(TEXT).expand(BATCH, -1)], 1)
    mask = torch.cat([fixation.valid, torch.ones(BATCH, TEXT, dtype=torch.bool)], 1)
    around = Periphery.of(key[:, :, TEXT:], value[:, :, TEXT:], valid, summaries)
    return rows, mask, around


def _decode(query, key, value, rows, mask, around, fixation):
    """The last text tokens are read as a range."""
    listed = rows.shape[1] - 2
    dense_mask = mask[:, listed:]
    return peripheral_decode(
        query,
        key,
        value,
        rows[:, :listed],
        mask[:, :listed],
        (TEXT - 2, TEXT),
        dense_mask,
        0.4,
        around,
        fixation,
    )


def _oracle(query, key, value, fixation, valid, member, scaling):
    """Every token outside the fixation replaced by the mean of those of its group that are."""
    output = torch.zeros(BATCH, HEADS, 1, DIM, dtype=torch.float64)
    read = 0
    for b in range(BATCH):
        inside = set(fixation.index[b][fixation.valid[b]].tolist())
        outside = [t for t in range(VISUAL) if t not in inside and valid[b, t]]
        most = 0
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            groups = {}
            for t in outside:
                groups.setdefault(int(member[b, kv, t]), []).append(t)
            most = max(most, len(groups))
            keys = [key[b, kv, p].double() for p in [*range(TEXT), *(TEXT + t for t in inside)]]
            values = [value[b, kv, p].double() for p in [*range(TEXT), *(TEXT + t for t in inside)]]
            for t in outside:
                alike_ = [TEXT + other for other in groups[int(member[b, kv, t])]]
                keys.append(key[b, kv, alike_].double().mean(0))
                values.append(value[b, kv, alike_].double().mean(0))
            weights = (torch.stack(keys) @ query[b, h, 0].double() * scaling).softmax(0)
            output[b, h, 0] = weights @ torch.stack(values)
        read += most
    return output, read


@pytest.mark.parametrize("added", [False, True], ids=["bool", "added"])
@pytest.mark.parametrize("summaries", [1, 4, VISUAL + 3])
def test_it_is_attention_with_the_means_in_place_of_what_is_outside(summaries, added):
    valid = torch.ones(BATCH, VISUAL, dtype=torch.bool)
    valid[1, 12:] = False  # a page with fewer tokens
    query, key, value, fixation, valid = _case(valid)
    rows, mask, around = _read(key, value, fixation, valid, summaries)
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if added else mask
    result, read = _decode(query, key, value, rows, given, around, fixation)
    expected, summed = _oracle(query, key, value, fixation, valid, around.member, 0.4)
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)
    assert int(read) == summed


def test_copies_are_summarised_without_loss():
    query, key, value, fixation, valid = _case()
    kinds = torch.arange(VISUAL) % 5
    for part in (key, value):
        part[:, :, TEXT:] = part[:, :, TEXT : TEXT + 5][:, :, kinds]
    rows, mask, around = _read(key, value, fixation, valid, 5)
    result, read = _decode(query, key, value, rows, mask, around, fixation)
    everything = torch.arange(TEXT + VISUAL).expand(BATCH, -1)
    dense = sparse_decode(query, key, value, everything, None, (0, 0), None, 0.4)
    torch.testing.assert_close(result, dense, atol=2e-6, rtol=0)
    assert int(read) == 5 * BATCH


def test_with_everything_in_the_fixation_nothing_is_summarised():
    query, key, value, _, valid = _case()
    fixation = Fixation(torch.arange(VISUAL).expand(BATCH, -1), valid)
    rows, mask, around = _read(key, value, fixation, valid, 4)
    result, read = _decode(query, key, value, rows, mask, around, fixation)
    dense = sparse_decode(query, key, value, rows, mask, (0, 0), None, 0.4)
    torch.testing.assert_close(result, dense, atol=1e-6, rtol=0)
    assert int(read) == 0


def test_distant_tokens_are_in_different_groups():
    centres = 20 * torch.eye(4, DIM)
    kinds = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 0, 2])
    keys = (centres[kinds] + 0.1 * _draw(10, DIM)).view(1, 1, 10, DIM)
    member = cluster(keys, keys.clone(), torch.ones(1, 10, dtype=torch.bool), 4)[0, 0]
    same = member[:, None] == member
    assert torch.equal(same, kinds[:, None] == kinds)


@pytest.mark.parametrize("small", ["keys", "values"])
def test_keys_and_values_count_alike_at_any_scale(small):
    """The part that has two clusters decides, also where it is a millionth of the other."""
    clusters = torch.arange(12) % 2
    apart = (2.0 * clusters[:, None] - 1).expand(12, DIM) * 1e-3
    even = 1e3 * _draw(12, DIM)
    keys, values = (apart, even) if small == "keys" else (even, apart)
    valid = torch.ones(1, 12, dtype=torch.bool)
    member = cluster(keys[None, None], values[None, None], valid, 2)[0, 0]
    assert torch.equal(member[:, None] == member, clusters[:, None] == clusters)


def test_the_groups_of_a_page_do_not_depend_on_its_batch():
    keys, values = (_draw(BATCH, KV_HEADS, VISUAL, DIM, seed=s) for s in (2, 3))
    valid = torch.ones(BATCH, VISUAL, dtype=torch.bool)
    valid[0, 9:] = False
    together = cluster(keys, values, valid, 4)
    keys[0, :, 9:] = 1e3  # padding is not looked at
    alone = cluster(keys[:1, :, :], values[:1], valid[:1], 4)
    assert torch.equal(together[0, :, :9], alone[0, :, :9])
    short = cluster(keys[:1, :, :9], values[:1, :, :9], valid[:1, :9], 4)
    assert torch.equal(together[0, :, :9], short[0])


def test_without_visual_tokens_there_are_no_summaries():
    query, key, value, _, _ = _case()
    valid = torch.zeros(BATCH, VISUAL, dtype=torch.bool)
    fixation = Fixation(torch.zeros(BATCH, 1, dtype=torch.long), valid[:, :1])
    rows, mask, around = _read(key, value, fixation, valid, 4)
    result, read = _decode(query, key, value, rows, mask, around, fixation)
    plain = sparse_decode(query, key, value, rows, mask, (0, 0), None, 0.4)
    torch.testing.assert_close(result, plain)
    assert int(read) == 0

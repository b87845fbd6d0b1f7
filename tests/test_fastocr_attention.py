"""The two functions of a decode step in plain torch, against loops over heads and positions."""

import pytest
import torch

from compress.methods.fastocr.attention import focal_decode, sparse_decode

SHAPES = [(1, 4, 4, 7, 8), (3, 6, 2, 11, 16), (2, 4, 1, 33, 8)]  # batch, heads, kv, length, dim


def _case(shape, dtype=torch.float32):
    batch, heads, kv_heads, length, dim = shape
    generator = torch.Generator().manual_seed(length)

    def draw(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    query = draw(batch, heads, 1, dim)
    return query, draw(batch, kv_heads, length, dim), draw(batch, kv_heads, length, dim)


def _plain(query, key, value, seen, scaling):
    """Softmax over the positions in ``seen[b]``, one head and sequence at a time, in float64."""
    batch, heads = query.shape[:2]
    group = heads // key.shape[1]
    output = torch.zeros(batch, heads, 1, value.shape[-1], dtype=torch.float64)
    weights = torch.zeros(batch, heads, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            logits = torch.full((key.shape[2],), -torch.inf, dtype=torch.float64)
            for position in seen[b]:
                dot = query[b, h, 0].double() @ key[b, h // group, position].double()
                logits[position] = scaling * dot
            weights[b, h] = logits.softmax(0)
            output[b, h, 0] = weights[b, h] @ value[b, h // group].double()
    return output, weights.mean(1)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_decode_is_attention_with_minus_infinity_elsewhere(shape, dtype, atol):
    query, key, value = _case(shape, dtype)
    batch, length = shape[0], shape[3]
    generator = torch.Generator().manual_seed(1)
    rows = torch.stack([torch.randperm(length, generator=generator)[:5] for _ in range(batch)])
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[:, 3] = False
    result = sparse_decode(query, key, value, rows, mask, (0, 0), None, 0.3)
    seen = [row[keep].tolist() for row, keep in zip(rows, mask, strict=True)]
    expected, _ = _plain(query, key, value, seen, 0.3)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)
    added = torch.zeros(rows.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(
        sparse_decode(query, key, value, rows, added, (0, 0), added[:, :0], 0.3), result
    )
    everything, _ = _plain(query, key, value, rows.tolist(), 0.3)
    result = sparse_decode(query, key, value, rows, None, (0, 0), None, 0.3)
    torch.testing.assert_close(result.double(), everything, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_is_read_as_its_rows_would_be(shape):
    query, key, value = _case(shape)
    rows = torch.tensor([[4, 0]]).expand(shape[0], -1)
    listed = torch.cat([rows, torch.tensor([[2, 3]]).expand(shape[0], -1)], 1)
    for mask in (None, torch.arange(4 * shape[0]).view(-1, 4) % 3 > 0):
        left, right = (None, None) if mask is None else (mask[:, :2], mask[:, 2:])
        for masks in [(left, right), (left, None), (None, right)]:
            result = sparse_decode(query, key, value, rows, masks[0], (2, 4), masks[1], 0.3)
            parts = [
                torch.ones(shape[0], 2, dtype=torch.bool) if part is None else part
                for part in masks
            ]
            whole = torch.cat(parts, 1)
            expected = sparse_decode(query, key, value, listed, whole, (0, 0), None, 0.3)
            torch.testing.assert_close(result, expected)


def test_sparse_decode_reads_a_cache_that_is_a_view():
    query, key, value = _case(SHAPES[1])
    wide = torch.cat([key, key + 1], 2)[:, :, ::2], torch.cat([value, value], 2)[:, :, ::2]
    rows = torch.tensor([[4, 0], [1, 2], [3, 3]])
    result = sparse_decode(query, *wide, rows, None, (9, 11), None, 0.5)
    packed = [part.contiguous() for part in wide]
    expected = sparse_decode(query, *packed, rows, None, (9, 11), None, 0.5)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", ["none", "bool", "added"])
def test_focal_decode_is_dense_and_gives_the_mean_over_heads(shape, dtype, atol, masked):
    query, key, value = _case(shape, dtype)
    seen, mask = [range(shape[3])] * shape[0], None
    if masked != "none":  # as padding on the left
        mask = torch.ones(shape[0], 1, 1, shape[3], dtype=torch.bool)
        mask[0, ..., :2] = False
        seen = [range(2, shape[3]), *seen[1:]]
    if masked == "added":
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    result, lies = focal_decode(query, key, value, mask, 0.3)
    expected, weights = _plain(query, key, value, seen, 0.3)
    assert (result.dtype, lies.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(result.double(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(lies.double(), weights, atol=atol, rtol=0)
    torch.testing.assert_close(lies.sum(1), torch.ones(shape[0]))

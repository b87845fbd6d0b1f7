"""The peers of RTPrune, against what their papers define."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from compress.methods.rtprune.baselines import cdpruner, divprune, random_tokens, visionzip


def test_random_tokens_depend_on_the_seed_only():
    features = torch.randn(20, 4)
    chosen = random_tokens(features, 9, 5)
    assert torch.equal(chosen, random_tokens(features * 2, 9, 5))
    assert chosen.tolist() != random_tokens(features, 9, 6).tolist()
    assert all(a < b for a, b in pairwise(chosen.tolist()))
    often = torch.stack([random_tokens(features, 9, s) for s in range(400)]).flatten().bincount()
    assert often.min() > 120  # of 180 each, standard deviation 10


def test_divprune_selects_the_farthest_token():
    features = torch.randn(14, 5)
    distance = 1 - torch.cosine_similarity(features[:, None], features[None], dim=-1)
    others = [[distance[i, j] for j in range(14) if j != i] for i in range(14)]
    chosen = [max(range(14), key=lambda i: min(others[i]))]
    while len(chosen) < 8:
        left = [i for i in range(14) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(distance[i, j] for j in chosen)))
    assert divprune(features, 8).tolist() == sorted(chosen)


def test_divprune_selects_no_token_twice_even_of_copies():
    copies = torch.ones(6, 3)
    copies[4] = torch.tensor([1.0, -1.0, 0.0])
    chosen = divprune(copies, 5).tolist()
    assert len(set(chosen)) == 5 and 4 in chosen
    assert divprune(copies, 6).tolist() == list(range(6))


def _kernel(features, instruction):
    cosines = torch.cosine_similarity(features[:, None], features[None], dim=-1)
    alike = torch.cosine_similarity(features[:, None], instruction[None], dim=-1).mean(1)
    relevance = (alike - alike.min() + 1e-6) / (alike.max() - alike.min())
    return relevance[:, None] * cosines * relevance


def test_cdpruner_selects_by_the_gain_of_the_determinant():
    features, instruction = torch.randn(12, 9).double(), torch.randn(3, 9).double()
    kernel = _kernel(features, instruction)
    chosen = []
    while len(chosen) < 6:
        left = [i for i in range(12) if i not in chosen]
        determinants = {
            i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]).item() for i in left
        }
        chosen.append(max(left, key=determinants.get))
    assert cdpruner(features.float(), 6, instruction.float()).tolist() == sorted(chosen)


def test_cdpruner_continues_where_the_determinant_is_exhausted():
    features, instruction = torch.randn(20, 3), torch.randn(2, 3)
    chosen = cdpruner(features, 12, instruction).tolist()
    assert len(set(chosen)) == 12
    # 3 dimensions hold 3 tokens; the most relevant are then all among the others
    best = _kernel(features, instruction).diagonal().argsort(descending=True)[:9]
    assert set(best.tolist()) <= set(chosen)


def test_cdpruner_without_instruction_selects_by_diversity():
    features = torch.eye(4).repeat_interleave(3, 0)
    features += torch.rand(12, 4) * 1e-3
    chosen = cdpruner(features, 4, features[:0])
    assert [i // 3 for i in chosen.tolist()] == [0, 1, 2, 3]


def test_visionzip_is_the_published_one_in_front_of_a_linear_projector():
    count, keep = 40, 20
    encoded, keys, attention = torch.randn(count, 6), torch.randn(count, 4), torch.rand(count)
    projector = torch.nn.Linear(6, 10).requires_grad_(False)
    contextual = 3  # 10 of 64
    dominant = attention.topk(keep - contextual).indices
    others = torch.tensor([i for i in range(count) if i not in dominant.tolist()])
    metric = F.normalize(keys[others], dim=-1)
    targets = torch.arange(0, len(others), len(others) // contextual)[:contextual]
    rest = torch.tensor([i for i in range(len(others)) if i not in targets.tolist()])
    nearest = (metric[rest] @ metric[targets].T).argmax(1)
    values = encoded.clone()
    for number, target in enumerate(targets):
        values[others[target]] += encoded[others[rest[nearest == number]]].mean(0)
    expected = torch.cat([dominant, others[targets]]).sort().values
    indices, features = visionzip(projector(encoded), keep, attention, keys, projector.bias)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(features, projector(values[expected]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", [1, 3, 19])
def test_visionzip_keeps_the_number_of_tokens(keep):
    features, keys, attention = torch.randn(20, 6).half(), torch.randn(20, 4), torch.rand(20)
    indices, values = visionzip(features, keep, attention, keys, torch.zeros(6))
    assert len(set(indices.tolist())) == len(indices) == keep
    assert values.dtype == torch.float16 and values.isfinite().all()


def test_all_refuse_to_keep_more_or_fewer_than_there_are():
    features = torch.zeros(3, 4)
    for choose in (
        lambda: random_tokens(features, 4, 0),
        lambda: divprune(features, 0),
        lambda: cdpruner(features, 4, features),
        lambda: visionzip(features, 4, features[:, 0], features, features[0]),
    ):
        with pytest.raises(ValueError, match="1 to 3 tokens can be kept"):
            choose()

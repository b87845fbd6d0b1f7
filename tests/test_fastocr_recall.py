"""Recall matrices and the greedy choice, against loops and exhaustive search."""

from functools import partial
from itertools import combinations

import pytest
import torch

from compress.methods.fastocr.fixation import budget
from compress.methods.fastocr.recall import (
    Recalls,
    Recorder,
    choose_focal_layers,
    default_count,
    mean_recall,
    means,
    recalls,
)
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.models.visual import VisualLayout

LAYERS = 3


def _matrices(layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    recall = torch.rand(layers, layers, generator=generator).fill_diagonal_(1)
    return recall.tolist(), torch.rand(layers, layers, generator=generator).tolist()


def _tokens(*counts):
    layouts = [
        VisualLayout(torch.arange(count), torch.zeros(count, 3), torch.zeros(count))
        for count in counts
    ]
    return VisualTokens.of(layouts, max(counts) + 2, torch.device("cpu"))


def _steps(counts, steps, seed=0):
    """Attention over visual tokens, (batch, visual) by step and layer."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(steps, LAYERS, len(counts), max(counts), generator=generator)
    for row, count in enumerate(counts):
        scores[:, :, row, count:] = 0
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-9)


def _recorded(counts, scores, keep):
    recorder = Recorder(_tokens(*counts), LAYERS, partial(budget, keep))
    for step in scores:
        recorder.start_step()
        for layer, scores_of_layer in enumerate(step):
            assert recorder.fixation(layer) is None and recorder.needs_scores(layer)
            recorder.observe(layer, torch.nn.functional.pad(scores_of_layer, (0, 2)))
    return recorder


def test_mean_recall_by_hand():
    recall, previous = _matrices(4)
    # layer 0 reads what layer 3 chose a step ago, 2 what 1 chose, 1 and 3 all
    expected = (previous[3][0] + 1 + recall[1][2] + 1) / 4
    assert mean_recall([3, 1], recall, previous) == pytest.approx(expected)
    assert mean_recall([0], recall, previous) == pytest.approx(
        (1 + recall[0][1] + recall[0][2] + recall[0][3]) / 4
    )
    assert mean_recall(range(4), recall, previous) == 1


@pytest.mark.parametrize("seed", range(5))
def test_greedy_choice(seed):
    layers = 6
    recall, previous = _matrices(layers, seed)
    found = Recalls(recall, previous, 1)
    order, curve = choose_focal_layers(found, layers)
    assert sorted(order) == list(range(layers)) and curve[-1] == 1
    best = max(mean_recall([layer], recall, previous) for layer in range(layers))
    assert curve[0] == best
    for count in range(1, layers):
        assert curve[count] == max(
            mean_recall([*order[:count], layer], recall, previous)
            for layer in range(layers)
            if layer not in order[:count]
        )
        everything = [mean_recall(s, recall, previous) for s in combinations(range(layers), count)]
        assert curve[count - 1] <= max(everything)
    assert choose_focal_layers(found, 2) == (order[:2], curve[:2])
    # dense layers keep all, and are not chosen
    rest, values = choose_focal_layers(found, layers, dense=[0, 3])
    assert sorted(rest) == [1, 2, 4, 5] and values[-1] == 1
    assert values[0] == max(mean_recall([n], recall, previous, [0, 3]) for n in rest)


def test_a_layer_that_serves_all_is_chosen_first():
    recall = [[1.0, 0.2, 0.2, 0.2], [0.2, 1.0, 0.9, 0.9], [0.3, 0.3, 1.0, 0.3], [0.1] * 3 + [1.0]]
    previous = [[0.5] * 4] * 4
    found = Recalls(recall, previous, 1)
    assert choose_focal_layers(found, 1)[0] == (1,)
    assert len(choose_focal_layers(found, 1, dense=range(4))[0]) == 1  # where none is left, any
    assert found.unfocused(0.5) == () and found.unfocused(1.1) == (0, 1, 2, 3)


def test_default_count_is_a_seventh():
    assert [default_count(layers) for layers in (2, 8, 12, 28, 36)] == [1, 1, 1, 4, 5]


def test_recalls_are_sums_over_each_layer_s_choice():
    scores = _steps([5], 1)[0].transpose(0, 1)  # (1, layers, visual)
    chosen = torch.zeros(1, LAYERS, 5)
    sets = [[0, 4], [2], [1, 2, 3]]
    for layer, tokens in enumerate(sets):
        chosen[0, layer, tokens] = 1
    result = recalls(scores, chosen)
    for i, tokens in enumerate(sets):
        for j in range(LAYERS):
            assert result[0, i, j] == pytest.approx(scores[0, j, tokens].sum().item())


def test_recorder_compares_every_layer_with_every_choice_now_and_a_step_ago():
    counts, lengths, keep = [10, 6, 0], [4, 2, 3], 0.3
    scores = _steps(counts, 4)
    recall = torch.zeros(LAYERS, LAYERS)
    previous = torch.zeros(LAYERS, LAYERS)
    for row, (count, length) in enumerate(zip(counts[:2], lengths, strict=False)):
        kept = -(-3 * count // 10)
        for step in range(length):
            for i in range(LAYERS):
                best = scores[step, i, row].argsort(descending=True)[:kept]
                for j in range(LAYERS):
                    recall[i, j] += scores[step, j, row, best].sum() / 6
                    if step + 1 < length:
                        previous[i, j] += scores[step + 1, j, row, best].sum() / 4
    recorder = _recorded(counts, scores, keep)
    result = means([recorder.sums(lengths)])
    torch.testing.assert_close(torch.tensor(result.recall), recall)
    torch.testing.assert_close(torch.tensor(result.previous), previous)
    assert result.steps == 6
    # recorders add up
    parts = [recorder.sums([4, 0, 0]), recorder.sums([0, 2, 0])]
    again = means(parts)
    torch.testing.assert_close(torch.tensor(again.recall), recall)


def test_no_step_to_compare_with_the_one_before():
    recorder = _recorded([4], _steps([4], 1), 0.5)
    with pytest.raises(ValueError, match="at least two decode steps; got 1 steps"):
        means([recorder.sums([1])])

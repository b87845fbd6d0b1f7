"""The pure functions of fixations, against loops over plain lists."""

import math

import pytest
import torch

from compress.methods.fastocr.fixation import (
    Fixation,
    budget,
    filled,
    kept_mass,
    last_fixation,
    neighbours,
    opened,
    random_fixation,
    same_mean_budget,
    shares,
    top_k,
    visual_scores,
)

GENERATOR = torch.Generator()


def _scores(*sizes, width=None):
    """Rows of attention over that many tokens, padded with 0."""
    GENERATOR.manual_seed(0)
    width = width or max(sizes)
    rows = torch.zeros(len(sizes), width)
    for row, size in zip(rows, sizes, strict=True):
        row[:size] = torch.rand(size, generator=GENERATOR)
    return rows / rows.sum(1, keepdim=True)


def _sets(fixation):
    return [
        set(index[valid].tolist())
        for index, valid in zip(
            fixation.index,
            torch.ones_like(fixation.index).bool() if fixation.valid is None else fixation.valid,
            strict=True,
        )
    ]


def _top_k(scores, budgets, near=None):
    return top_k(scores, max(budgets), filled(budgets, scores.device), near)


@pytest.mark.parametrize("tokens", [0, 1, 7, 100, 257, 1000])
@pytest.mark.parametrize("percent", [1, 3, 5, 7, 10, 20, 29, 50, 58, 100])
def test_budget_is_the_exact_fraction_rounded_up(percent, tokens):
    exact = -(-percent * tokens // 100)
    assert budget(percent / 100, tokens) == exact
    assert budget(percent / 100, tokens, 9) == min(tokens, max(exact, 9))


def test_same_mean_budget_includes_the_dense_layers():
    for tokens, layers, dense in [(300, 8, 1), (1001, 28, 4), (16, 2, 1)]:
        mean = (dense * tokens + (layers - dense) * budget(0.05, tokens)) / layers
        assert same_mean_budget(budget(0.05, tokens), tokens, layers, dense) == math.ceil(mean)
    assert same_mean_budget(300, 300, 8, 1) == 300


def test_visual_scores_are_the_attention_on_the_page_alone():
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.5, 0.0]])
    rows, valid = torch.tensor([[1, 3], [2, 0]]), torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[0.2 / 0.6, 0.4 / 0.6], [1.0, 0.0]])
    torch.testing.assert_close(shares(visual_scores(weights, rows, valid)), expected)
    assert shares(visual_scores(weights * 0, rows, valid)).tolist() == [[0, 0], [0, 0]]
    expected = torch.tensor([[0.2, 0.4], [0.5, 0.25]])
    assert torch.equal(visual_scores(weights, rows, None), expected)


def test_top_k_are_the_highest_of_each_sequence():
    scores, budgets = _scores(9, 4, 0 + 1), [3, 4, 1]
    chosen = _sets(_top_k(scores, budgets))
    for row, kept, result in zip(scores.tolist(), budgets, chosen, strict=True):
        assert result == set(sorted(range(9), key=lambda i: -row[i])[:kept])


def test_a_sequence_s_choice_does_not_depend_on_its_neighbours_in_the_batch():
    scores = _scores(9, 4)
    alone = _sets(_top_k(scores[1:, :4], [2]))
    assert _sets(_top_k(scores, [5, 2]))[1:] == alone


def test_kept_mass_is_the_sum_over_the_fixation():
    scores = _scores(5, 3)
    fixation = Fixation(torch.tensor([[4, 0], [2, 0]]), torch.tensor([[True, True], [True, False]]))
    expected = torch.stack([scores[0, 4] + scores[0, 0], scores[1, 2]])
    torch.testing.assert_close(kept_mass(scores, fixation), expected)


def test_opened_has_all_tokens_of_the_refreshed_sequences_alone():
    valid = torch.tensor([[True] * 4, [True] * 3 + [False], [True] * 4])
    fixation = Fixation(torch.tensor([[3, 1], [2, 0], [0, 2]]), torch.tensor([[True, True]] * 3))
    refreshed = torch.tensor([False, True, True])
    assert _sets(opened(fixation, refreshed, valid)) == [{3, 1}, {0, 1, 2}, {0, 1, 2, 3}]


def _grid(rows, columns, view=0, newline=False):
    cells = [[view, row, column] for row in range(rows) for column in range(columns)]
    if newline:
        cells += [[view, row, -1] for row in range(rows)]
    return torch.tensor(cells)


@pytest.mark.parametrize("radius", [1, 2])
def test_neighbours_are_near_on_the_same_view_of_the_same_image(radius):
    grid = torch.cat([_grid(3, 4, newline=True), _grid(2, 2, view=1), _grid(3, 4, newline=True)])
    image_of = torch.tensor([0] * 19 + [1] * 15)
    result = neighbours(grid, image_of, radius)
    assert result.shape == (34, (2 * radius + 1) ** 2)
    for token, near in enumerate(result.tolist()):
        view, row, column = grid[token].tolist()
        expected = {token} | {
            other
            for other, (v, r, c) in enumerate(grid.tolist())
            if column >= 0 <= c
            and (v, image_of[other]) == (view, image_of[token])
            and max(abs(r - row), abs(c - column)) <= radius
        }
        assert set(near) == expected


def test_neighbours_of_no_tokens():
    empty = torch.empty(0, 3, dtype=torch.long)
    assert neighbours(empty, empty[:, 0], 1).shape == (0, 9)


def test_dilation_replaces_the_last_tokens_by_neighbours_of_the_best():
    grid = _grid(5, 5)
    near = neighbours(grid, torch.zeros(25, dtype=torch.long), 1)[None]
    scores = torch.full((1, 25), 1e-3)
    scores[0, 12], scores[0, 0], scores[0, 13] = 0.5, 0.2, 0.1  # the middle, a corner, beside it
    plain = _top_k(scores, [3])
    assert _sets(plain) == [{12, 0, 13}]
    around = {6, 7, 8, 11, 12, 13, 16, 17, 18}
    assert _sets(_top_k(scores, [9], near)) == [around]
    three = _top_k(scores, [3], near)
    assert {12, 13} < _sets(three)[0] < around  # by their own scores among equals
    assert _sets(_top_k(scores, [12], near)) == [around | {0, 1, 5}]


def test_random_fixation_is_drawn_from_the_sequence_alone_by_the_seed():
    counts, budgets = [50, 8, 20], [10, 8, 3]
    sets = _sets(random_fixation(counts, budgets, 3))
    assert [len(chosen) for chosen in sets] == budgets
    assert all(max(chosen) < count for chosen, count in zip(sets, counts, strict=True))
    assert _sets(random_fixation(counts[2:], budgets[2:], 3)) == sets[2:]
    assert _sets(random_fixation(counts, budgets, 4)) != sets


def test_last_fixation_is_the_end_of_the_reading_order():
    assert _sets(last_fixation([50, 8], [3, 2])) == [{47, 48, 49}, {6, 7}]

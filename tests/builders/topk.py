"""Calls of the kernel that chooses the highest weights: shapes, seeded tensors, and the answer."""

from dataclasses import dataclass

import torch

TEXT = 5  # rows of a list behind those that are chosen
FILL = 3  # what stands in the lists before


@dataclass(frozen=True)
class Shape:
    """Of a call; budgets and tokens are of each sequence."""

    length: int
    counts: tuple[int, ...]
    budgets: tuple[int, ...]


SMALL = [
    Shape(1000, (900,), (45,)),
    Shape(401, (300, 17, 299), (15, 7, 299)),
    Shape(1300, (1100, 1100, 1100), (1, 0, 1100)),
    Shape(40, (1, 31), (1, 30)),
]
LARGE = [
    Shape(17000, (16384,), (820,)),
    Shape(33000, (32768, 20000), (32768, 1000)),
    Shape(4500, (4096,) * 32, (205,) * 32),
    *SMALL,
]
KINDS = ("distinct", "ties", "special", "equal")


def draw(shape, kind, device="cpu"):
    """Arguments of ``top_rows`` in their order, but the lists that are written."""
    generator = torch.Generator().manual_seed(0)
    batch, visual = len(shape.counts), max(shape.counts)
    weights = torch.rand(batch, shape.length, generator=generator).pow(4)
    if kind == "ties":
        weights = weights.mul(8).round()
    elif kind == "special":
        values = torch.tensor([torch.nan, torch.inf, 0.0, 1.4e-45, 2.8e-45, 1.0, 3e38])
        places = torch.randint(9, weights.shape, generator=generator)
        for place, value in enumerate(values):
            weights[places == place] = value
    elif kind == "equal":
        weights.fill_(0.5)
    order = torch.rand(batch, shape.length, generator=generator).argsort(1)
    tokens = order[:, :visual].sort(1).values.int()
    valid = torch.arange(visual) < torch.tensor(shape.counts)[:, None]
    padding = None if valid.all() else valid.to(device)
    budgets = torch.tensor(shape.budgets, dtype=torch.int32)
    return weights.to(device), tokens.to(device), padding, budgets.to(device)


def lists(shape, device="cpu"):
    batch, width = len(shape.budgets), max(shape.budgets)
    index = torch.full((batch, width), FILL, dtype=torch.long, device=device)
    return index, torch.full((batch, width + TEXT), FILL, dtype=torch.int32, device=device)


def differences(shape, kind, index, rows):
    """Sequences whose lists are not what Python's own sort says, which is stable."""
    weights, tokens, *_ = draw(shape, kind)
    width = max(shape.budgets)
    wrong = []
    for b, (count, budget) in enumerate(zip(shape.counts, shape.budgets, strict=True)):
        values = weights[b, tokens[b, :count].long()].tolist()
        ranked = sorted(range(count), key=lambda n: (values[n] == values[n], -values[n]))
        best = sorted(ranked[:budget])
        same = index[b].tolist() == best + [FILL] * (width - budget)
        same = same and rows[b, :budget].tolist() == tokens[b, best].tolist()
        if not (same and bool((rows[b, width:] == FILL).all())):
            wrong.append(b)
    return wrong

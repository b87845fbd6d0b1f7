"""Calls of the decode kernels: shapes, seeded tensors, and what they may attend to."""

from dataclasses import dataclass

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shape:
    """Of a call; the mask keeps some of the rows, or the first listed one and the last written."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    dim: int
    picked: int
    written: int
    masked: str = "some"  # "none", "some", "one"
    value_dim: int = 0
    transposed: bool = False  # a cache that lies as (batch, length, kv_heads, dim)


SMALL = [
    Shape(2, 2, 2, 70, 64, 21, 10),
    Shape(3, 7, 1, 90, 80, 37, 5, transposed=True),
    Shape(2, 8, 2, 75, 128, 40, 33, "none"),
    Shape(1, 4, 1, 40, 256, 9, 0),
    Shape(2, 2, 2, 60, 96, 33, 20, "one"),  # whole splits have nothing to attend to
    Shape(1, 4, 2, 50, 64, 0, 50, "none", value_dim=80),
    Shape(2, 21, 1, 35, 64, 1, 1, "none"),
]
# what is interpreted: (splits, dtype, number of the shape); half precision in one each
INTERPRETED = [
    *(("one", torch.float32, number) for number in (0, 3, 5, 6)),
    ("one", torch.float16, 1),
    *(("many", torch.float32, number) for number in (1, 2, 4)),
    ("many", torch.bfloat16, 5),
]
# and slowly; from the first in many splits on all are
INTERPRETED_SLOWLY = [("many", torch.float32, number) for number in (0, 3, 5, 6)]
LARGE = [
    Shape(1, 28, 4, 4500, 128, 461, 200),
    Shape(8, 16, 2, 2100, 128, 300, 77, transposed=True),
    Shape(32, 28, 4, 1100, 128, 100, 41),
    Shape(3, 10, 10, 1500, 128, 700, 300, "one"),
    Shape(2, 14, 2, 900, 80, 333, 1, "none"),
    Shape(2, 8, 1, 900, 256, 333, 100, transposed=True),
    *SMALL,
]


def draw(shape, dtype, seed=0):
    """Arguments of both functions, by name; what nobody may read is no number."""
    generator = torch.Generator().manual_seed(seed)
    value_dim = shape.value_dim or shape.dim

    def cache(dim):
        size = shape.batch, shape.kv_heads, shape.length, dim
        if shape.transposed:
            size = shape.batch, shape.length, shape.kv_heads, dim
        drawn = torch.randn(size, generator=generator).to(dtype)
        return drawn.transpose(1, 2) if shape.transposed else drawn

    prompt = shape.length - shape.written
    orders = [torch.randperm(prompt, generator=generator) for _ in range(shape.batch)]
    rows = torch.stack(orders)[:, : shape.picked]
    keep = torch.ones if shape.masked == "none" else torch.zeros
    rows_mask = keep(shape.batch, shape.picked, dtype=torch.bool)
    mask = keep(shape.batch, 1, 1, shape.length, dtype=torch.bool)
    if shape.masked == "one":
        rows_mask[:, :1] = True
    elif shape.masked == "some":
        rows_mask = torch.rand(rows_mask.shape, generator=generator) < 0.7
        mask = torch.rand(mask.shape, generator=generator) < 0.7
    mask[..., -1] = True
    return {
        "query": torch.randn(shape.batch, shape.heads, 1, shape.dim, generator=generator).to(dtype),
        "key": cache(shape.dim),
        "value": cache(value_dim),
        "rows": rows,
        "rows_mask": rows_mask,
        "mask": mask,
        "dense": torch.tensor([prompt, shape.length]),
    }


GROUPS = 21


def grouped(case):
    """The prompt's rows in groups: arguments of :mod:`compress.kernels.summaries`, by name."""
    generator = torch.Generator().manual_seed(1)
    prompt = int(case["dense"][0])
    member = torch.randint(GROUPS, (*case["key"].shape[:2], prompt), generator=generator)
    share = torch.nn.functional.one_hot(member, GROUPS).float().transpose(2, 3)
    key, value = (case[name][:, :, :prompt].float() for name in ("key", "value"))
    rows = case["rows"]
    return {
        "key": case["key"],
        "value": case["value"],
        "rows": torch.cat([rows, rows[:, :1]], 1).int(),  # and others behind them
        "index": rows,
        "valid": None if case["rows_mask"].all() else case["rows_mask"],
        "member": member,
        "sums": (share @ key, share @ value, share.sum(3)),
    }


def beside(case):
    """Rows that every key head has beside the cache, one of them hidden."""
    generator = torch.Generator().manual_seed(2)
    own = *case["key"].shape[:2], GROUPS
    parts = [
        torch.randn(*own, case[name].shape[3], generator=generator).to(case[name].dtype)
        for name in ("key", "value")
    ]
    bias = torch.randn(own, generator=generator)
    bias[..., 3] = -torch.inf
    return *parts, bias


def sparse(case, function, *beside):
    """Through ``function``; masks of ones are left out."""
    start, stop = case["dense"].tolist()
    rows_mask, mask = case["rows_mask"], case["mask"][:, 0, 0, start:stop]
    return function(
        *(case[name] for name in ("query", "key", "value", "rows")),
        None if rows_mask.all() else rows_mask,
        (start, stop),
        None if mask.all() else mask,
        0.2,
        *beside,
    )


def focal(case, function):
    mask = None if case["mask"].all() else case["mask"]
    return function(case["query"], case["key"], case["value"], mask, 0.2)


def spaced(case):
    """The same lists and masks as views with gaps, and the first sequence's mask for all."""
    views = {
        name: torch.stack([case[name], case[name].logical_not().to(case[name].dtype)], -1)[..., 0]
        for name in ("rows", "rows_mask", "mask")
    }
    return case | views | {"mask": views["mask"][:1]}


def listed(case):
    """Which rows of the cache :func:`sparse` attends to, ``(batch, length)``."""
    start, stop = case["dense"].tolist()
    seen = torch.zeros(len(case["rows"]), case["key"].shape[2], dtype=torch.bool)
    for b, (rows, keep) in enumerate(zip(case["rows"], case["rows_mask"], strict=True)):
        seen[b, rows[keep]] = True
    seen[:, start:stop] = case["mask"][:, 0, 0, start:stop]
    return seen


def hidden(case, seen):
    """The case with a cache in which no row is a number that is not seen."""
    hidden = {**case}
    for name in ("key", "value"):
        hidden[name] = case[name].masked_fill(~seen[:, None, :, None], torch.nan)
    return hidden

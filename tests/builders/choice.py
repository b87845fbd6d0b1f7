"""Calls of the kernel that opens groups: shapes, and seeded tensors."""

from dataclasses import dataclass

import torch

from compress.kernels.signs import pack

TEXT = 5  # rows behind the visual ones, which all heads read


@dataclass(frozen=True)
class Shape:
    """Of a call; budgets are of each sequence."""

    heads: int
    kv_heads: int
    dim: int
    groups: int
    visual: int
    budgets: tuple[int, ...]


SMALL = [
    Shape(4, 2, 64, 5, 30, (9, 4)),
    Shape(7, 1, 80, 40, 90, (33,)),
    Shape(2, 2, 128, 1, 20, (7, 20, 0)),
    Shape(6, 2, 96, 16, 50, (50, 50)),
]
# what is interpreted, slowly: (dtype, number of the shape); half precision in one
INTERPRETED = [*((torch.float32, number) for number in range(len(SMALL))), (torch.float16, 1)]
LARGE = [
    Shape(28, 4, 128, 64, 4096, (205,)),
    Shape(16, 2, 128, 128, 16384, (819, 3, 16384)),
    *SMALL,
]


def draw(shape, dtype):
    """Arguments of ``choose_rows`` by name, and a cache whose first rows are the visual tokens.

    Some groups are empty, and some have the same score.
    """
    generator = torch.Generator().manual_seed(0)
    batch = len(shape.budgets)
    own = batch, shape.kv_heads

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    member = torch.randint(shape.groups, (*own, shape.visual), generator=generator)
    member[member == 2] = 0
    sizes = torch.nn.functional.one_hot(member, shape.groups).sum(2)
    keys = normal(*own, shape.groups, shape.dim)
    keys[:, :, 4::7] = 0
    rows = torch.argsort(torch.rand(batch, 1, shape.visual, generator=generator), dim=2)
    order = rows.expand_as(member).gather(2, member.argsort(dim=2, stable=True))
    cache = *own, shape.visual + TEXT, shape.dim
    return {
        "query": normal(batch, shape.heads, 1, shape.dim),
        "keys": keys,
        "sizes": sizes.int(),
        "first": (sizes.cumsum(2) - sizes).int(),
        "order": order.int(),
        "budgets": torch.tensor(shape.budgets, dtype=torch.int32),
        "width": max(shape.budgets),
        "scaling": 0.2,
    }, (normal(*cache), normal(*cache), normal(*own, shape.groups, shape.dim))


def draw_signs(shape, dtype):
    """Arguments of ``sign_scores`` by name, and the keys that they stand for."""
    given, _ = draw(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    own = len(shape.budgets), shape.kv_heads
    keys = given["keys"]
    member = torch.randint(shape.groups, (*own, shape.visual), generator=generator)
    positive = torch.rand(*own, shape.visual, shape.dim, generator=generator) < 0.5
    scales = torch.rand(*own, shape.dim, generator=generator).to(dtype)
    means = keys.double().gather(2, member[..., None].expand(-1, -1, -1, shape.dim))
    stood_for = means + scales.double()[:, :, None].where(positive, -scales.double()[:, :, None])
    return {
        "query": given["query"],
        "keys": keys,
        "member": member.to(torch.uint8),
        "codes": pack(positive),
        "scales": scales,
        "scaling": 0.2,
    }, stood_for


def attend(given, cache, opened, decode):
    """Attention to the opened rows, the text and the means, by ``decode``."""
    key, value, means = cache
    rows, bias = opened
    width = rows.shape[2]
    mask = torch.arange(width, device=rows.device) < given["budgets"][:, None]
    visual = given["order"].shape[2]
    return decode(
        given["query"],
        key,
        value,
        rows.where(mask[:, None], 0),
        None if mask.all() else mask[:, None].expand(-1, rows.shape[1], -1),
        (visual, visual + TEXT),
        None,
        given["scaling"],
        (given["keys"], means, bias),
    )

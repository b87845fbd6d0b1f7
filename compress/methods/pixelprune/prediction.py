"""Which units of images their neighbours predict: predictive coding.

A unit is a vector of pixels. The one at (r, c) is predicted from A to its left, B above it and C
above A: in the first row by A, in the first column by B, elsewhere by B where C is similar to A and
not to B, else by A (the edge predictor of JPEG-LS, LOCO-I). It is dropped where it is similar to
what predicts it, and then counts as that, so that errors do not add up. The first one stays.

Units of several images lie behind each other, row by row, and are coded together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Size = tuple[int, int]  # rows and columns of units
Distance = Literal["max", "mae", "rmse"]
Close = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# 8-bit values that are a threshold apart may be this much farther after (v / 255 - mean) / std in
# float32, and less than a thousandth of it matters to 8 bits
ROUNDING = 1e-6
GOLDEN = (5**0.5 - 1) / 2


def distances(a: torch.Tensor, b: torch.Tensor, distance: Distance) -> torch.Tensor:
    """How far units are apart, ``(units,)``, larger for less similar ones.

    Parameters
    ----------
    a, b : ``(units, values)`` each.
    distance : the largest absolute difference ("max"), the mean one ("mae"), or the root mean
        square ("rmse").
    """
    difference = (a - b).abs()
    if distance == "max":
        return difference.amax(1)
    return difference.mean(1) if distance == "mae" else difference.square().mean(1).sqrt()


def kept_units(
    units: torch.Tensor,
    sizes: Sequence[Size],
    threshold: float = 0.0,
    distance: Distance = "max",
    min_keep: float = 0.0,
) -> torch.Tensor:
    """Which units stay, ``(units,)`` bool.

    Parameters
    ----------
    units : of all images, ``(units, values)``.
    sizes : of the images.
    threshold : the distance up to which units are similar.
    distance : see :func:`distances`.
    min_keep : least fraction of an image's units. Where fewer would stay, others, spread evenly
        over those that would go, stay with them whatever predicts them.
    """
    forced = torch.zeros(len(units), dtype=torch.bool, device=units.device)
    kept = _kept(units, sizes, threshold, distance, forced)
    counts = [rows * columns for rows, columns in sizes]
    for stay, image in zip(forced.split(counts), kept.split(counts), strict=True):
        missing = math.ceil(min_keep * len(image) - 1e-9) - int(image.sum())
        if missing > 0:
            gone = (~image).nonzero()[:, 0]
            # multiples of the golden ratio: evenly spread, without a period that columns could have
            multiples = torch.arange(len(gone), dtype=torch.float64, device=gone.device) * GOLDEN
            stay |= image
            stay[gone[(multiples % 1).argsort()[:missing]]] = True
    # what stays with its own pixels predicts others than what it was taken for
    return _kept(units, sizes, threshold, distance, forced) if forced.any() else kept


def _close(threshold: float, distance: Distance) -> Close:
    if threshold == 0:
        return lambda a, b: (a == b).all(1)
    return lambda a, b: distances(a, b, distance) <= threshold + ROUNDING


def _kept(
    units: torch.Tensor,
    sizes: Sequence[Size],
    threshold: float,
    distance: Distance,
    forced: torch.Tensor,
) -> torch.Tensor:
    places = _Places.of(sizes, units.device)
    if threshold == 0:
        return _unequal(units, places) | forced
    close = _close(threshold, distance)
    kept, coded = torch.ones_like(forced), units.clone()
    for at in places.diagonals():
        predicted = coded[places.predictors(coded, at, close)]
        kept[at] = forced[at] | ~close(units[at], predicted)
        coded[at] = torch.where(kept[at, None], units[at], predicted)
    return kept


def _unequal(units: torch.Tensor, places: "_Places") -> torch.Tensor:
    """Units that are not what predicts them: equal ones need no coding, as nothing changes."""
    row, column = places.row, places.column
    as_left = (units == units[places.left]).all(1)
    as_above = (units == units[places.above]).all(1)
    # by B where C equals A: were it equal to B too, A and B would predict the same
    by_above = (row > 0) & ((column == 0) | as_above[places.left])
    return ~torch.where(by_above, as_above, as_left) | ((row == 0) & (column == 0))


@dataclass(frozen=True)
class _Places:
    """Where the units of all images are.

    Parameters
    ----------
    row, column : of each, ``(units,)``.
    left, above, corner : the units beside it, ``(units,)``; itself where there is none.
    """

    row: torch.Tensor
    column: torch.Tensor
    left: torch.Tensor
    above: torch.Tensor
    corner: torch.Tensor

    @classmethod
    def of(cls, sizes: Sequence[Size], device: torch.device) -> "_Places":
        within = torch.cat([torch.arange(rows * columns) for rows, columns in sizes])
        width = torch.cat([torch.full((rows * columns,), columns) for rows, columns in sizes])
        row, column = within // width, within % width
        here = torch.arange(len(within))
        left = here - (column > 0).long()
        above = here - width * (row > 0)
        corner = torch.where((row > 0) & (column > 0), above - 1, here)
        return cls(*(place.to(device) for place in (row, column, left, above, corner)))

    def diagonals(self) -> Iterator[torch.Tensor]:
        """The units of each anti-diagonal but the first: they depend on earlier ones alone."""
        number = (self.row + self.column).cpu()
        order, counts = number.argsort(stable=True), number.bincount().tolist()
        yield from order.to(self.row.device).split(counts)[1:]

    def predictors(self, units: torch.Tensor, at: torch.Tensor, close: Close) -> torch.Tensor:
        """The unit that predicts each of those ``at`` these places, ``(places,)``."""
        left, above, corner = self.left[at], self.above[at], self.corner[at]
        edge = close(units[corner], units[left]) & ~close(units[corner], units[above])
        row, column = self.row[at], self.column[at]
        return torch.where((row > 0) & ((column == 0) | edge), above, left)

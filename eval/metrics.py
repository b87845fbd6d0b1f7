"""Every metric that is reported: its label, direction, unit, and how tables write it."""

from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric:
    """What is known of a metric whatever its value.

    Attributes
    ----------
    label : for people.
    better : the direction in which it is better; empty for a plain count.
    unit : of its values, "share" for fractions that are shown in per cent; empty for none.
    how : how it is measured, where every run measures it in the same way.
    """

    label: str
    better: Better = ""
    unit: str = ""
    how: str = ""

"""RTPrune: visual token pruning that reads twice, and the peers that it is compared with."""

from compress.methods.rtprune.method import RTPrune
from compress.methods.rtprune.ratio import distinctness, keep_fraction, textual_density
from compress.methods.rtprune.selection import drop_adjacent_newlines, select
from compress.methods.rtprune.transport import merge, transport_plan

__all__ = [
    "RTPrune",
    "distinctness",
    "drop_adjacent_newlines",
    "keep_fraction",
    "merge",
    "select",
    "textual_density",
    "transport_plan",
]

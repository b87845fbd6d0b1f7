"""RTPrune: visual token pruning that reads twice, and the peers that it is compared with."""

from compress.methods.rtprune.method import RTPrune

__all__ = ["RTPrune"]

"""RTPrune: visual tokens are selected and merged between the encoder and the decoder."""

from compress.methods.rtprune.method import RTPrune

__all__ = ["RTPrune"]

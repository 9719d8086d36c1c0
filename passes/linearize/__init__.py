"""The ``linearize`` pass: gated linear attention beside a sliding window, with a state of constant size."""

from memc.passes.linearize.rewrite import Linearize

__all__ = ["Linearize"]

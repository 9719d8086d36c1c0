"""The ``sparsify`` pass: softmax attention that keeps every key and reads the few that matter to each token."""

from memc.passes.sparsify.rewrite import Sparsify

__all__ = ["Sparsify"]

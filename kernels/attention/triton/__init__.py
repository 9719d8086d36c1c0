"""Kernels of softmax attention over a state and a call: prompts, one token, and gradients.

Sizes: H query heads, G key-value heads, R = H / G; T queries (``tokens``) and N keys (``held``). ``positions`` and
``numbers [B,N]`` are int32: where each key stands in its sequence (-1: padding, or nothing in its slot), and which
sequence of the row it belongs to; ``query_positions`` and ``query_numbers [B,T]`` say so of the queries. Options are
those of the op, 0 for none; ``sinks`` are first tokens that stay readable past the window.
"""

from __future__ import annotations

from memc.kernels.attention.triton.backward import key_gradient, query_gradient
from memc.kernels.attention.triton.forward import prompt
from memc.kernels.attention.triton.intervals import visitors, visits
from memc.kernels.attention.triton.single import merge, step

__all__ = ["key_gradient", "merge", "prompt", "query_gradient", "step", "visitors", "visits"]

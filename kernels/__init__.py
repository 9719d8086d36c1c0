"""Implementations of the dialect's ops: importing this package registers all of them with torch.

One folder an op: ``reference.py`` is readable torch that runs on any device, ``README.md`` its maths.
"""

from __future__ import annotations

from memc.kernels import (
    attention,
    bank_ffn,
    compact_attention,
    events,
    full_attention,
    in_place,
    linear_memory,
    norm,
    quantised_attention,
    refreshed_attention,
    rotary,
    sparse_attention,
    window_memory,
)

__all__ = [
    "attention",
    "bank_ffn",
    "compact_attention",
    "events",
    "full_attention",
    "in_place",
    "linear_memory",
    "norm",
    "quantised_attention",
    "refreshed_attention",
    "rotary",
    "sparse_attention",
    "window_memory",
]

"""What a lowered form of ``memc::events`` is made for."""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 1e-12
"""What lengths of keys and sums of edges are at least taken to be, where they divide."""


@dataclass(frozen=True)
class Segmentation:
    """Sizes of a call that are fixed, and its rule: ``history`` is how many surprises are held."""

    vocabulary: int
    groups: int
    size: int
    history: int
    longest: int
    gamma: float
    refine: str

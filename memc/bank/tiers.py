"""Where the levels of a bank lie, from the fastest store to the slowest, and what a fetch then takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memc.bank.layout import BankShape


@dataclass(frozen=True)
class Tier:
    """A store: bytes per second, seconds before the first byte, and bytes that fit, None for all."""

    name: str
    bandwidth: float
    latency: float = 0.0
    capacity: int | None = None


MEMORY_BANDWIDTH = 8e9
"""Bytes per second that one core copies."""

DISK = Tier("disk", 1e9, 1e-4)
"""A modest solid-state disk."""


@dataclass(frozen=True)
class Placement:
    """One level in its tier; ``seconds`` is what fetching one record takes there."""

    level: int
    tier: Tier
    record_bytes: int
    level_bytes: int
    seconds: float


def memory(capacity: int) -> Tier:
    """Return the tier of the machine's memory, of which ``capacity`` bytes may be used."""
    return Tier("memory", MEMORY_BANDWIDTH, capacity=capacity)


def place(shape: BankShape, tiers: Sequence[Tier]) -> list[Placement]:
    """Put each level that stores something into the first tier with room for it whole, shallow levels first.

    Shallow levels are few and read with every prompt; deep ones are many and read seldom. ``tiers`` go from fast to
    slow; the last takes what fits nowhere else.
    """
    room = [tier.capacity for tier in tiers]
    placements = []
    for level in shape.storing():
        size, record = shape.level_bytes(level), shape.record_bytes(level)
        fits = (index for index, left in enumerate(room) if left is None or left >= size)
        chosen = next(fits, len(tiers) - 1)
        if (left := room[chosen]) is not None:
            room[chosen] = left - size
        tier = tiers[chosen]
        placements.append(Placement(level, tier, record, size, tier.latency + record / tier.bandwidth))
    return placements

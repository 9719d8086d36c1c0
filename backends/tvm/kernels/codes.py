"""Numbers in 8 or 4 bits, evenly spaced from the smallest of a range to the largest, as the reference has them."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import Expression
from memc.kernels.quantised_attention.codes import levels


@dataclass(frozen=True)
class Codes:
    """How keys and values are held: ``bits`` a channel, 8 or 4, and keys in pages of ``page`` tokens."""

    bits: int
    page: int

    def half(self, channels: int) -> int:
        """Return the bytes of ``channels``: with 4 bits those of the first half lie low in them, the others high."""
        return channels if self.bits == 8 else -(-channels // 2)

    def byte(self, channel: Expression, channels: int) -> Expression:
        """Return the byte that a channel is held in."""
        if self.bits == 8:
            return channel
        return T.Select(channel < self.half(channels), channel, channel - self.half(channels))

    def level(self, byte: Expression, channel: Expression, channels: int) -> Expression:
        """Return the number of the level of a channel, in float32, from its byte."""
        code = T.Cast("int32", byte)
        if self.bits == 4:
            shift = T.Select(channel < self.half(channels), T.int32(0), T.int32(4))
            code = T.bitwise_and(T.shift_right(code, shift), T.int32(15))
        return T.Cast("float32", code)

    def step(self, top: Expression, low: Expression) -> Expression:
        """Return how far the levels between two ends are from one another."""
        return (top - low) / T.float32(levels(self.bits))

    def code(self, x: Expression, low: Expression, step: Expression) -> Expression:
        """Return the number of the nearest level, of two that are as near the even one, as a byte."""
        level = T.nearbyint((x - low) / T.Select(step > T.float32(0), step, T.float32(1)))
        return T.Cast("uint8", T.min(T.max(level, T.float32(0)), T.float32(levels(self.bits))))

"""Where the tokens of one call of ``memc::window_memory`` go and come from, as indices.

Indices point into the state's N slots followed by the call's T tokens; -1 points at nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memc.kernels.common import segments, take


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``stop``; keys: the first ``slots`` slots, ``sink_index``, then tokens ``low`` to ``stop``.

    ``mask [B,1,1,T,S]`` and ``distance [B,T,S]`` (key minus query position) are over those keys in that order.
    """

    start: int
    stop: int
    slots: int
    sink_index: Tensor | None
    low: int
    mask: Tensor
    distance: Tensor


@dataclass(frozen=True)
class Layout:
    """One call, its padding moved behind its tokens.

    ``order [B,T]`` is that move (None when there is nothing to move) and ``inverse`` undoes it; ``positions`` and
    ``segments [B,T]`` are in the new order. ``left [B,T]`` is the token that leaves the window at each step and
    ``ring [B,N]`` the source of each slot of the next state.
    """

    order: Tensor | None
    inverse: Tensor | None
    positions: Tensor
    segments: Tensor
    past_positions: Tensor
    left: Tensor
    ring: Tensor
    window: int
    sinks: int

    def arrange(self, x: Tensor) -> Tensor:
        """Move the padding of ``x [B,G,T,D]`` behind its tokens."""
        return x if self.order is None else take(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Undo :meth:`arrange`."""
        return x if self.inverse is None else take(x, self.inverse)

    def restore_rows(self, x: Tensor) -> Tensor:
        """Undo the move of ``x [B,T]``."""
        return x if self.inverse is None else x.gather(1, self.inverse)

    def keys(self, x: Tensor, block: Block) -> Tensor:
        """Return what a block reads of ``x [B,G,N+T,D]``."""
        first = self.window + self.sinks
        if block.slots == first and block.low == 0:
            return x[:, :, : first + block.stop]
        parts = [x[:, :, : block.slots], x[:, :, first + block.low : first + block.stop]]
        if block.sink_index is not None:
            parts.insert(1, take(x, block.sink_index))
        return torch.cat(parts, 2)


def slot_of(positions: Tensor, window: int, sinks: int) -> Tensor:
    """Return the slot in which the token of each position lives."""
    return torch.where(positions < sinks, positions, sinks + (positions - sinks) % window)


def lay_out(
    positions: Tensor, past_positions: Tensor, window: int, sinks: int, *, padded: bool | None = None
) -> Layout:
    """Work out order, sources of the next state, and the tokens that leave the window.

    ``padded`` says whether to move padding; None looks whether there is any, which a GPU would have to be waited for.
    """
    order = inverse = None
    if padded is None:
        padded = positions.shape[1] > 1 and bool((positions < 0).any())
    if padded:
        order = torch.argsort((positions < 0).long(), dim=1, stable=True)
        inverse = torch.argsort(order, dim=1)
        positions = positions.gather(1, order)
    numbers = segments(positions)
    left = _left(positions, numbers, past_positions, window, sinks)
    ring = _ring(positions, numbers, window, sinks)
    return Layout(order, inverse, positions, numbers, past_positions, left, ring, window, sinks)


def _left(positions: Tensor, numbers: Tensor, past_positions: Tensor, window: int, sinks: int) -> Tensor:
    slots, tokens = window + sinks, positions.shape[1]
    target = positions - window
    wanted = target >= sinks
    slot = slot_of(target, window, sinks).clamp_min(0)
    in_ring = wanted & (numbers == 0) & (past_positions.gather(1, slot) == target)
    left = torch.where(in_ring, slot, -1)
    if tokens > window:
        same = (numbers[:, window:] == numbers[:, :-window]) & wanted[:, window:]
        index = torch.arange(slots, slots + tokens - window, device=positions.device)
        left[:, window:] = torch.where(same, index, left[:, window:])
    return left


def _ring(positions: Tensor, numbers: Tensor, window: int, sinks: int) -> Tensor:
    slots = window + sinks
    batch, tokens = positions.shape
    current = numbers[:, -1:]
    alive = (positions >= 0) & (numbers == current)
    newest = torch.where(alive, positions, -1).amax(1, keepdim=True)
    stays = alive & ((positions < sinks) | (positions > newest - window))
    # Tokens that do not stay are written to one slot too many, which is then cut off.
    slot = torch.where(stays, slot_of(positions, window, sinks), slots)
    kept = torch.arange(slots + 1, device=positions.device).expand(batch, -1)
    ring = torch.where(current == 0, kept, -1)
    index = torch.arange(slots, slots + tokens, device=positions.device).expand(batch, -1)
    return ring.scatter(1, slot, index)[:, :slots]


def blocks(layout: Layout) -> Iterator[Block]:
    """Cut the queries so that each block reads a bounded number of keys, however long the call."""
    window, sinks, positions = layout.window, layout.sinks, layout.positions
    slots, tokens = window + sinks, positions.shape[1]
    key_positions = torch.cat([layout.past_positions, positions], 1)
    key_segments = torch.cat([torch.zeros_like(layout.past_positions), layout.segments], 1)
    size = max(64, min(window, 256))
    for start in range(0, tokens, size):
        stop, low = min(start + size, tokens), max(0, start - window + 1)
        held = slots if start < window else sinks
        index = _sinks_before(layout, start, low) if low > 0 and sinks > 0 else None
        block = Block(start, stop, held, index, low, positions, positions)
        p = positions[:, start:stop, None]
        # As heads of size 1, so that the code that picks keys picks positions too; plus 1 makes "nothing" position -1.
        j = layout.keys((key_positions + 1)[:, None, :, None], block)[:, 0, None, :, 0] - 1
        number = layout.keys(key_segments[:, None, :, None], block)[:, 0, None, :, 0]
        mask = (j >= 0) & (j <= p) & ((p - j < window) | (j < sinks)) & (number == layout.segments[:, start:stop, None])
        yield Block(start, stop, held, index, low, mask[:, None, None], j - p)


def _sinks_before(layout: Layout, start: int, low: int) -> Tensor:
    """Find, before token ``low``, the sink tokens of the sequence that token ``start`` goes on with.

    Sequences that start later have their sinks among the block's own tokens; sinks before the call are in the slots.
    """
    first = start - layout.positions[:, start : start + 1]
    index = first + torch.arange(layout.sinks, device=first.device)
    inside = (index >= 0) & (index < low) & (layout.positions[:, start : start + 1] >= 0)
    return torch.where(inside, index + layout.window + layout.sinks, -1)

"""What several kernels need: types, sequences, gathering of tokens by index."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the type in which statistics and sums are kept: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def segments(positions: Tensor) -> Tensor:
    """Number the sequences of each row of ``positions [B,T]``: 0 goes on from the state, n follows the n-th restart."""
    return (positions == 0).cumsum(1)


def held_positions(past_positions: Tensor, positions: Tensor) -> Tensor:
    """Return the positions ``[B,S+T]`` of a growing state with a call appended, -1 for sequences that are over."""
    current = segments(positions)
    everything = torch.cat([torch.zeros_like(past_positions), current], 1)
    return torch.cat([past_positions, positions], 1).masked_fill(everything != current[:, -1:], -1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens ``index [B,L]`` of ``x [B,G,S,D]`` into ``[B,G,L,D]``; zeros where the index is -1."""
    batch, heads, _, size = x.shape
    where = index.clamp_min(0)[:, None, :, None].expand(batch, heads, index.shape[1], size)
    return torch.gather(x, 2, where).masked_fill((index < 0)[:, None, :, None], 0)


def put(gradient: Tensor, index: Tensor, size: int) -> Tensor:
    """Add tokens ``gradient [B,G,L,D]`` at ``index [B,L]`` of zeros ``[B,G,size,D]``: the transpose of :func:`take`."""
    batch, heads, _, channels = gradient.shape
    result = gradient.new_zeros(batch, heads, size, channels)
    where = index.clamp_min(0)[:, None, :, None].expand(gradient.shape)
    return result.scatter_add_(2, where, gradient.masked_fill((index < 0)[:, None, :, None], 0))

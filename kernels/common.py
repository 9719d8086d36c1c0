"""What several kernels need: types, registration, gathering of tokens by index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memc.kernels.launch import dispatch

DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("memc", "FRAGMENT")


def accumulation_type(x: Tensor) -> torch.dtype:
    """Return the type in which statistics and sums are kept: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def like(x: Tensor | None) -> Tensor:
    """Return an uninitialised contiguous tensor of the shape and type of ``x``; an empty one for None."""
    return torch.empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def cast_like(gradient: Tensor | None, x: Tensor | None) -> Tensor:
    """Return ``gradient`` contiguous and in the type of ``x``; an empty tensor when there is no ``x``."""
    if x is None or gradient is None:
        return torch.empty(0)
    return gradient.to(x.dtype).contiguous()


def or_zeros(gradient: Tensor | None, output: Tensor) -> Tensor:
    """Return the gradient of an output, zeros when nothing depended on it."""
    return torch.zeros_like(output) if gradient is None else gradient


def register_forward(name: str, forward: Callable[..., Any]) -> None:
    """Register ``forward`` as the implementation of ``memc::name``, on a GPU for what its kernels do not take."""
    torch.library.register_kernel(f"memc::{name}", DEVICES, dispatch(name, forward))


def define_backward(name: str, schema: str, fake: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    """Define ``memc::name_backward``, the op that holds the explicit gradient formulas, and return it.

    A second op rather than torch code in the autograd function: tracing sees one node, and its loops over blocks are
    free to look at sizes and values.
    """
    full = f"{name}_backward"
    _LIBRARY.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memc::{full}", fake)
    own = dispatch(name, backward, "backward", schema.count("Tensor grad_"))
    torch.library.register_kernel(f"memc::{full}", DEVICES, own)
    return getattr(torch.ops.memc, full).default


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

"""``memc::full_attention`` in torch: query blocks against every key, memory bounded by the block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type, cast_like
from memc.kernels.softmax import attend, attend_backward

# Most scores that one block of queries makes at once: 4 MB in float32, which a core's cache holds.
BLOCK_SCORES = 1 << 20


def _blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, tokens, _ = query.shape
    size = max(1, BLOCK_SCORES // max(1, batch * heads * key.shape[2]))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _grouped(bias: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """View a bias as ``[B,G,R,T,S]`` without copying it."""
    if bias is None:
        return None
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    return bias.expand(batch, heads, tokens, key.shape[2]).view(batch, groups, heads // groups, tokens, -1)


def _mask(key_positions: Tensor | None) -> Tensor | None:
    return None if key_positions is None else (key_positions >= 0)[:, None, None, None, :]


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Run ``memc::full_attention``; arguments and results as its dialect page has them."""
    kind = accumulation_type(query)
    q, k, v, mask, added = (
        query.to(kind),
        key.to(kind),
        value.to(kind),
        _mask(key_positions),
        _grouped(bias, query, key),
    )
    out = query.new_empty(*query.shape[:3], value.shape[3])
    for rows in _blocks(query, key):
        part = None if added is None else added[:, :, :, rows]
        out[:, :, rows] = attend(q[:, :, rows], k, v, mask, part, sink_logits, scale, softcap)[0]
    return out


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_positions: Tensor | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, bias and sink_logits."""
    kind = accumulation_type(query)
    q, k, v, mask, added = (
        query.to(kind),
        key.to(kind),
        value.to(kind),
        _mask(key_positions),
        _grouped(bias, query, key),
    )
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=kind)
    grad_sinks = q.new_zeros(q.shape[1])
    for rows in _blocks(query, key):
        part = None if added is None else added[:, :, :, rows]
        g = attend_backward(
            grad_out[:, :, rows].to(kind), None, q[:, :, rows], k, v, mask, part, sink_logits, scale, softcap
        )
        grad_q[:, :, rows] = g.query
        grad_k += g.key
        grad_v += g.value
        if grad_bias is not None:
            # A bias of one row serves every block; any other has the block's own rows.
            own = grad_bias if bias is None or bias.dim() < 2 or bias.shape[-2] == 1 else grad_bias[..., rows, :]
            own += g.scores.flatten(1, 2).sum_to_size(own.shape)
        if g.sink_logits is not None:
            grad_sinks += g.sink_logits
    return (
        cast_like(grad_q, query),
        cast_like(grad_k, key),
        cast_like(grad_v, value),
        cast_like(grad_bias, bias),
        cast_like(grad_sinks, sink_logits),
    )

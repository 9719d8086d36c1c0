"""``memc::window_memory`` in torch: blocks of queries against the few keys they can see, cost per token flat in T."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type, cast_like, put, take
from memc.kernels.softmax import alibi, alibi_backward, attend, attend_backward
from memc.kernels.window_memory.layout import Block, Layout, blocks, lay_out


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    window: int,
    sinks: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::window_memory``; arguments and results as its dialect page has them."""
    layout = lay_out(positions, past_positions, window, sinks)
    kind = accumulation_type(query)
    all_key = torch.cat([past_key, layout.arrange(key)], 2)
    all_value = torch.cat([past_value, layout.arrange(value)], 2)
    q, k, v = layout.arrange(query).to(kind), all_key.to(kind), all_value.to(kind)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = q.new_empty(query.shape[:3])
    for b in blocks(layout):
        rows = slice(b.start, b.stop)
        bias = alibi(slopes, b.distance, key.shape[1])
        out[:, :, rows], lse[:, :, rows] = attend(
            q[:, :, rows], layout.keys(k, b), layout.keys(v, b), b.mask, bias, sink_logits, scale, softcap
        )
    lse.masked_fill_((layout.positions < 0)[:, None], 0)
    everything = torch.cat([past_positions, layout.positions], 1)[:, None, :, None]
    next_positions = take(everything, layout.ring)[:, 0, :, 0].masked_fill(layout.ring < 0, -1)
    return (
        layout.restore(out),
        layout.restore(lse[..., None])[..., 0].contiguous(),
        layout.restore(take(all_key, layout.left)),
        layout.restore(take(all_value, layout.left)),
        layout.restore_rows(torch.where(layout.left >= 0, layout.positions - window, -1)),
        take(all_key, layout.ring),
        take(all_value, layout.ring),
        next_positions,
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_left_key: Tensor,
    grad_left_value: Tensor,
    grad_next_key: Tensor,
    grad_next_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    slopes: Tensor | None = None,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    window: int,
    sinks: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    layout = lay_out(positions, past_positions, window, sinks)
    kind = accumulation_type(query)
    slots, size = window + sinks, window + sinks + key.shape[2]
    q = layout.arrange(query).to(kind)
    k = torch.cat([past_key, layout.arrange(key)], 2).to(kind)
    v = torch.cat([past_value, layout.arrange(value)], 2).to(kind)
    grad = layout.arrange(grad_out).to(kind)
    row_grad = layout.arrange(grad_lse[..., None])[..., 0].to(kind).masked_fill((layout.positions < 0)[:, None], 0)
    grad_q = torch.empty_like(q)
    # Tokens that left and slots of the next state are copies: their gradients go to where they were copied from.
    grad_k = put(layout.arrange(grad_left_key).to(kind), layout.left, size)
    grad_k += put(grad_next_key.to(kind), layout.ring, size)
    grad_v = put(layout.arrange(grad_left_value).to(kind), layout.left, size)
    grad_v += put(grad_next_value.to(kind), layout.ring, size)
    grad_slopes, grad_sinks = q.new_zeros(q.shape[1]), q.new_zeros(q.shape[1])
    for b in blocks(layout):
        rows = slice(b.start, b.stop)
        bias = alibi(slopes, b.distance, key.shape[1])
        keys, values = layout.keys(k, b), layout.keys(v, b)
        g = attend_backward(
            grad[:, :, rows],
            row_grad[:, :, rows],
            q[:, :, rows],
            keys,
            values,
            b.mask,
            bias,
            sink_logits,
            scale,
            softcap,
        )
        grad_q[:, :, rows] = g.query
        _add_keys(grad_k, g.key, layout, b)
        _add_keys(grad_v, g.value, layout, b)
        if slopes is not None:
            grad_slopes += alibi_backward(g.scores, b.distance)
        if g.sink_logits is not None:
            grad_sinks += g.sink_logits
    return (
        cast_like(layout.restore(grad_q), query),
        cast_like(layout.restore(grad_k[:, :, slots:]), key),
        cast_like(layout.restore(grad_v[:, :, slots:]), value),
        cast_like(grad_k[:, :, :slots], past_key),
        cast_like(grad_v[:, :, :slots], past_value),
        cast_like(grad_slopes, slopes),
        cast_like(grad_sinks, sink_logits),
    )


def _add_keys(total: Tensor, gradient: Tensor, layout: Layout, block: Block) -> None:
    """Add a block's gradient to where :meth:`Layout.keys` took its keys from."""
    first = layout.window + layout.sinks
    own = block.stop - block.low
    total[:, :, : block.slots] += gradient[:, :, : block.slots]
    total[:, :, first + block.low : first + block.stop] += gradient[:, :, gradient.shape[2] - own :]
    if block.sink_index is not None:
        middle = gradient[:, :, block.slots : gradient.shape[2] - own]
        total += put(middle, block.sink_index, total.shape[2])

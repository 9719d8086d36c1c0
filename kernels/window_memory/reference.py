"""``memc::window_memory`` in torch: blocks of queries against the few keys they can see, cost per token flat in T."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.window_memory import WindowMemory
from memc.kernels.common import accumulation_type, put, take
from memc.kernels.softmax import alibi, alibi_backward, attend, attend_backward
from memc.kernels.window_memory.layout import Block, Layout, blocks, lay_out


def forward(args: WindowMemory) -> tuple[Tensor, ...]:
    """Run ``memc::window_memory``; arguments and results as its dialect page has them."""
    layout = lay_out(args.positions, args.past_positions, args.window, args.sinks)
    kind = accumulation_type(args.query)
    all_key = torch.cat([args.past_key, layout.arrange(args.key)], 2)
    all_value = torch.cat([args.past_value, layout.arrange(args.value)], 2)
    q, k, v = layout.arrange(args.query).to(kind), all_key.to(kind), all_value.to(kind)
    out = args.query.new_empty(*args.query.shape[:3], args.value.shape[3])
    lse = q.new_empty(q.shape[:3])
    for b in blocks(layout):
        rows = slice(b.start, b.stop)
        bias = alibi(args.slopes, b.distance, k.shape[1])
        read = (q[:, :, rows], layout.keys(k, b), layout.keys(v, b), b.mask, bias)
        out[:, :, rows], lse[:, :, rows] = attend(*read, args.sink_logits, args.scale, args.softcap)
    lse.masked_fill_((layout.positions < 0)[:, None], 0)
    everything = torch.cat([args.past_positions, layout.positions], 1)[:, None, :, None]
    next_positions = take(everything, layout.ring)[:, 0, :, 0].masked_fill(layout.ring < 0, -1)
    return (
        layout.restore(out),
        layout.restore(lse[..., None])[..., 0].contiguous(),
        layout.restore(take(all_key, layout.left)),
        layout.restore(take(all_value, layout.left)),
        layout.restore_rows(torch.where(layout.left >= 0, layout.positions - args.window, -1)),
        take(all_key, layout.ring),
        take(all_value, layout.ring),
        next_positions,
    )


def backward(args: WindowMemory, out: Tensor, lse: Tensor, *copies: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits.

    ``copies`` are those of keys and values that left, and of the next ones.
    """
    layout = lay_out(args.positions, args.past_positions, args.window, args.sinks)
    kind, slots = accumulation_type(args.query), args.window + args.sinks
    q = layout.arrange(args.query).to(kind)
    k = torch.cat([args.past_key, layout.arrange(args.key)], 2).to(kind)
    v = torch.cat([args.past_value, layout.arrange(args.value)], 2).to(kind)
    grad = layout.arrange(out).to(kind)
    row_grad = layout.arrange(lse[..., None])[..., 0].to(kind).masked_fill((layout.positions < 0)[:, None], 0)
    grad_q = torch.empty_like(q)
    # Tokens that left and slots of the next state are copies: their gradients go to where they were copied from.
    grad_k, grad_v = (
        put(layout.arrange(gone).to(kind), layout.left, k.shape[2]) + put(kept.to(kind), layout.ring, k.shape[2])
        for gone, kept in zip(copies[:2], copies[2:], strict=True)
    )
    grad_slopes, grad_sinks = q.new_zeros(q.shape[1]), q.new_zeros(q.shape[1])
    for b in blocks(layout):
        rows = slice(b.start, b.stop)
        bias = alibi(args.slopes, b.distance, k.shape[1])
        read = (q[:, :, rows], layout.keys(k, b), layout.keys(v, b), b.mask, bias)
        g = attend_backward(grad[:, :, rows], row_grad[:, :, rows], *read, args.sink_logits, args.scale, args.softcap)
        grad_q[:, :, rows] = g.query
        _add_keys(grad_k, g.key, layout, b)
        _add_keys(grad_v, g.value, layout, b)
        if args.slopes is not None:
            grad_slopes += alibi_backward(g.scores, b.distance)
        if g.sink_logits is not None:
            grad_sinks += g.sink_logits
    return (
        layout.restore(grad_q),
        layout.restore(grad_k[:, :, slots:]),
        layout.restore(grad_v[:, :, slots:]),
        grad_k[:, :, :slots],
        grad_v[:, :, :slots],
        grad_slopes,
        grad_sinks,
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

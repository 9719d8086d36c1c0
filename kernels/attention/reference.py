"""``memc::attention`` in torch: query blocks against the keys held so far, memory bounded by the block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.attention import Attention
from memc.kernels.common import accumulation_type, held_positions, segments
from memc.kernels.softmax import alibi, alibi_backward, attend, attend_backward

# Most scores that one block of queries makes at once: 4 MB in float32, which a core's cache holds.
BLOCK_SCORES = 1 << 20
BLOCK_QUERIES = 64
"""Most queries of a block: the more they are, the more scores are made only to be masked."""


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``stop`` of a call, and the first ``held`` keys of the state with this call appended."""

    start: int
    stop: int
    held: int
    mask: Tensor
    distance: Tensor


def readable(query: Tensor, key: Tensor, same_sequence: Tensor, args: Attention) -> Tensor:
    """Return the mask ``[B,T,S]`` of keys at positions ``key [B,S]`` that queries at ``query [B,T]`` read."""
    p, j = query[:, :, None], key[:, None, :]
    mask = j <= p
    if args.window:
        mask = mask & (p - j < args.window)
    if args.chunk:
        mask = mask & (p // args.chunk == j // args.chunk)
    if args.prefix:
        mask = mask | ((p < args.prefix) & (j < args.prefix))
    return mask & (j >= 0) & (p >= 0) & same_sequence


def blocks(args: Attention) -> Iterator[Block]:
    """Cut the queries of a call into blocks whose scores fit ``BLOCK_SCORES``."""
    (batch, heads, tokens, _), past = args.query.shape, args.past_positions.shape[1]
    all_positions = torch.cat([args.past_positions, args.positions], 1)
    query_segments = segments(args.positions)
    all_segments = torch.cat([torch.zeros_like(args.past_positions), query_segments], 1)
    size = max(1, min(tokens, BLOCK_QUERIES, BLOCK_SCORES // max(1, batch * heads * (past + tokens))))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        held = past + (tokens if args.prefix else stop)
        query, key = args.positions[:, start:stop], all_positions[:, :held]
        same = query_segments[:, start:stop, None] == all_segments[:, None, :held]
        mask = readable(query, key, same, args)
        yield Block(start, stop, held, mask[:, None, None], key[:, None, :] - query[:, :, None])


def forward(args: Attention) -> tuple[Tensor, ...]:
    """Run ``memc::attention``; arguments and results as its dialect page has them."""
    kind = accumulation_type(args.query)
    next_key, next_value = torch.cat([args.past_key, args.key], 2), torch.cat([args.past_value, args.value], 2)
    q, k, v = args.query.to(kind), next_key.to(kind), next_value.to(kind)
    out = args.query.new_empty(*args.query.shape[:3], args.value.shape[3])
    for b in blocks(args):
        rows = slice(b.start, b.stop)
        bias = alibi(args.slopes, b.distance, k.shape[1])
        keys, values = k[:, :, : b.held], v[:, :, : b.held]
        read = (q[:, :, rows], keys, values, b.mask, bias, args.sink_logits, args.scale, args.softcap)
        out[:, :, rows], _ = attend(*read)
    return out, next_key, next_value, held_positions(args.past_positions, args.positions)


def backward(
    args: Attention, grad_out: Tensor, grad_next_key: Tensor, grad_next_value: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    kind, past = accumulation_type(args.query), args.past_key.shape[2]
    q, grad = args.query.to(kind), grad_out.to(kind)
    k = torch.cat([args.past_key, args.key], 2).to(kind)
    v = torch.cat([args.past_value, args.value], 2).to(kind)
    grad_q, grad_k, grad_v = torch.empty_like(q), grad_next_key.to(kind, copy=True), grad_next_value.to(kind, copy=True)
    grad_slopes, grad_sinks = q.new_zeros(q.shape[1]), q.new_zeros(q.shape[1])
    for b in blocks(args):
        rows = slice(b.start, b.stop)
        bias = alibi(args.slopes, b.distance, k.shape[1])
        keys, values = k[:, :, : b.held], v[:, :, : b.held]
        read = (q[:, :, rows], keys, values, b.mask, bias, args.sink_logits, args.scale, args.softcap)
        g = attend_backward(grad[:, :, rows], None, *read)
        grad_q[:, :, rows] = g.query
        grad_k[:, :, : b.held] += g.key
        grad_v[:, :, : b.held] += g.value
        if args.slopes is not None:
            grad_slopes += alibi_backward(g.scores, b.distance)
        if g.sink_logits is not None:
            grad_sinks += g.sink_logits
    return (
        grad_q,
        grad_k[:, :, past:],
        grad_v[:, :, past:],
        grad_k[:, :, :past],
        grad_v[:, :, :past],
        grad_slopes,
        grad_sinks,
    )

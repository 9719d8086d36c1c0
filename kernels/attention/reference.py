"""``memc::attention`` in torch: query blocks against the keys held so far, memory bounded by the block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type, cast_like, held_positions, segments
from memc.kernels.softmax import alibi, alibi_backward, attend, attend_backward

# Most scores that one block of queries makes at once: 4 MB in float32, which a core's cache holds.
BLOCK_SCORES = 1 << 20
BLOCK_QUERIES = 64
"""Most queries of a block: the more they are, the more scores are made only to be masked."""


@dataclass(frozen=True)
class Rule:
    """Who reads whom, and how scores are made; fields as the op's arguments."""

    scale: float
    window: int
    chunk: int
    prefix: int
    softcap: float


@dataclass(frozen=True)
class Block:
    """Queries ``start`` to ``stop`` of a call, and the first ``held`` keys of the state with this call appended."""

    start: int
    stop: int
    held: int
    mask: Tensor
    distance: Tensor


def readable(query: Tensor, key: Tensor, same_sequence: Tensor, rule: Rule) -> Tensor:
    """Return the mask ``[B,T,S]`` of keys at positions ``key [B,S]`` that queries at ``query [B,T]`` read."""
    p, j = query[:, :, None], key[:, None, :]
    mask = j <= p
    if rule.window:
        mask = mask & (p - j < rule.window)
    if rule.chunk:
        mask = mask & (p // rule.chunk == j // rule.chunk)
    if rule.prefix:
        mask = mask | ((p < rule.prefix) & (j < rule.prefix))
    return mask & (j >= 0) & (p >= 0) & same_sequence


def blocks(heads: int, positions: Tensor, past_positions: Tensor, rule: Rule) -> Iterator[Block]:
    """Cut the queries of a call into blocks whose scores fit ``BLOCK_SCORES``."""
    batch, tokens = positions.shape
    past = past_positions.shape[1]
    all_positions = torch.cat([past_positions, positions], 1)
    query_segments = segments(positions)
    all_segments = torch.cat([torch.zeros_like(past_positions), query_segments], 1)
    size = max(1, min(tokens, BLOCK_QUERIES, BLOCK_SCORES // max(1, batch * heads * (past + tokens))))
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        held = past + (tokens if rule.prefix else stop)
        query, key = positions[:, start:stop], all_positions[:, :held]
        same = query_segments[:, start:stop, None] == all_segments[:, None, :held]
        mask = readable(query, key, same, rule)
        yield Block(start, stop, held, mask[:, None, None], key[:, None, :] - query[:, :, None])


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
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::attention``; arguments and results as its dialect page has them."""
    rule = Rule(scale, window, chunk, prefix, softcap)
    kind = accumulation_type(query)
    next_key, next_value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    q, k, v = query.to(kind), next_key.to(kind), next_value.to(kind)
    out = query.new_empty(*query.shape[:3], value.shape[3])
    for b in blocks(query.shape[1], positions, past_positions, rule):
        bias = alibi(slopes, b.distance, key.shape[1])
        part, _ = attend(
            q[:, :, b.start : b.stop], k[:, :, : b.held], v[:, :, : b.held], b.mask, bias, sink_logits, scale, softcap
        )
        out[:, :, b.start : b.stop] = part
    return out, next_key, next_value, held_positions(past_positions, positions)


def backward(
    grad_out: Tensor,
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
    window: int = 0,
    chunk: int = 0,
    prefix: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, past_key, past_value, slopes and sink_logits."""
    rule = Rule(scale, window, chunk, prefix, softcap)
    kind = accumulation_type(query)
    past = past_key.shape[2]
    q, grad = query.to(kind), grad_out.to(kind)
    k, v = torch.cat([past_key, key], 2).to(kind), torch.cat([past_value, value], 2).to(kind)
    grad_q, grad_k, grad_v = torch.empty_like(q), grad_next_key.to(kind, copy=True), grad_next_value.to(kind, copy=True)
    grad_slopes, grad_sinks = q.new_zeros(q.shape[1]), q.new_zeros(q.shape[1])
    for b in blocks(query.shape[1], positions, past_positions, rule):
        bias = alibi(slopes, b.distance, key.shape[1])
        rows = slice(b.start, b.stop)
        keys, values = k[:, :, : b.held], v[:, :, : b.held]
        g = attend_backward(
            grad[:, :, rows], None, q[:, :, rows], keys, values, b.mask, bias, sink_logits, scale, softcap
        )
        grad_q[:, :, rows] = g.query
        grad_k[:, :, : b.held] += g.key
        grad_v[:, :, : b.held] += g.value
        if slopes is not None:
            grad_slopes += alibi_backward(g.scores, b.distance)
        if g.sink_logits is not None:
            grad_sinks += g.sink_logits
    return (
        cast_like(grad_q, query),
        cast_like(grad_k[:, :, past:], key),
        cast_like(grad_v[:, :, past:], value),
        cast_like(grad_k[:, :, :past], past_key),
        cast_like(grad_v[:, :, :past], past_value),
        cast_like(grad_slopes, slopes),
        cast_like(grad_sinks, sink_logits),
    )

"""``memc::full_attention`` in torch: query blocks against every key, memory bounded by the block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from memc.dialect.full_attention import FullAttention
from memc.kernels.common import accumulation_type
from memc.kernels.softmax import attend, attend_backward

# Most scores that one block of queries makes at once: 4 MB in float32, which a core's cache holds.
BLOCK_SCORES = 1 << 20


def _blocks(args: FullAttention) -> Iterator[slice]:
    batch, heads, tokens, _ = args.query.shape
    size = max(1, BLOCK_SCORES // max(1, batch * heads * args.key.shape[2]))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _bias(args: FullAttention) -> Tensor | None:
    """View the bias as ``[B,G,R,T,S]`` without copying it."""
    if args.bias is None:
        return None
    batch, heads, tokens, _ = args.query.shape
    _, groups, keys, _ = args.key.shape
    return args.bias.expand(batch, heads, tokens, keys).view(batch, groups, heads // groups, tokens, -1)


def _mask(args: FullAttention) -> Tensor | None:
    return None if args.key_positions is None else (args.key_positions >= 0)[:, None, None, None, :]


def forward(args: FullAttention) -> Tensor:
    """Run ``memc::full_attention``; arguments and results as its dialect page has them."""
    kind, mask, added = accumulation_type(args.query), _mask(args), _bias(args)
    q, k, v = args.query.to(kind), args.key.to(kind), args.value.to(kind)
    out = args.query.new_empty(*args.query.shape[:3], args.value.shape[3])
    for rows in _blocks(args):
        part = None if added is None else added[:, :, :, rows]
        out[:, :, rows] = attend(q[:, :, rows], k, v, mask, part, args.sink_logits, args.scale, args.softcap)[0]
    return out


def backward(args: FullAttention, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, bias and sink_logits."""
    kind, mask, added, bias = accumulation_type(args.query), _mask(args), _bias(args), args.bias
    q, k, v, grad = args.query.to(kind), args.key.to(kind), args.value.to(kind), grad_out.to(kind)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_bias = None if bias is None else bias.new_zeros(bias.shape, dtype=kind)
    grad_sinks = q.new_zeros(q.shape[1])
    for rows in _blocks(args):
        part = None if added is None else added[:, :, :, rows]
        read = (q[:, :, rows], k, v, mask, part, args.sink_logits, args.scale, args.softcap)
        g = attend_backward(grad[:, :, rows], None, *read)
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
        grad_q,
        grad_k,
        grad_v,
        grad_bias,
        grad_sinks,
    )

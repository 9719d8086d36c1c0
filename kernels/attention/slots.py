"""``memc::attention_``: attention over a state that lies in buffers of slots, where slot p holds the token at p."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.attention import Attention
from memc.kernels.attention.reference import BLOCK_SCORES, readable
from memc.kernels.common import accumulation_type
from memc.kernels.softmax import alibi, attend


def write(
    positions: Tensor,
    tensors: tuple[tuple[Tensor, Tensor], ...],
    past_positions: Tensor,
) -> None:
    """Write a call's tokens into the slots of their ``positions [B,T]``, padding into the last one.

    ``tensors`` pairs what is new ``[B,G,T,D]`` with its buffer ``[B,G,S,D]``. A sequence start empties the row's
    ``past_positions [B,S]`` first. Nothing is read back by the host.
    """
    last = past_positions.shape[1] - 1
    slot = torch.where(positions >= 0, positions, last)
    for new, buffer in tensors:
        batch, groups, tokens, size = new.shape
        buffer.scatter_(2, slot[:, None, :, None].expand(batch, groups, tokens, size), new)
    past_positions.masked_fill_((positions == 0).any(1, keepdim=True), -1)
    past_positions.scatter_(1, slot, positions)


def forward(args: Attention) -> Tensor:
    """Run ``memc::attention`` on buffers ``past_key [B,G,S,D]``, ``past_value [B,G,S,E]``, ``past_positions [B,S]``.

    S is one more than the most tokens of a sequence; the last slot takes the padding. The tokens of a row are of one
    sequence, which starts with the call's first token that is no padding or goes on.
    """
    write(args.positions, ((args.key, args.past_key), (args.value, args.past_value)), args.past_positions)
    kind = accumulation_type(args.query)
    q, k, v = args.query.to(kind), args.past_key.to(kind), args.past_value.to(kind)
    out = args.query.new_empty(*args.query.shape[:3], args.value.shape[3])
    size = max(1, BLOCK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    same = torch.ones(1, 1, 1, dtype=torch.bool, device=q.device)
    for start in range(0, q.shape[2], size):
        rows = slice(start, start + size)
        at = args.positions[:, rows]
        mask = readable(at, args.past_positions, same, args)[:, None, None]
        bias = alibi(args.slopes, args.past_positions[:, None, :] - at[:, :, None], k.shape[1])
        out[:, :, rows], _ = attend(q[:, :, rows], k, v, mask, bias, args.sink_logits, args.scale, args.softcap)
    return out

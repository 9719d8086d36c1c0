"""``memc::sparse_attention_``: over a state that lies in buffers of slots, where slot p holds the token at p."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from memc.dialect.sparse_attention import SparseAttention
from memc.kernels.attention.slots import write
from memc.kernels.common import accumulation_type, take
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.reference import Sequence, attend_chosen, describe_pages, grouped, readable


def forward(args: SparseAttention) -> tuple[Tensor, Tensor]:
    """Run ``memc::sparse_attention`` on buffers: keys, values and positions as ``memc::attention_`` has them.

    ``past_pages [B,G,ceil(S/piece),...]`` describes the pages of S slots, the last of which takes the padding. The
    tokens of a row are of one sequence.
    """
    rule = Rule.of(args)
    held = (args.past_positions.amax(1) + 1).masked_fill((args.positions == 0).any(1), 0)
    write(args.positions, ((args.key, args.past_key), (args.value, args.past_value)), args.past_positions)
    index = torch.arange(args.past_positions.shape[1], device=args.positions.device)
    room = args.positions.new_full((len(args.positions), args.past_pages.shape[2] * rule.piece - len(index)), -1)
    place = torch.cat([torch.where(args.past_positions >= 0, index, -1), room], 1)
    sequence = Sequence(args.positions >= 0, place, held, args.past_positions.amax(1) + 1)
    kind = accumulation_type(args.query)
    q, keys, values = args.query.to(kind), take(args.past_key, place).to(kind), take(args.past_value, place).to(kind)
    pages = describe_pages(keys, args.past_pages, sequence, rule.method, rule.page)
    args.past_pages.copy_(pages)
    out, lse = args.query.new_zeros(*args.query.shape[:3], args.value.shape[3]), q.new_zeros(args.query.shape[:3])
    mask = partial(readable, q, keys, pages, args.positions, sequence, rule, args.events)
    through = partial(grouped, args.positions, sequence, rule)
    attend_chosen(out, lse, q, keys, values, sequence, mask, args.sink_logits, args.scale, args.softcap, through)
    return out, lse

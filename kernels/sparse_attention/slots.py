"""``memc::sparse_attention_``: over a state that lies in buffers of slots, where slot p holds the token at p."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from memc.kernels.attention.slots import write
from memc.kernels.common import accumulation_type, take
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.reference import Sequence, attend_chosen, describe_pages, grouped, readable


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    rerank: int = 1,
    dense_below: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run ``memc::sparse_attention`` on buffers: keys, values and positions as ``memc::attention_`` has them.

    ``past_pages [B,G,ceil(S/page),...]`` describes the pages of S slots, the last of which takes the padding. The
    tokens of a row are of one sequence.
    """
    rule = Rule(scale=scale, rerank=rerank, dense_below=dense_below, **options)
    held = (past_positions.amax(1) + 1).masked_fill((positions == 0).any(1), 0)
    write(positions, ((key, past_key), (value, past_value)), past_positions)
    index = torch.arange(past_positions.shape[1], device=positions.device)
    room = positions.new_full((len(positions), past_pages.shape[2] * rule.page - len(index)), -1)
    place = torch.cat([torch.where(past_positions >= 0, index, -1), room], 1)
    sequence = Sequence(positions >= 0, place, held, past_positions.amax(1) + 1)
    kind = accumulation_type(query)
    q, keys, values = query.to(kind), take(past_key, place).to(kind), take(past_value, place).to(kind)
    pages = describe_pages(keys, past_pages, sequence, rule.method, rule.page)
    past_pages.copy_(pages)
    out, lse = query.new_zeros(*query.shape[:3], value.shape[3]), q.new_zeros(query.shape[:3])
    mask = partial(readable, q, keys, pages, positions, sequence, rule)
    through = partial(grouped, positions, sequence, rule)
    attend_chosen(out, lse, q, keys, values, sequence, mask, sink_logits, scale, softcap, through)
    return out, lse

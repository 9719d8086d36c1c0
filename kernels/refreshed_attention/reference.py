"""``memc::refreshed_attention`` in torch: blocks of queries, each with a mask of what their turn's choice holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type, held_positions, segments
from memc.kernels.refreshed_attention.choose import Choices
from memc.kernels.sparse_attention.choose import Rule, narrowed
from memc.kernels.sparse_attention.reference import (
    Call,
    Reads,
    Sequence,
    attend_chosen,
    gradients,
    grouped,
    lay_out,
)


@dataclass(frozen=True)
class Chosen:
    """One sequence of a call, the descriptions of its pages, and the choices of its tokens."""

    sequence: Sequence
    keys: Tensor
    values: Tensor
    pages: Tensor
    choices: Choices

    def readable(self, query: Tensor, positions: Tensor, rule: Rule, rows: slice) -> Tensor:
        """Return the mask ``[B,G,1,T,L]`` of what a block of a call's queries ``[B,H,.,D]``, times the scale, reads."""
        mine = self.sequence.mine[:, rows]
        at = torch.where(mine, positions[:, rows], -1)
        taken = self.choices.candidates(rows, at, self.keys.shape[2] // rule.unit, rule)
        tokens = narrowed(query[:, :, rows], self.keys, taken, at, rule)
        return (tokens & mine[:, None, :, None] & (self.sequence.place >= 0)[:, None, None])[:, :, None]


def sequences(
    call: Call, query: Tensor, positions: Tensor, pages: Tensor, choice: Tensor, rule: Rule
) -> Iterator[Chosen]:
    """Yield the sequences of a call; ``query`` is in the type of accumulation and times the scale."""
    none = torch.full_like(choice, -1)
    for number, found in enumerate(call.contents(pages, rule.method, rule.page, query.dtype)):
        sequence, keys, _, described = found
        past = none if number else choice
        choices = Choices.of(query, described, positions, sequence, past, keys.shape[2], rule)
        yield Chosen(*found, choices)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    past_choice: Tensor,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    rerank: int = 1,
    dense_below: int = 0,
    softcap: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run ``memc::refreshed_attention``; arguments and results as its dialect page has them."""
    rule = Rule(scale=scale, rerank=rerank, dense_below=dense_below, **options)
    call = lay_out(key, value, positions, past_key, past_value, past_positions, rule.page)
    q = query.to(accumulation_type(query))
    asking = q * scale
    out, lse = query.new_zeros(*query.shape[:3], value.shape[3]), q.new_zeros(query.shape[:3])
    count = -(-call.key.shape[2] // rule.page)
    next_pages = past_pages.new_zeros(*key.shape[:2], count, *past_pages.shape[3:])
    next_choice = past_choice.clone()
    current = segments(positions)[:, -1]
    for number, one in enumerate(sequences(call, asking, positions, past_pages, past_choice, rule)):
        last = current == number
        pages = one.pages.to(past_pages.dtype)
        next_pages = torch.where(last.view(-1, *[1] * (pages.dim() - 1)), pages, next_pages)
        next_choice = torch.where(last[:, None, None], one.choices.last(one.sequence.mine), next_choice)
        mask = partial(one.readable, asking, positions, rule)
        through = partial(grouped, positions, one.sequence, rule)
        attend_chosen(out, lse, q, one.keys, one.values, one.sequence, mask, sink_logits, scale, softcap, through)
    return out, lse, call.key, call.value, held_positions(past_positions, positions), next_pages, next_choice


def backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    grad_next_key: Tensor,
    grad_next_value: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_positions: Tensor,
    past_pages: Tensor,
    past_choice: Tensor,
    sink_logits: Tensor | None = None,
    *,
    scale: float,
    rerank: int = 1,
    dense_below: int = 0,
    softcap: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, past_key, past_value and sink_logits for the tokens chosen."""
    rule = Rule(scale=scale, rerank=rerank, dense_below=dense_below, **options)
    call = lay_out(key, value, positions, past_key, past_value, past_positions, rule.page)
    asking = query.to(accumulation_type(query)) * scale
    reads = (
        Reads(
            one.sequence,
            one.keys,
            one.values,
            partial(one.readable, asking, positions, rule),
            partial(grouped, positions, one.sequence, rule),
        )
        for one in sequences(call, asking, positions, past_pages, past_choice, rule)
    )
    grads, inputs = (grad_out, grad_lse, grad_next_key, grad_next_value), (query, key, value, past_key, past_value)
    return gradients(grads, inputs, reads, sink_logits, scale, softcap)

"""``memc::refreshed_attention`` in torch: blocks of queries, each with a mask of what their turn's choice holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memc.dialect.refreshed_attention import RefreshedAttention
from memc.dialect.sparse_attention import pages_of
from memc.kernels.common import accumulation_type, held_positions, segments
from memc.kernels.refreshed_attention.choose import Choices
from memc.kernels.sparse_attention.choose import Rule, narrowed
from memc.kernels.sparse_attention.reference import (
    Appended,
    Reads,
    Sequence,
    attend_chosen,
    gradients,
    grouped,
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


def sequences(args: RefreshedAttention, call: Appended, query: Tensor, rule: Rule) -> Iterator[Chosen]:
    """Yield the sequences of a call; ``query`` is in the type of accumulation and times the scale."""
    none = torch.full_like(args.past_choice, -1)
    for number, found in enumerate(call.contents(args, query.dtype)):
        sequence, keys, _, described = found
        past = none if number else args.past_choice
        yield Chosen(*found, Choices.of(query, described, args.positions, sequence, past, keys.shape[2], rule))


def forward(args: RefreshedAttention) -> tuple[Tensor, ...]:
    """Run ``memc::refreshed_attention``; arguments and results as its dialect page has them."""
    rule, call, past = Rule.of(args), Appended.of(args), args.past_pages
    q = args.query.to(accumulation_type(args.query))
    asking = q * args.scale
    out, lse = args.query.new_zeros(*q.shape[:3], args.value.shape[3]), q.new_zeros(q.shape[:3])
    count = pages_of(call.key.shape[2], rule.piece)
    next_pages = past.new_zeros(*args.key.shape[:2], count, *past.shape[3:])
    next_choice = args.past_choice.clone()
    current = segments(args.positions)[:, -1]
    for number, one in enumerate(sequences(args, call, asking, rule)):
        last, pages = current == number, one.pages.to(past.dtype)
        next_pages = torch.where(last.view(-1, *[1] * (pages.dim() - 1)), pages, next_pages)
        next_choice = torch.where(last[:, None, None], one.choices.last(one.sequence.mine), next_choice)
        read = (one.keys, one.values, one.sequence, partial(one.readable, asking, args.positions, rule))
        through = partial(grouped, args.positions, one.sequence, rule)
        attend_chosen(out, lse, q, *read, args.sink_logits, args.scale, args.softcap, through)
    held = held_positions(args.past_positions, args.positions)
    return out, lse, call.key, call.value, held, next_pages, next_choice


def backward(
    args: RefreshedAttention, out: Tensor, lse: Tensor, next_key: Tensor, next_value: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value and sink_logits for the tokens chosen."""
    rule = Rule.of(args)
    asking = args.query.to(accumulation_type(args.query)) * args.scale
    reads = (
        Reads(
            one.sequence,
            one.keys,
            one.values,
            partial(one.readable, asking, args.positions, rule),
            partial(grouped, args.positions, one.sequence, rule),
        )
        for one in sequences(args, Appended.of(args), asking, rule)
    )
    return gradients(args, (out, lse, next_key, next_value), reads)

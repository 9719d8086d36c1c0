"""``memc::quantised_attention`` in torch: everything is decoded, then blocks of queries with masks of what they read.

Each sequence is one row of 2 L keys and values: those of the L positions through their codes, then as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memc.dialect.quantised_attention import QuantisedAttention
from memc.dialect.sparse_attention import pages_of
from memc.kernels.common import accumulation_type, held_positions, put, segments, take
from memc.kernels.quantised_attention.codes import decode, encode
from memc.kernels.softmax import attend_backward
from memc.kernels.sparse_attention.choose import Rule, chosen
from memc.kernels.sparse_attention.reference import Sequence, attend_chosen, blocks, describe_pages, find_sequences


@dataclass(frozen=True)
class Contents:
    """One sequence of every row of a call.

    ``exact_place [B,L]`` says where the token at each position is in the tail with the call appended, -1 for none;
    ``keys``, ``values [B,G,2L,.]`` are what may be read, ``codes [B,G,P,page,.]`` and ``pages [B,G,P,2D]`` what is
    held of complete pages.
    """

    sequence: Sequence
    exact_place: Tensor
    keys: Tensor
    values: Tensor
    codes: Tensor
    pages: Tensor

    @property
    def length(self) -> int:
        """Positions that there is room for."""
        return self.exact_place.shape[1]

    def readable(self, query: Tensor, positions: Tensor, rule: Rule, rows: slice) -> Tensor:
        """Return the mask ``[B,G,1,T,2L]`` of what a block of a call's queries ``[B,H,.,D]`` reads."""
        mine = self.sequence.mine[:, rows]
        at = torch.where(mine, positions[:, rows], -1)
        keys = self.keys[:, :, : self.length]
        tokens = chosen(query[:, :, rows], keys, self.pages, at, rule) & mine[:, None, :, None]
        own = torch.arange(self.length, device=at.device) // rule.page == at[:, None, :, None] // rule.page
        return torch.cat([tokens & ~own, tokens & own], -1)[:, :, None]


@dataclass(frozen=True)
class Appended:
    """Keys and values of a call behind those of the tails, its values' codes and ranges behind those held."""

    key: Tensor
    value: Tensor
    codes: Tensor
    ranges: Tensor
    found: tuple[tuple[Sequence, Sequence], ...]

    @classmethod
    def of(cls, args: QuantisedAttention) -> Appended:
        """Append a call to the state and find the tokens of each of its sequences."""
        page = args.page
        length = pages_of(args.past_positions.shape[1] + args.positions.shape[1], page) * page
        everything = find_sequences(args.positions, args.past_positions, length)
        held = everything[0].held[:, None]
        slot = torch.arange(page, device=args.positions.device)
        in_tail = torch.where(slot < held % page, held // page * page + slot, -1)
        exact = find_sequences(args.positions, in_tail, length)
        fresh = torch.stack([args.value.amax(-1), args.value.amin(-1)], -1)
        kind = accumulation_type(args.value)
        codes = encode(args.value.to(kind), *_ends(fresh.to(kind)), args.bits)
        return cls(
            torch.cat([args.past_key_tail, args.key], 2),
            torch.cat([args.past_value_tail, args.value], 2),
            torch.cat([args.past_value, codes], 2),
            torch.cat([args.past_ranges, fresh], 2),
            tuple(zip(everything, exact, strict=True)),
        )

    def contents(self, args: QuantisedAttention) -> Iterator[Contents]:
        """Yield what each sequence holds, in the type of accumulation."""
        bits, page = args.bits, args.page
        kind, size = accumulation_type(self.key), self.key.shape[3]
        value_of_code = decode(self.codes, *_ends(self.ranges.to(kind)), bits, self.value.shape[3])
        for number, (sequence, exact) in enumerate(self.found):
            keys, values = (take(x, exact.place).to(kind) for x in (self.key, self.value))
            past_pages, past_codes = args.past_pages, args.past_key
            if number:
                past_pages, past_codes = past_pages[:, :, :0], past_codes[:, :, :0]
            pages = describe_pages(keys, past_pages, sequence, "bounds", page)
            count = pages.shape[2]
            top, low = (x[..., None, :] for x in pages.split(size, -1))
            codes = encode(keys.unflatten(2, (count, page)), top, low, bits)
            whole = torch.arange(count, device=keys.device)
            before, complete = (
                (whole < reached[:, None] // page)[:, None, :, None, None]
                for reached in (sequence.held, sequence.reached)
            )
            there = past_codes.shape[2]
            codes[:, :, :there] = torch.where(before[:, :, :there], past_codes, codes[:, :, :there])
            codes = codes.masked_fill(~complete, 0)
            coded = decode(codes, top, low, bits, size).flatten(2, 3)
            yield Contents(
                sequence,
                exact.place,
                torch.cat([coded, keys], 2),
                torch.cat([take(value_of_code, sequence.place), values], 2),
                codes,
                pages,
            )

    def next_tail(self, positions: Tensor, page: int) -> Tensor:
        """Return where each token ``[B,page]`` of the page that the last sequence has not completed is, -1 for none."""
        current = segments(positions)[:, -1:]
        slot = torch.arange(page, device=positions.device)
        place = torch.full_like(current, -1).expand(-1, page)
        for number, (sequence, exact) in enumerate(self.found):
            at = (sequence.reached // page * page)[:, None] + slot
            index = at.clamp_max(exact.place.shape[1] - 1)
            there = torch.where(at < sequence.reached[:, None], exact.place.gather(1, index), -1)
            place = torch.where(current == number, there, place)
        return place


def _ends(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Return largest and smallest ``[..., 1]`` of ``ranges [..., 2]``."""
    return ranges[..., :1], ranges[..., 1:]


def forward(args: QuantisedAttention) -> tuple[Tensor, ...]:
    """Run ``memc::quantised_attention``; arguments and results as its dialect page has them."""
    rule, call = Rule.of(args, method="bounds", own_page=True), Appended.of(args)
    q = args.query.to(accumulation_type(args.query))
    out, lse = args.query.new_zeros(*q.shape[:3], args.value.shape[3]), q.new_zeros(q.shape[:3])
    current = segments(args.positions)[:, -1]
    next_key, next_pages = torch.empty(0), torch.empty(0)
    for number, contents in enumerate(call.contents(args)):
        last = (current == number)[:, None, None, None]
        pages = contents.pages.to(args.past_pages.dtype)
        next_pages = torch.where(last, pages, next_pages if number else torch.zeros_like(pages))
        next_key = torch.where(last[..., None], contents.codes, next_key if number else 0 * contents.codes)
        mask = partial(contents.readable, q, args.positions, rule)
        read = (contents.keys, contents.values, contents.sequence, mask)
        attend_chosen(out, lse, q, *read, args.sink_logits, args.scale, args.softcap)
    tail = call.next_tail(args.positions, args.page)
    held = held_positions(args.past_positions, args.positions)
    tails = (take(call.key, tail), take(call.value, tail))
    return out, lse, next_key, call.codes, held, next_pages, call.ranges, *tails


def backward(
    args: QuantisedAttention, out: Tensor, lse: Tensor, key_tail: Tensor, value_tail: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, both tails and sink_logits, straight through the rounding."""
    rule, call = Rule.of(args, method="bounds", own_page=True), Appended.of(args)
    kind, page, size = accumulation_type(args.query), args.page, call.key.shape[2]
    q, grad, row_grad = (x.to(kind) for x in (args.query, out, lse))
    grad_q, grad_sinks = torch.zeros_like(q), q.new_zeros(q.shape[1])
    tail = call.next_tail(args.positions, page)
    grad_k, grad_v = (put(x.to(kind), tail, size) for x in (key_tail, value_tail))
    for contents in call.contents(args):
        placed_k, placed_v = torch.zeros_like(contents.keys), torch.zeros_like(contents.values)
        for rows in blocks(q.shape[1], contents.sequence):
            mask = contents.readable(q, args.positions, rule, rows)
            mine = contents.sequence.mine[:, None, rows]
            outer, log = grad[:, :, rows] * mine[..., None], row_grad[:, :, rows] * mine
            read = (q[:, :, rows], contents.keys, contents.values, mask, None)
            g = attend_backward(outer, log, *read, args.sink_logits, args.scale, args.softcap)
            grad_q[:, :, rows] += g.query
            placed_k += g.key
            placed_v += g.value
            if g.sink_logits is not None:
                grad_sinks += g.sink_logits
        # Rounding is passed straight through: what is read of a token goes to the token, however it was read.
        grad_k += put(sum(placed_k.split(contents.length, 2)), contents.exact_place, size)
        grad_v += put(sum(placed_v.split(contents.length, 2)), contents.exact_place, size)
    return grad_q, grad_k[:, :, page:], grad_v[:, :, page:], grad_k[:, :, :page], grad_v[:, :, :page], grad_sinks

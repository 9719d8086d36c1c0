"""``memc::sparse_attention`` in torch: blocks of queries, each with a mask of what it has chosen.

Reads every key, since it is the oracle: what is saved is what the lowered forms do not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memc.dialect.refreshed_attention import Choosing
from memc.dialect.sparse_attention import SparseAttention, described_tokens, pages_of
from memc.kernels.common import accumulation_type, held_positions, put, segments, take
from memc.kernels.softmax import attend, attend_backward
from memc.kernels.softmax_groups import Groups
from memc.kernels.sparse_attention import levels
from memc.kernels.sparse_attention.choose import Rule, chosen, describe, groups

# Most scores that one block of queries makes at once: 4 MB in float32.
BLOCK_SCORES = 1 << 20


@dataclass(frozen=True)
class Sequence:
    """One sequence of every row of a call.

    ``mine [B,T]`` are its tokens in the call, ``place [B,L]`` where the token at each position is in the state with the
    call appended, -1 for none, and ``held``, ``reached [B]`` its tokens before and after the call.
    """

    mine: Tensor
    place: Tensor
    held: Tensor
    reached: Tensor


@dataclass(frozen=True)
class Appended:
    """What forward and backward start from: keys and values with the call appended, and its sequences."""

    key: Tensor
    value: Tensor
    sequences: tuple[Sequence, ...]

    @classmethod
    def of(cls, args: Choosing) -> Appended:
        """Append the call to the state and find the place of each token of each sequence."""
        piece = described_tokens(args.method, args.page)
        length = pages_of(args.past_positions.shape[1] + args.positions.shape[1], piece) * piece
        sequences = find_sequences(args.positions, args.past_positions, length)
        return cls(torch.cat([args.past_key, args.key], 2), torch.cat([args.past_value, args.value], 2), sequences)

    def contents(self, args: Choosing, kind: torch.dtype) -> Iterator[tuple[Sequence, Tensor, Tensor, Tensor]]:
        """Yield each sequence with its keys and values by position, and the descriptions of its pages."""
        for number, sequence in enumerate(self.sequences):
            keys, values = (take(x, sequence.place).to(kind) for x in (self.key, self.value))
            past = args.past_pages if number == 0 else args.past_pages[:, :, :0]
            yield sequence, keys, values, describe_pages(keys, past, sequence, args.method, args.page)


def find_sequences(positions: Tensor, past_positions: Tensor, length: int) -> tuple[Sequence, ...]:
    """Return the sequences of a call at ``positions [B,T]`` that is appended to what is held, places up to ``length``.

    ``past_positions [B,S]`` is -1 where nothing is held.
    """
    number = segments(positions)
    numbers = torch.cat([torch.zeros_like(past_positions), number], 1)
    everything = torch.cat([past_positions, positions], 1)
    index = torch.arange(everything.shape[1], device=positions.device).expand_as(everything)
    sequences = []
    for one in range(int(number.max()) + 1):
        there = (numbers == one) & (everything >= 0)
        # Tokens of other sequences are put one place too far, which is then cut off.
        place = torch.full((positions.shape[0], length + 1), -1, device=positions.device)
        place = place.scatter(1, torch.where(there, everything, length), torch.where(there, index, -1))[:, :length]
        held = past_positions.amax(1) + 1 if one == 0 and past_positions.shape[1] else torch.zeros_like(positions[:, 0])
        reached = torch.where(there, everything, -1).amax(1) + 1
        sequences.append(Sequence((number == one) & (positions >= 0), place, held, reached))
    return tuple(sequences)


def describe_pages(keys: Tensor, past_pages: Tensor, sequence: Sequence, method: str, page: int) -> Tensor:
    """Return the descriptions ``[B,G,P,...]`` of a sequence's pages: held, completed now, 0 for the rest."""
    piece = described_tokens(method, page)
    if piece > page:
        ends = torch.arange(1, keys.shape[2] // piece + 1, device=keys.device) * piece
        pages = _describe_pages(keys, levels.lower(past_pages), sequence, method, page)
        return levels.joined(pages, sequence.reached[:, None] >= ends)
    return _describe_pages(keys, past_pages, sequence, method, page)


def _describe_pages(keys: Tensor, past_pages: Tensor, sequence: Sequence, method: str, page: int) -> Tensor:
    count = keys.shape[2] // page
    number = torch.arange(count, device=keys.device)
    each = (-1, 1, count, *[1] * (past_pages.dim() - 3))
    before, complete = ((number < whole[:, None] // page).view(each) for whole in (sequence.held, sequence.reached))
    pages = keys.new_zeros(*keys.shape[:2], count, *past_pages.shape[3:])
    pages[:, :, : past_pages.shape[2]] = past_pages.to(keys.dtype)
    first = int(sequence.held.min()) // page
    fresh = describe(keys[:, :, first * page :].unflatten(2, (count - first, page)), method)
    # As the state will hold them, so that a page's score does not depend on when it was completed.
    pages[:, :, first:] = torch.where(before[:, :, first:], pages[:, :, first:], fresh.to(past_pages.dtype))
    return pages.masked_fill(~complete, 0)


def blocks(heads: int, sequence: Sequence) -> Iterator[slice]:
    """Cut the columns of a call that hold tokens of a sequence into blocks whose scores fit ``BLOCK_SCORES``."""
    columns = sequence.mine.any(0).nonzero()[:, 0]
    if not len(columns):
        return
    size = max(1, BLOCK_SCORES // max(1, sequence.mine.shape[0] * heads * sequence.place.shape[1]))
    first, last = int(columns[0]), int(columns[-1]) + 1
    for start in range(first, last, size):
        yield slice(start, min(start + size, last))


def numbers_of(events: Tensor | None, sequence: Sequence) -> Tensor | None:
    """Return the numbers ``[B,L]`` of ``events [B,S]``, by position, of what a sequence held before the call."""
    if events is None or not events.shape[1]:
        return None
    place = sequence.place
    position = torch.arange(place.shape[1], device=place.device)
    there = (place >= 0) & (place < events.shape[1]) & (position < sequence.held[:, None])
    return events.gather(1, place.where(there, 0)).where(there, -1)


def readable(
    query: Tensor,
    keys: Tensor,
    pages: Tensor,
    positions: Tensor,
    sequence: Sequence,
    rule: Rule,
    events: Tensor | None,
    rows: slice,
) -> Tensor:
    """Return the mask ``[B,G,1,T,L]`` of what a block of a call's queries ``[B,H,.,D]`` reads of a sequence's keys.

    ``events [B,S]`` are numbers of what is held, for a rule that ranks by them.
    """
    mine, numbers = sequence.mine[:, rows], numbers_of(events, sequence)
    tokens = chosen(query[:, :, rows], keys, pages, torch.where(mine, positions[:, rows], -1), rule, numbers)
    return (tokens & mine[:, None, :, None] & (sequence.place >= 0)[:, None, None])[:, :, None]


def grouped(positions: Tensor, sequence: Sequence, rule: Rule, rows: slice) -> Groups | None:
    """Return what a block of a call's queries reads through landmarks, of what it reads; None for nothing."""
    at = torch.where(sequence.mine[:, rows], positions[:, rows], -1)
    return groups(at, sequence.place.shape[1] // rule.page, rule)


def ungrouped(rows: slice) -> None:
    """Return that a block of queries reads nothing through landmarks."""


def attend_chosen(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence: Sequence,
    mask: Callable[[slice], Tensor],
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    through: Callable[[slice], Groups | None] = ungrouped,
) -> None:
    """Write ``out [B,H,T,E]`` and ``lse [B,H,T]`` of a sequence's tokens, block by block; other tokens keep theirs.

    ``mask`` gives what a block of queries reads of ``keys`` and ``values [B,G,L,.]``, which are by position, and
    ``through`` what of that it reads through landmarks.
    """
    for rows in blocks(query.shape[1], sequence):
        read = (query[:, :, rows], keys, values, mask(rows), None, sink_logits, scale, softcap)
        part, part_lse = attend(*read, through(rows))
        mine = sequence.mine[:, None, rows]
        out[:, :, rows] = torch.where(mine[..., None], part.to(out.dtype), out[:, :, rows])
        lse[:, :, rows] = torch.where(mine, part_lse, lse[:, :, rows])


@dataclass(frozen=True)
class Reads:
    """Keys and values ``[B,G,L,.]`` of a sequence by position, and the mask of what a block of queries reads.

    ``through`` tells what of that is read through landmarks.
    """

    sequence: Sequence
    keys: Tensor
    values: Tensor
    mask: Callable[[slice], Tensor]
    through: Callable[[slice], Groups | None]


def gradients(
    args: Choosing, grads: tuple[Tensor, Tensor, Tensor, Tensor], reads: Iterable[Reads]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past key, past value and sink logits for what is read.

    ``grads`` are those of output, log-sum-exp, next keys and next values.
    """
    kind, past, sink_logits = accumulation_type(args.query), args.past_key.shape[2], args.sink_logits
    q, (out, lse, next_key, next_value) = args.query.to(kind), (grad.to(kind) for grad in grads)
    grad_q, grad_sinks = torch.zeros_like(q), q.new_zeros(q.shape[1])
    grad_k, grad_v = next_key.clone(), next_value.clone()
    for one in reads:
        placed_k, placed_v = torch.zeros_like(one.keys), torch.zeros_like(one.values)
        for rows in blocks(q.shape[1], one.sequence):
            mine = one.sequence.mine[:, None, rows]
            outer, log = out[:, :, rows] * mine[..., None], lse[:, :, rows] * mine
            read = (q[:, :, rows], one.keys, one.values, one.mask(rows), None, sink_logits, args.scale, args.softcap)
            g = attend_backward(outer, log, *read, one.through(rows))
            grad_q[:, :, rows] += g.query
            placed_k += g.key
            placed_v += g.value
            if g.sink_logits is not None:
                grad_sinks += g.sink_logits
        grad_k += put(placed_k, one.sequence.place, grad_k.shape[2])
        grad_v += put(placed_v, one.sequence.place, grad_v.shape[2])
    return grad_q, grad_k[:, :, past:], grad_v[:, :, past:], grad_k[:, :, :past], grad_v[:, :, :past], grad_sinks


def forward(args: SparseAttention) -> tuple[Tensor, ...]:
    """Run ``memc::sparse_attention``; arguments and results as its dialect page has them."""
    rule, call, past = Rule.of(args), Appended.of(args), args.past_pages
    q = args.query.to(accumulation_type(args.query))
    out, lse = args.query.new_zeros(*q.shape[:3], args.value.shape[3]), q.new_zeros(q.shape[:3])
    count = pages_of(call.key.shape[2], rule.piece)
    next_pages = past.new_zeros(*args.key.shape[:2], count, *past.shape[3:])
    current = segments(args.positions)[:, -1]
    for number, (sequence, keys, values, pages) in enumerate(call.contents(args, q.dtype)):
        mine = (current == number).view(-1, *[1] * (pages.dim() - 1))
        next_pages = torch.where(mine, pages.to(past.dtype), next_pages)
        mask = partial(readable, q, keys, pages, args.positions, sequence, rule, args.events)
        through = partial(grouped, args.positions, sequence, rule)
        attend_chosen(out, lse, q, keys, values, sequence, mask, args.sink_logits, args.scale, args.softcap, through)
    return out, lse, call.key, call.value, held_positions(args.past_positions, args.positions), next_pages


def backward(
    args: SparseAttention, out: Tensor, lse: Tensor, next_key: Tensor, next_value: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value and sink_logits for the tokens chosen."""
    rule, q = Rule.of(args), args.query.to(accumulation_type(args.query))

    def reads() -> Iterator[Reads]:
        for sequence, keys, values, pages in Appended.of(args).contents(args, q.dtype):
            mask = partial(readable, q, keys, pages, args.positions, sequence, rule, args.events)
            yield Reads(sequence, keys, values, mask, partial(grouped, args.positions, sequence, rule))

    return gradients(args, (out, lse, next_key, next_value), reads())

"""``memc::compact_attention`` in torch: blocks of queries, each with the keys that it reads gathered and rotated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.compact_attention import CompactAttention
from memc.dialect.sparse_attention import pages_of
from memc.kernels.common import accumulation_type, held_positions, put, segments, take
from memc.kernels.compact_attention.choose import Angles, Reads, described, follows, gathered, read
from memc.kernels.rotary.reference import backward as rotate_back
from memc.kernels.softmax import attend, attend_backward
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.reference import Sequence, find_sequences

# Most channels of keys that one block of queries gathers at once: 16 MB in float32.
BLOCK_CHANNELS = 1 << 22


@dataclass(frozen=True)
class Call:
    """A call and what it reads, in the accumulation type; ``key`` and ``value`` begin with what is held."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    past_positions: Tensor
    past_pages: Tensor
    rule: Rule
    angles: Angles
    softcap: float

    @classmethod
    def of(cls, args: CompactAttention) -> Call:
        """Append a call to what is held, and bring query, keys, values and pages to the accumulation type."""
        kind = accumulation_type(args.query)
        return cls(
            args.query.to(kind),
            torch.cat([args.past_key, args.key], 2).to(kind),
            torch.cat([args.past_value, args.value], 2).to(kind),
            args.positions,
            args.past_positions,
            args.past_pages.to(kind),
            Rule.of(args),
            Angles(args.inv_freq, args.interleaved, args.scaling),
            args.softcap,
        )

    def contents(self) -> Iterator[tuple[Sequence, Tensor, Tensor, Tensor]]:
        """Yield each sequence with its keys and values by position, and ``[B,G,N,2D]`` of its pages."""
        page, size = self.rule.page, self.key.shape[2]
        for number, sequence in enumerate(find_sequences(self.positions, self.past_positions, -(-size // page) * page)):
            keys, values = (take(x, sequence.place) for x in (self.key, self.value))
            past = self.past_pages if number == 0 else self.past_pages[:, :, :0]
            yield sequence, keys, values, self._pages(sequence, keys, values, past)

    def _pages(self, sequence: Sequence, keys: Tensor, values: Tensor, past: Tensor) -> Tensor:
        """Add what the call's tokens bring to the sums of their pages, and describe those that can be by now."""
        rule, page = self.rule, self.rule.page
        held, size, after = past.shape[2], keys.shape[3], follows(self.rule)
        count = keys.shape[2] // page
        start = min(int(sequence.held.min()) // page, held)
        new = sequence.place - self.past_positions.shape[1]
        there = (new >= 0)[:, start * page :]
        queries = take(self.query, new.clamp_min(-1)[:, start * page :])
        pages = torch.cat([past, past.new_zeros(*past.shape[:2], count - held, 2 * size)], 2)
        pages[:, :, start:, size:] += gathered(
            queries, keys[:, :, start * page :], values[:, :, start * page :], there, rule, self.angles, self.softcap
        )
        # Pages whose description waits for those behind them.
        waiting = max(0, start - after)
        sums = torch.nn.functional.pad(pages[:, :, waiting:, size:], (0, 0, 0, after))
        fresh = described(keys[:, :, waiting * page :].unflatten(2, (-1, page)), sums, rule)
        number = torch.arange(waiting, count, device=keys.device) + 1 + after
        before, known = (
            ((number * page <= length[:, None])[:, None, :, None]) for length in (sequence.held, sequence.reached)
        )
        pages[:, :, waiting:, :size] = torch.where(before, pages[:, :, waiting:, :size], fresh).masked_fill(~known, 0)
        return pages

    def blocks(self, sequence: Sequence, pages: Tensor) -> Iterator[tuple[slice, Reads, Tensor]]:
        """Cut the columns that hold tokens of a sequence into blocks; yield what each reads and which are its own."""
        columns = sequence.mine.any(0).nonzero()[:, 0]
        if not len(columns):
            return
        most = max(self.rule.budget, min(self.rule.dense_below, pages.shape[2] * self.rule.page))
        size = max(1, BLOCK_CHANNELS // (pages.shape[0] * pages.shape[1] * most * self.key.shape[3]))
        first, last = int(columns[0]), int(columns[-1]) + 1
        for start in range(first, last, size):
            rows = slice(start, min(start + size, last))
            mine = sequence.mine[:, rows]
            at = torch.where(mine, self.positions[:, rows], -1)
            yield rows, read(self.query[:, :, rows], pages[..., : self.key.shape[3]], at, self.rule), mine

    def gather(self, rows: slice, keys: Tensor, values: Tensor, reads: Reads) -> Block:
        """Gather what a block of queries reads of a sequence."""
        heads, groups = self.query.shape[1], keys.shape[1]
        return Block(
            self.query[:, :, rows].flatten(0, 1)[:, None],
            reads.query_at.repeat_interleave(heads // groups, 1).flatten(0, 1),
            _gather(keys, reads.tokens).flatten(0, 2)[:, None],
            reads.key_at.flatten(0, 2),
            _rows(_gather(values, reads.tokens)),
            _rows(reads.live)[:, :, None, None],
        )


@dataclass(frozen=True)
class Block:
    """What a block of T queries reads, and where it is to be rotated to.

    ``query [B H,1,T,D]`` by ``query_at [B H,T]``, ``key [B G T,1,L,D]`` by ``key_at [B G T,L]``, not rotated yet; the
    others as :meth:`turned` has them, ``value [B T,G,L,E]`` and ``live [B T,G,1,1,L]``.
    """

    query: Tensor
    query_at: Tensor
    key: Tensor
    key_at: Tensor
    value: Tensor
    live: Tensor

    def turned(self, angles: Angles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what :func:`attend` takes, each query a row of its own: ``[B T,H,1,D]`` and ``[B T,G,L,.]``."""
        groups, tokens = self.value.shape[1], self.query.shape[2]
        batch = self.value.shape[0] // tokens
        query = angles.turn(self.query, self.query_at)[:, 0].unflatten(0, (batch, -1))
        key = angles.turn(self.key, self.key_at)[:, 0].unflatten(0, (batch, groups, tokens))
        return _rows(query)[:, :, None], _rows(key), self.value, self.live

    def back(self, query: Tensor, key: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients ``[B,H,T,D]``, ``[B,G,T,L,D]`` and that of ``inv_freq``, of those of :meth:`turned`."""
        groups, tokens = self.value.shape[1], self.query.shape[2]
        batch = self.value.shape[0] // tokens
        grad = _columns(query[:, :, 0], batch).flatten(0, 1)[:, None]
        grad_q, of_query = rotate_back(angles.rotary(self.query, self.query_at), grad)
        grad = _columns(key, batch).flatten(0, 2)[:, None]
        grad_k, of_key = rotate_back(angles.rotary(self.key, self.key_at), grad)
        assert of_query is not None and of_key is not None
        return (
            grad_q[:, 0].unflatten(0, (batch, -1)),
            grad_k[:, 0].unflatten(0, (batch, groups, tokens)),
            of_query + of_key,
        )


def _gather(x: Tensor, tokens: Tensor) -> Tensor:
    """Return tokens ``[B,G,T,L]`` of ``x [B,G,S,D]`` as ``[B,G,T,L,D]``; those past the end are the last one."""
    index = tokens.clamp_max(x.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return torch.gather(x, 2, index).view(*tokens.shape, x.shape[3])


def _rows(x: Tensor) -> Tensor:
    """Bring ``[B,N,T,...]`` to ``[B T,N,...]``."""
    return x.transpose(1, 2).flatten(0, 1)


def _columns(x: Tensor, batch: int) -> Tensor:
    """Bring ``[B T,N,...]`` back to ``[B,N,T,...]``."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def forward(args: CompactAttention) -> tuple[Tensor, ...]:
    """Run ``memc::compact_attention``; arguments and results as its dialect page has them."""
    call, batch = Call.of(args), len(args.query)
    out = args.query.new_zeros(*args.query.shape[:3], args.value.shape[3])
    lse = call.query.new_zeros(args.query.shape[:3])
    count = pages_of(call.key.shape[2], args.page)
    next_pages = call.past_pages.new_zeros(*args.key.shape[:2], count, args.past_pages.shape[3])
    current = segments(args.positions)[:, -1]
    for number, (sequence, keys, values, pages) in enumerate(call.contents()):
        next_pages = torch.where((current == number)[:, None, None, None], pages, next_pages)
        for rows, reads, mine in call.blocks(sequence, pages):
            read = (*call.gather(rows, keys, values, reads).turned(call.angles), None, args.sink_logits)
            part, log = (_columns(x[:, :, 0], batch) for x in attend(*read, args.scale, args.softcap))
            mine = mine[:, None]
            out[:, :, rows] = torch.where(mine[..., None], part.to(out.dtype), out[:, :, rows])
            lse[:, :, rows] = torch.where(mine, log, lse[:, :, rows])
    held = torch.cat([args.past_key, args.key], 2), torch.cat([args.past_value, args.value], 2)
    return out, lse, *held, held_positions(args.past_positions, args.positions), next_pages


def backward(
    args: CompactAttention, out: Tensor, lse: Tensor, next_key: Tensor, next_value: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, past_key, past_value, inv_freq and sink_logits for what is read."""
    call = Call.of(args)
    past, size, kind = args.past_key.shape[2], call.key.shape[2], call.query.dtype
    grad, row_grad, grad_q = out.to(kind), lse.to(kind), torch.zeros_like(call.query)
    grad_k, grad_v = next_key.to(kind, copy=True), next_value.to(kind, copy=True)
    grad_freq, grad_sinks = torch.zeros_like(args.inv_freq), call.query.new_zeros(args.query.shape[1])
    for sequence, keys, values, pages in call.contents():
        placed_k, placed_v = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, reads, mine in call.blocks(sequence, pages):
            block, own = call.gather(rows, keys, values, reads), mine[:, None]
            outer = _rows(grad[:, :, rows] * own[..., None])[:, :, None]
            log = _rows(row_grad[:, :, rows] * own)[:, :, None]
            read = (*block.turned(call.angles), None, args.sink_logits)
            g = attend_backward(outer, log, *read, args.scale, args.softcap)
            of_query, of_key, of_freq = block.back(g.query, g.key, call.angles)
            grad_q[:, :, rows] += of_query
            _scatter(placed_k, reads.tokens, of_key)
            _scatter(placed_v, reads.tokens, _columns(g.value, len(args.query)))
            grad_freq += of_freq
            if g.sink_logits is not None:
                grad_sinks += g.sink_logits
        grad_k += put(placed_k, sequence.place, size)
        grad_v += put(placed_v, sequence.place, size)
    held = grad_k[:, :, :past], grad_v[:, :, :past]
    return grad_q, grad_k[:, :, past:], grad_v[:, :, past:], *held, grad_freq, grad_sinks


def _scatter(placed: Tensor, tokens: Tensor, gradient: Tensor) -> None:
    """Add ``gradient [B,G,T,L,D]`` to tokens ``[B,G,T,L]`` of ``placed``: the transpose of :func:`_gather`."""
    index = tokens.clamp_max(placed.shape[2] - 1).flatten(2)[..., None].expand(-1, -1, -1, placed.shape[3])
    placed.scatter_add_(2, index, gradient.flatten(2, 3))

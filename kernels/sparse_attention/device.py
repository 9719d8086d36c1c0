"""Host code of ``memc::sparse_attention`` on a GPU: describe, score, choose, rank again, attend.

The functional form takes one token at a time; states in place also take prompts, in blocks of tokens that each choose
for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.refreshed_attention import Choosing
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import SPAN, SparseAttention, described_tokens, pages_of
from memc.kernels.attention.slots import write
from memc.kernels.common import held_positions
from memc.kernels.launch import DeviceKernels, Gpu, Tile, power_of_two, precision
from memc.kernels.softmax_device import refusal, unordered
from memc.kernels.sparse_attention import reference, steps
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.steps import Arguments, Asking, Constants, block_of, in_blocks


def refuses(gpu: Gpu, args: Choosing) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    if SELECTORS[args.method].grouped:
        return f"the softmax of method {args.method}, which is grouped by pages"
    if SELECTORS[args.method].eventful:
        return f"the choice of method {args.method}, which is by events"
    past = (args.past_key, args.past_value, args.past_pages)
    reason = refusal(args.query, args.key, args.value, *past, args.sink_logits)
    return reason or unordered(*past, args.past_positions)


@dataclass(frozen=True)
class Held(Asking):
    """Tokens and what they may choose from: keys and values, their own among them, and where each position is.

    ``key [B,G,N,D]``, ``value [B,G,N,E]`` and ``places [B,L]`` int32; all are contiguous.
    """

    key: Tensor
    value: Tensor
    places: Tensor

    def cut(self, kernel: str, name: str) -> Tile:
        """Return the tile of a kernel that reads keys, and perhaps values."""
        size = max(self.key.shape[3], self.value.shape[3])
        return steps.cut_for(f"sparse_attention.{kernel}", name, size, self.key.dtype, self.key.device)


def forward(args: SparseAttention) -> tuple[Tensor, ...]:
    """Run ``memc::sparse_attention``; arguments and results as its dialect page has them.

    More than one token at a time, which may be of several sequences, are left to the reference.
    """
    if args.query.shape[2] > 1:
        return reference.forward(args)
    next_positions = held_positions(args.past_positions, args.positions)
    piece = described_tokens(args.method, args.page)
    count = pages_of(next_positions.shape[1], piece)
    held = Held(
        args.query.contiguous(),
        args.positions.contiguous(),
        _pages(args.past_pages, args.positions, count),
        torch.cat([args.past_key, args.key], 2),
        torch.cat([args.past_value, args.value], 2),
        steps.places_of(next_positions, count * piece),
    )
    out, lse = _run(held, args)
    return out, lse, held.key, held.value, next_positions, held.pages


def in_place(args: SparseAttention) -> tuple[Tensor, Tensor]:
    """Run ``memc::sparse_attention_`` on buffers, as :func:`memc.kernels.sparse_attention.slots.forward` does."""
    return _run(lay_down(args), args)


def lay_down(args: Choosing) -> Held:
    """Write a call into buffers, where slot p holds the token at position p, and return what is held then."""
    write(args.positions, ((args.key, args.past_key), (args.value, args.past_value)), args.past_positions)
    if args.query.shape[2] > 1:
        args.past_pages.masked_fill_(steps.starts(args.positions, args.past_pages), 0)
    # The token at position p lies in slot p: what is held there is its own place.
    places = args.past_positions.to(torch.int32)
    query, positions = args.query.contiguous(), args.positions.contiguous()
    return Held(query, positions, args.past_pages, args.past_key, args.past_value, places)


def _run(held: Held, args: SparseAttention) -> tuple[Tensor, Tensor]:
    """Return the output ``[B,H,T,E]`` and the log-sum-exp ``[B,H,T]`` of tokens that are in what is held."""
    rule = Rule.of(args)
    describe(held, rule)
    return in_blocks(held, rule, lambda part: attend(part, choose(part, rule), args))


def choose(held: Held, rule: Rule) -> Tensor:
    """Return the positions ``[B,G,T,K]`` that tokens read for each key-value head, -1 for none."""
    return steps.choose(held, rule, lambda candidates: ranked(held, candidates, rule))


def _pages(past: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the descriptions held, with room for ``count`` pages; none where the token starts a sequence."""
    room = past.new_zeros(*past.shape[:2], count, *past.shape[3:])
    room[:, :, : past.shape[2]] = past.masked_fill(steps.starts(positions, past), 0)
    return room


def describe(held: Held, rule: Rule) -> None:
    """Describe the pages that the tokens complete."""
    arguments = {"pages": held.pages, "key": held.key, "places": held.places, "positions": held.positions}
    numbers = {
        "tokens": held.tokens,
        "held": held.key.shape[2],
        "length": held.places.shape[1],
        "count": held.pages.shape[2],
    }
    described = held.pages[0, 0, 0].numel()
    constants: Constants = {
        **held.sizes,
        "page": rule.page,
        "method": rule.method,
        "described": described,
        "span": SPAN if rule.by_level else 0,
        "block_page": power_of_two(rule.page),
        "block_described": min(1024, block_of(described)),
    }
    grid = held.tokens, *held.grid
    steps.run("sparse_attention.describe", grid, {**arguments, **numbers}, constants, Tile({}, 4, 1))


def ranked(held: Held, candidates: Tensor, rule: Rule) -> Tensor:
    """Return the scores ``[B,G,T,K]`` of candidates by q.k."""
    given: Arguments = {
        "key": held.key,
        "places": held.places,
        "held": held.key.shape[2],
        "length": held.places.shape[1],
    }
    cut = held.cut("rank", "block_tokens")
    return steps.rank("sparse_attention.rank", held, rule, candidates, given, {}, cut)


def attend(held: Held, chosen: Tensor, args: Choosing) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp over the tokens at the positions ``chosen [B,G,T,K]``, -1 for none."""
    places = held.places[:, None, None].expand(-1, *chosen.shape[1:3], -1).gather(3, chosen.clamp_min(0))
    places = places.masked_fill(chosen < 0, -1)
    given: Arguments = {"key": held.key, "value": held.value, "held": held.key.shape[2]}
    kind = precision(held.query.device, held.query.dtype)
    constants: Constants = {"scale": args.scale, "softcap": args.softcap, "precision": kind}
    cut, size = held.cut("attend", "block_keys"), held.value.shape[3]
    return steps.attend("sparse_attention.attend", held, places, size, args.sink_logits, given, constants, cut)


KERNELS = DeviceKernels(forward, refuses, in_place=in_place)

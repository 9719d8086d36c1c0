"""Host code of ``memc::refreshed_attention`` on a GPU: those whose turn it is choose, the others take what they chose.

States in place alone; everything but the choice is that of ``memc::sparse_attention``. Letters as in ``steps``; M
entries of a list.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from memc.dialect.refreshed_attention import RefreshedAttention
from memc.dialect.sparse_attention import pages_of
from memc.kernels.launch import DeviceKernels, Gpu
from memc.kernels.refreshed_attention import reference
from memc.kernels.softmax_device import unordered
from memc.kernels.sparse_attention import device as sparse
from memc.kernels.sparse_attention import steps
from memc.kernels.sparse_attention.choose import Rule
from memc.kernels.sparse_attention.device import Held


def refuses(gpu: Gpu, args: RefreshedAttention) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    return sparse.refuses(gpu, args) or unordered(args.past_choice)


def in_place(args: RefreshedAttention) -> tuple[Tensor, Tensor]:
    """Run ``memc::refreshed_attention_`` on buffers, where slot p holds the token at position p."""
    rule, held = Rule.of(args), sparse.lay_down(args)
    args.past_choice.masked_fill_((args.positions == 0).any(1)[:, None, None], -1)
    sparse.describe(held, rule)
    return steps.in_blocks(held, rule, lambda part: sparse.attend(part, choose(part, args.past_choice, rule), args))


def choose(held: Held, past: Tensor, rule: Rule) -> Tensor:
    """Return the positions ``[B,G,T,K]`` that tokens read; ``past [B,G,M]`` becomes the last token's list."""
    turn = (held.positions >= rule.dense_below) & ((held.positions - rule.dense_below) % rule.refresh == 0)
    lists = torch.cat([past[:, :, None], _lists(held, turn & (held.positions >= 0), rule)], 2)
    # How many have chosen by then, itself included, is which of the lists a token takes from.
    number = (turn & (held.positions >= 0)).cumsum(1)[:, None, :, None].expand(-1, lists.shape[1], -1, lists.shape[3])
    listed = lists.gather(2, number)
    past.copy_(listed[:, :, -1])
    picked = _taken(listed, held.positions, rule)
    dense = (held.positions < rule.dense_below)[:, None, :, None]
    if rule.dense_below:
        picked = torch.nn.functional.pad(picked, (0, max(0, -(-rule.dense_below // rule.unit) - rule.most)), value=-1)
        every = torch.arange(picked.shape[3], device=picked.device)
        seen = every <= held.positions[:, None, :, None].div(rule.unit, rounding_mode="floor")
        picked = torch.where(dense, every.where(seen, -1), picked)
    picked = steps.tokens_of(picked, picked >= 0, held.positions, rule)
    if rule.rerank == 1:
        return picked
    return steps.narrowed(picked, dense, rule, lambda candidates: sparse.ranked(held, candidates, rule))


def _lists(held: Held, turn: Tensor, rule: Rule) -> Tensor:
    """Return the lists ``[B,G,A,M]`` of the tokens whose ``turn [B,T]`` it is, in order; -1 behind the last entry.

    There are no more than A: of tokens that follow one another each ``refresh``-th.
    """
    most = -(-held.tokens // rule.refresh)
    column = torch.arange(held.tokens, device=turn.device).expand_as(turn)
    column = column.masked_fill(~turn, held.tokens).sort(1).values[:, :most]
    real, column = column < held.tokens, column.clamp_max(held.tokens - 1)
    index = column[:, None, :, None].expand(-1, held.query.shape[1], -1, held.query.shape[3])
    positions = held.positions.gather(1, column).masked_fill(~real, -1)
    scores = steps.scores(replace(held, query=held.query.gather(2, index), positions=positions), rule)
    index, there = steps.ordered(scores, rule.mass)
    listed = index.masked_fill(~there, -1)[..., : rule.most]
    return torch.nn.functional.pad(listed, (0, rule.most - listed.shape[3]), value=-1)


def _taken(listed: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """Return the M pages or tokens ``[B,G,T,M]`` that tokens take: the forced ones, then from their lists; -1: none."""
    p = positions[:, None, :, None]
    near, last = (p - rule.window + 1).clamp_min(0), p.div(rule.unit, rounding_mode="floor")
    if rule.by_token:
        start, wide = torch.minimum(near, p.div(rule.page, rounding_mode="floor") * rule.page), rule.window
        wide = max(wide, rule.page)
    else:
        start, wide = near // rule.page, int(pages_of(rule.window - 1, rule.page)) + 1
    sinks = -(-rule.sinks // rule.unit)
    first = torch.arange(sinks, device=p.device)
    window = start + torch.arange(wide, device=p.device)
    taken = torch.cat(
        [
            first.where((first < start) & (first <= last), -1).expand(*listed.shape[:3], -1),
            window.where(window <= last, -1).expand(*listed.shape[:3], -1),
            listed.where((listed >= sinks) & (listed < start), -1),
        ],
        3,
    )
    place = (taken >= 0).cumsum(3)
    place = torch.where((taken >= 0) & (place <= rule.most), place - 1, rule.most)
    room = taken.new_full((*taken.shape[:3], rule.most + 1), -1)
    return room.scatter(3, place, taken)[..., : rule.most]


KERNELS = DeviceKernels(reference.forward, refuses, in_place=in_place)

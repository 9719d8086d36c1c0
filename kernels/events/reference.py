"""``memc::events`` in torch: token after token, all rows side by side; nothing is read back by the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.events import NEAR, Events
from memc.kernels.attention.slots import write
from memc.kernels.common import accumulation_type, held_positions
from memc.kernels.events.rule import LEAST


@dataclass
class Held:
    """What goes from token to token: the states, and of each row where its last event starts and which number it has.

    ``expected [B,V]``, ``surprises [B,R]``, ``keys [B,G,N,D]``, ``events`` and ``places [B,L]``, the positions that the
    numbers are of (-1 for none), ``start`` and ``number [B]``.
    """

    expected: Tensor
    surprises: Tensor
    keys: Tensor
    events: Tensor
    places: Tensor
    start: Tensor
    number: Tensor

    @classmethod
    def of(cls, args: Events, events: Tensor, places: Tensor) -> Held:
        """Begin with the states of a call, in the type that it is computed in."""
        kind = accumulation_type(args.logits)
        past = torch.where(args.past_positions >= 0, args.past_events, -1)
        none = past.new_full((len(past), 1), -1)
        number, start = torch.cat([none, past], 1).amax(1) + 1, (past >= 0).sum(1)
        expected, surprises, keys = (
            x.to(kind, copy=True) for x in (args.past_logits, args.past_surprises, args.past_keys)
        )
        return cls(expected, surprises, keys, events, places, start, number)


def forward(args: Events) -> tuple[Tensor, ...]:
    """Run ``memc::events``; arguments and results as its dialect page has them."""
    batch, count = args.positions.shape
    everything = torch.cat([args.past_positions, args.positions], 1)
    events = torch.cat([args.past_events, args.positions.new_full((batch, count), -1)], 1)
    held = Held.of(args, events, everything)
    surprise = find(args, held, before=args.past_positions.shape[1])
    positions = held_positions(args.past_positions, args.positions)
    past = (args.past_logits, args.past_surprises, args.past_keys)
    fixed = zip((held.expected, held.surprises, held.keys), past, strict=True)
    return surprise, *(new.to(old.dtype) for new, old in fixed), held.events.masked_fill(positions < 0, -1), positions


def in_place(args: Events) -> Tensor:
    """Run ``memc::events_`` on buffers ``past_events`` and ``past_positions [B,S]``, where slot p is of position p.

    S is one more than the most tokens of a sequence; the tokens of a row are of one sequence.
    """
    places = torch.arange(args.past_events.shape[1], device=args.positions.device).expand_as(args.past_events)
    held = Held.of(args, args.past_events, torch.where(places < places.shape[1] - 1, places, -1))
    surprise = find(args, held)
    for new, old in ((held.expected, args.past_logits), (held.surprises, args.past_surprises)):
        old.copy_(new)
    args.past_keys.copy_(held.keys)
    args.past_events.copy_(held.events)
    write(args.positions, (), args.past_positions)
    return surprise


def find(args: Events, held: Held, before: int | None = None) -> Tensor:
    """Return the surprises ``[B,T]`` of a call's tokens, and advance what is held.

    ``before`` is how many of the places are those of earlier calls, each of which has one of its own; None where places
    are positions.
    """
    kind, found = accumulation_type(args.logits), []
    logits, key = args.logits.to(kind), args.key.to(kind)
    for t in range(args.positions.shape[1]):
        p, first = args.positions[:, t], args.positions[:, t] == 0
        live = p >= 0
        held.events = held.events.masked_fill(first[:, None], -1)
        held.start, held.number = held.start.masked_fill(first, 0), held.number.masked_fill(first, 0)
        if before is not None:  # those of the sequence that is over
            over = first[:, None] & (torch.arange(held.places.shape[1], device=p.device) < before + t)
            held.places = held.places.masked_fill(over, -1)
        known = live & ~first
        said = held.expected.gather(1, args.tokens[:, t : t + 1])[:, 0]
        surprise = torch.where(known, held.expected.logsumexp(1) - said, 0)
        found.append(surprise)
        ends = known & (_surprising(surprise, held.surprises, p, args.gamma) | (p - held.start >= args.longest))
        held.surprises = _put(held.surprises, 1, p, surprise[:, None], known)
        held.keys = _put(held.keys, 2, p, key[:, :, t : t + 1], live)
        behind = p if args.refine == "none" else _refined(held.keys, held.start, p, args.refine)
        inside = (held.places >= held.start[:, None]) & (held.places < behind[:, None]) & ends[:, None]
        held.events = torch.where(inside, held.number[:, None], held.events)
        held.start, held.number = torch.where(ends, behind, held.start), held.number + ends
        held.expected = torch.where(live[:, None], logits[:, t], held.expected)
    return torch.stack(found, 1)


def _put(ring: Tensor, axis: int, p: Tensor, value: Tensor, where: Tensor) -> Tensor:
    """Return ``ring [B,...]`` with ``value`` in the slots along ``axis`` of positions ``p [B]``, in rows ``where``."""
    each = (-1, *[1] * (ring.dim() - 1))
    slot = (p % ring.shape[axis]).view(each).expand_as(value)
    return ring.scatter(axis, slot, torch.where(where.view(each), value, ring.gather(axis, slot)))


def _last(p: Tensor, size: int) -> Tensor:
    """Return the positions ``[B,size]`` that the slots of a ring hold when that at ``p [B]`` is the last one."""
    return p[:, None] - (p[:, None] - torch.arange(size, device=p.device)) % size


def _surprising(surprise: Tensor, ring: Tensor, p: Tensor, gamma: float) -> Tensor:
    """Tell of which tokens at ``p [B]`` the surprise is far above the mean of those in ``ring [B,R]``."""
    there = _last(p - 1, ring.shape[1]) >= 1
    count = there.sum(1).clamp_min(1)
    mean = ring.where(there, 0).sum(1) / count
    spread = ((ring - mean[:, None]).square().where(there, 0).sum(1) / count).sqrt()
    return (surprise > mean + gamma * spread) & (p > 1)


def _refined(keys: Tensor, start: Tensor, p: Tensor, refine: str) -> Tensor:
    """Return the positions ``[B]`` before which events that start at ``start [B]`` and may end at ``p`` do end.

    ``keys [B,G,N,D]`` are the last ones.
    """
    at = _last(p, keys.shape[2])
    inside = at >= start[:, None]
    there = inside[:, None, :, None]
    away = keys - keys.where(there, 0).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp_min(1)
    away = away / torch.linalg.vector_norm(away, dim=3, keepdim=True).clamp_min(LEAST)
    alike = (away @ away.mT).mean(1).clamp_min(0)
    alike = alike * (inside[:, :, None] & inside[:, None]) * (at[:, :, None] != at[:, None])
    # A cut before each place: the edges within what lies before it, within what lies behind, each from both of its
    # ends, and those between the two; from sums that cancel nothing, so that cuts which are alike have equal gains.
    before = inside[:, None] & (at[:, None] < at[:, :, None])
    ahead, behind = before.to(keys.dtype), (inside[:, None] & ~before).to(keys.dtype)
    from_ahead = ahead @ alike
    first, cut = ((from_ahead * side).sum(2) for side in (ahead, behind))
    second = ((behind @ alike) * behind).sum(2)
    if refine == "modularity":
        gain = 2 * (first * second - cut * cut) / (2 * cut + first + second).clamp_min(LEAST).square()
    else:
        least = cut + torch.minimum(first, second)
        gain = torch.where(least > LEAST, -cut / least.clamp_min(LEAST), -1)
    gain = gain.masked_fill(at <= start[:, None], -torch.inf)
    best = gain >= gain.amax(1, keepdim=True) - NEAR
    return at.masked_fill(~best | (at <= start[:, None]), -1).amax(1)

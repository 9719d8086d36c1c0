"""The best choice for every block and the weights under limits: least loss under the costs, or least cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from memc.cost import NOTHING, Demand, decode_ms
from memc.evaluate.perplexity import perplexity_of
from memc.fit.limits import Limit, Limits
from memc.fit.menu import Menu, Slot
from memc.search import Choice, Selection, frontier
from memc.target import Target

LABELS = 5_000
"""Labels that are kept after a block: there are twice as many blocks as layers, and they are searched for each type."""


@dataclass(frozen=True)
class Fit:
    """A choice: the setting of every block that changes, the weights' type, and what a token asks by context.

    ``kl`` is the sum of what they lose one at a time, in nats. It need not add up: what is expected of all is a factor
    times it.
    """

    picks: Mapping[Slot, int]
    weights: str
    asks: Mapping[int, Demand]
    kl: float


def cost_of(limit: Limit, asks: Mapping[int, Demand], target: Target, weights: str, threads: int | None) -> float:
    """Return what is asked in the quantity of a limit of cost: bytes of state, or milliseconds."""
    asked = asks[limit.context]
    if limit.what == "state":
        return float(asked.state_bytes)
    ms = decode_ms(asked, target, weights, threads)
    assert ms is not None, "limits of time are refused for targets without rates"
    return ms


@dataclass(frozen=True)
class Chooser:
    """All choices worth having from a menu, and what limits make of them. ``context`` is where speed counts if none.

    What the original takes, with weights of the menu's first type, is what limits in times of it are about.
    """

    menu: Menu
    limits: Limits
    target: Target
    threads: int | None
    context: int

    @cached_property
    def fits(self) -> Sequence[Fit]:
        """The choices of least loss for every amount that they may cost, with weights of each type."""
        found: list[Fit] = []
        for weights in self.menu.weights:
            nothing = dict.fromkeys(self.menu.original[weights], NOTHING)
            blocks = [
                [Choice(0.0, self._costs(nothing))]
                + [Choice(one.distance.kl_mean, self._costs(one.more[weights])) for one in entries]
                for entries in self.menu.slots.values()
            ]
            picked = frontier(blocks, LABELS) if blocks else [Selection(0.0, (), ())]
            found += [self._fit(weights, selection) for selection in picked]
        return found

    @cached_property
    def original(self) -> Fit:
        """Nothing changed, with weights of the first type."""
        weights = next(iter(self.menu.weights))
        return Fit({}, weights, self.menu.original[weights], 0.0)

    def best(self, factor: float) -> Fit | None:
        """Return the choice of least loss that keeps the limits of cost, or where there are none the quickest one.

        None where no choice keeps all limits, the loss of each being ``factor`` times its sum.
        """
        held = [fit for fit in self.fits if all(self.used(limit, fit, factor) <= 1 for limit in self.limits.limits)]
        if self.limits.costs:
            return min(held, key=lambda fit: fit.kl, default=None)
        return min(held, key=self.pace, default=None)

    def pace(self, fit: Fit) -> float:
        """Return the milliseconds of a token where speed counts, or the bytes of state on a target without rates."""
        asks = fit.asks[self.context]
        ms = decode_ms(asks, self.target, fit.weights, self.threads)
        return ms if ms is not None else float(asks.state_bytes)

    def reached(self, limit: Limit, fit: Fit, factor: float = 0.0) -> float:
        """Return what a choice comes to in a limit's quantity: bytes, milliseconds, nats, or times the perplexity."""
        match limit.what:
            case "state" | "decode":
                return cost_of(limit, fit.asks, self.target, fit.weights, self.threads)
            case "ppl":
                return perplexity_of(factor * fit.kl)
            case "kl":
                return factor * fit.kl

    def used(self, limit: Limit, fit: Fit, factor: float) -> float:
        """Return the share of a limit that a choice is expected to use."""
        original = 1.0 if limit.is_quality else self.reached(limit, self.original)
        return limit.used(self.reached(limit, fit, factor), original)

    def looser(self, limit: Limit, share: float, factor: float) -> float | None:
        """Return the least loss, in nats, if a limit of cost were so much looser; None where no choice keeps it."""
        others = [other for other in self.limits.limits if other != limit]
        held = [
            fit.kl
            for fit in self.fits
            if self.used(limit, fit, factor) <= share and all(self.used(other, fit, factor) <= 1 for other in others)
        ]
        return min(held, default=None)

    def nearest(self, factor: float) -> Fit | None:
        """Return the choice whose worst limit is kept best."""

        def worst(fit: Fit) -> float:
            return max(self.used(limit, fit, factor) for limit in self.limits.limits)

        return min(self.fits, key=worst, default=None)

    def instead(self, limit: Limit, factor: float) -> float | None:
        """Return the least share of one limit that a choice uses which keeps all the others; None where none does."""
        others = [other for other in self.limits.limits if other != limit]
        held = [fit for fit in self.fits if all(self.used(other, fit, factor) <= 1 for other in others)]
        return min((self.used(limit, fit, factor) for fit in held), default=None)

    def _costs(self, more: Mapping[int, Demand]) -> tuple[float, ...]:
        costs: list[float] = []
        for limit in self.limits.costs:
            asked = more[limit.context]
            costs += [asked.state_bytes] if limit.what == "state" else [asked.flops, asked.bytes_read]
        if not costs:
            asked = more[self.context]
            costs = [asked.flops, asked.bytes_read] if self.target.memory_bandwidth else [asked.state_bytes]
        return tuple(map(float, costs))

    def _fit(self, weights: str, selection: Selection) -> Fit:
        picked = {
            slot: self.menu.slots[slot][pick - 1]
            for slot, pick in zip(self.menu.slots, selection.picks, strict=True)
            if pick
        }
        asks = {}
        for context, original in self.menu.original[weights].items():
            asks[context] = sum((entry.more[weights][context] for entry in picked.values()), original)
        lost = self.menu.weights[weights].kl_mean + selection.loss
        return Fit({slot: entry.setting for slot, entry in picked.items()}, weights, asks, lost)

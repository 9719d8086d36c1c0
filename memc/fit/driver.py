"""From limits to passes: measure every block, choose, hold the choice against text it was not made on, choose again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from memc.analysis.sensitivity import Distance, Yardstick
from memc.cost import Demand, demands
from memc.errors import MemcError
from memc.fit.choose import Chooser, Fit, cost_of
from memc.fit.limits import Limit, Limits
from memc.fit.menu import Calibrate, Kept, Setting, Usage, make_menu, rewritten, told
from memc.fit.weights import quantised
from memc.pipeline import Pass
from memc.program import Program
from memc.progress import Progress
from memc.report.files import FitFacts, FitLayer, FitLimit
from memc.report.text import number, size
from memc.target import Target

ATTEMPTS = 4
"""Choices that are held against the text at most, each with what the last one showed of how losses add up."""

LEAST_FACTOR = 0.1
"""Least that losses of single blocks count when they are added up: one text may flatter a choice."""

STRICTER = 1.05
"""How much more they count after a choice that turned out to lose too much, at least."""

LOOSER = 1.25
"""A binding limit of cost that is so many times looser is looked at too, to say what it takes."""


@dataclass(frozen=True)
class Fitting:
    """What is fitted to what. ``measured`` and ``checked [N,T]`` are texts; their second halves are what counts.

    ``weights`` are the types that may be chosen, first the one that the original is taken to have. ``context`` is where
    speed counts if no limit says where; ``calibrate`` gives passes sequences that are in neither text.
    """

    original: Program
    limits: Limits
    target: Target
    weights: Sequence[str]
    threads: int | None
    context: int
    measured: Tensor
    checked: Tensor
    calibrate: Calibrate


@dataclass(frozen=True)
class Fitted:
    """What the limits are kept by: the passes, the type of the weights, and how that was found."""

    passes: tuple[Pass, ...]
    weights: str
    facts: FitFacts


def fit(fitting: Fitting, kept: Kept, progress: Progress) -> Fitted:
    """Return what keeps the limits best, and what was found on the way.

    Raises ``MemcError``: E209 when no choice keeps the limits, saying how close one comes; E208 for a limit of time on
    a target without rates; E307 when no pass has anything to offer for this model.
    """
    began, limits = time.perf_counter(), fitting.limits
    chooser = _chooser(fitting, kept, progress)
    yard = Yardstick(fitting.original, fitting.checked, fitting.checked.shape[1] // 2)
    factor, seen = 1.0, list[Fit]()
    best: tuple[Fit, Distance] | None = None
    with progress.step("choose, and measure the choice", ATTEMPTS) as advance:
        while len(seen) < ATTEMPTS:
            found = chooser.best(factor)
            if found is None or found in seen:
                break
            seen.append(found)
            (distance,) = yard.distances([_apply(fitting, chooser, found)])
            advance(1, f"KL {number(distance.kl_mean)}")
            holds = all(limit.used(_quality(limit, distance)) <= 1 for limit in limits.quality)
            if holds and (best is None or chooser.pace(found) < chooser.pace(best[0])):
                best = found, distance
            factor = _factor(limits, factor, found, distance, holds)
            if limits.costs and holds:
                break
    if best is None:
        raise _refusal(chooser, factor)
    facts = _facts(chooser, *best, factor, time.perf_counter() - began)
    return Fitted(tuple(told(_settings(chooser, best[0]), chooser.menu.present)), best[0].weights, facts)


def _chooser(fitting: Fitting, kept: Kept, progress: Progress) -> Chooser:
    limits, target = fitting.limits, fitting.target
    timed = next((limit for limit in limits.costs if limit.what == "decode"), None)
    if timed is not None and not target.memory_bandwidth:
        reason = f"target {target.name} has no rates to tell a time by"
        raise MemcError("E208", reason, f"--fit {timed.text}", "limit the state instead, or name another target")
    contexts = tuple(sorted({*limits.contexts, fitting.context}))
    first = fitting.measured.shape[1] // 2

    def yardstick() -> Yardstick:
        return Yardstick(fitting.original, fitting.measured, first)

    usage = Usage(
        partial(_helps, fitting), partial(_suffices, fitting, demands(fitting.original, contexts, fitting.weights[0]))
    )
    only_state = limits.costs and timed is None
    weights = fitting.weights[:1] if only_state else fitting.weights  # which are no part of the state
    place = kept, fitting.calibrate, progress
    menu = make_menu(fitting.original, target, contexts, weights, yardstick, first, usage, *place)
    if not menu.slots and len(menu.weights) == 1:
        reason = "no pass has anything to offer for a layer of this model"
        raise MemcError("E307", reason, fitting.original.model.source, "memc inspect MODEL --why")
    return Chooser(menu, limits, target, fitting.threads, fitting.context)


def _helps(fitting: Fitting, more: Mapping[int, Demand]) -> bool:
    """Tell whether a block takes less of anything that is limited, or where nothing of cost is, less time."""
    quick = bool(fitting.target.memory_bandwidth)
    wanted = [(limit.what == "state", limit.context) for limit in fitting.limits.costs] or [
        (not quick, fitting.context)
    ]
    return any(
        more[context].state_bytes < 0 if state else more[context].flops < 0 or more[context].bytes_read < 0
        for state, context in wanted
    )


def _suffices(fitting: Fitting, original: Mapping[int, Demand], asks: Mapping[int, Demand]) -> bool:
    """Tell whether there are limits of cost, and what is asked keeps them all with weights as they were."""
    costs, rest = fitting.limits.costs, (fitting.target, fitting.weights[0], fitting.threads)
    return bool(costs) and all(
        limit.used(cost_of(limit, asks, *rest), cost_of(limit, original, *rest)) <= 1 for limit in costs
    )


def _quality(limit: Limit, distance: Distance) -> float:
    return distance.ratio if limit.what == "ppl" else distance.kl_mean


def _factor(limits: Limits, factor: float, found: Fit, distance: Distance, holds: bool) -> float:
    """Return what the sum of the blocks' KL is to be multiplied with, by what one choice was measured to lose."""
    if not found.kl:
        return factor
    lost = [math.log(distance.ratio) if limit.what == "ppl" else distance.kl_mean for limit in limits.quality]
    shown = max([LEAST_FACTOR, *(nats / found.kl for nats in lost)])
    return shown if holds else max(shown, STRICTER * factor)


def _settings(chooser: Chooser, found: Fit) -> list[tuple[Setting, list[int]]]:
    """Return each setting that was picked with its layers, in the order of the menu."""
    return [
        (chooser.menu.settings[index], [layer for (layer, _), picked in found.picks.items() if picked == index])
        for index in sorted(set(found.picks.values()))
    ]


def _apply(fitting: Fitting, chooser: Chooser, found: Fit) -> Program:
    settings, present = _settings(chooser, found), chooser.menu.present
    return quantised(rewritten(fitting.original, fitting.target, settings, present, fitting.calibrate), found.weights)


def _facts(chooser: Chooser, found: Fit, distance: Distance, factor: float, seconds: float) -> FitFacts:
    menu, limits = chooser.menu, chooser.limits
    reached = []
    for limit in limits.limits:
        value = _quality(limit, distance) if limit.is_quality else chooser.reached(limit, found)
        original = 1.0 if limit.is_quality else chooser.reached(limit, chooser.original)
        reached.append(FitLimit(limit=limit.text, reached=value, original=original, used=limit.spent(value, original)))
    layers = [
        FitLayer(
            layer=slot[0],
            kind=slot[1],
            spec=menu.settings[found.picks[slot]].spec if slot in found.picks else "",
            kl={menu.settings[entry.setting].spec: entry.distance.kl_mean for entry in entries},
        )
        for slot, entries in menu.slots.items()
    ]
    binds = max(limits.limits, key=lambda limit: reached[limits.limits.index(limit)].used)
    looser = chooser.looser(binds, LOOSER, factor) if not binds.is_quality else None
    return FitFacts(
        limits=reached,
        layers=layers,
        weights=found.weights,
        weights_kl={kind: one.kl_mean for kind, one in menu.weights.items() if one.kl},
        kl_expected=found.kl,
        kl_mean=distance.kl_mean,
        perplexity_ratio=distance.ratio,
        tokens=distance.tokens,
        binds=binds.text,
        looser=LOOSER,
        kl_looser=looser,
        seconds=seconds,
    )


def _refusal(chooser: Chooser, factor: float) -> MemcError:
    """Say how close the nearest choice comes, and which limit would have to give way by how much."""
    limits, nearest = chooser.limits.limits, chooser.nearest(factor)
    assert nearest is not None
    reached = [_told(chooser, limit, nearest, factor) for limit in limits]
    ways = [
        f"{limit.text} by {share:.3g} times"
        for limit in limits
        if (share := chooser.instead(limit, factor)) is not None and share > 1
    ]
    hint = f"loosen {' or '.join(ways)}" if ways else "loosen more than one of them"
    where = f"--fit {','.join(limit.text for limit in limits)}"
    return MemcError("E209", f"no choice keeps the limits, the nearest has {', '.join(reached)}", where, hint)


def _told(chooser: Chooser, limit: Limit, nearest: Fit, factor: float) -> str:
    at, value = (
        f"{limit.what}@{limit.context}" if limit.context else limit.what,
        chooser.reached(limit, nearest, factor),
    )
    match limit.what:
        case "state":
            return f"{at} {size(value)}"
        case "decode":
            return f"{at} {number(value)} ms ({chooser.reached(limit, chooser.original) / value:.3g}x)"
        case "ppl":
            return f"{at} {value:.4g}x"
        case "kl":
            return f"{at} {number(value)}"

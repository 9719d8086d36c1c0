"""From limits to passes: measure every layer, choose, hold the choice against text it was not made on, choose again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from memc.analysis.sensitivity import Distance, Yardstick
from memc.errors import MemcError
from memc.fit.choose import Chooser, Fit
from memc.fit.limits import Limit, Limits
from memc.fit.menu import Kept, make_menu, rewritten, told
from memc.pipeline import Pass
from memc.program import Program
from memc.progress import Progress
from memc.report.files import FitFacts, FitLayer, FitLimit
from memc.report.text import number, size
from memc.target import Target

ATTEMPTS = 4
"""Choices that are held against the text at most, each with what the last one showed of how losses add up."""

LEAST_FACTOR = 0.1
"""Least that losses of single layers count when they are added up: one text may flatter a choice."""

STRICTER = 1.05
"""How much more they count after a choice that turned out to lose too much, at least."""


@dataclass(frozen=True)
class Fitting:
    """What is fitted to what. ``measured`` and ``checked [N,T]`` are texts; their second halves are what counts.

    ``context`` is where speed counts if no limit says where.
    """

    original: Program
    limits: Limits
    target: Target
    weights: str
    threads: int | None
    context: int
    measured: Tensor
    checked: Tensor

    @property
    def first(self) -> int:
        """The first token of a sequence that counts."""
        return self.measured.shape[1] // 2


def fit(fitting: Fitting, kept: Kept, progress: Progress) -> tuple[list[Pass], FitFacts]:
    """Return the passes that keep the limits best, and what was found on the way.

    Raises ``MemcError``: E209 when no choice keeps the limits, saying how close one comes; E208 for a limit of time on
    a target without rates; E307 when no pass has anything to offer for this model.
    """
    began, limits = time.perf_counter(), fitting.limits
    chooser = _chooser(fitting, kept, progress)
    yard = Yardstick(fitting.original, fitting.checked, fitting.first)
    factor, seen = 1.0, list[Mapping[int, int]]()
    best: tuple[Fit, Distance] | None = None
    with progress.step("choose, and measure the choice", ATTEMPTS) as advance:
        while len(seen) < ATTEMPTS:
            found = chooser.best(factor)
            if found is None or found.picks in seen:
                break
            seen.append(found.picks)
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
    return _passes(chooser, best[0]), _facts(chooser, *best, time.perf_counter() - began)


def _chooser(fitting: Fitting, kept: Kept, progress: Progress) -> Chooser:
    limits, target = fitting.limits, fitting.target
    timed = next((limit for limit in limits.costs if limit.what == "decode"), None)
    if timed is not None and not target.memory_bandwidth:
        reason = f"target {target.name} has no rates to tell a time by"
        raise MemcError("E208", reason, f"--fit {timed.text}", "limit the state instead, or name another target")
    contexts = tuple(sorted({*limits.contexts, fitting.context}))

    def yardstick() -> Yardstick:
        return Yardstick(fitting.original, fitting.measured, fitting.first)

    menu = make_menu(fitting.original, target, contexts, fitting.weights, yardstick, fitting.first, kept, progress)
    if not any(menu.layers.values()):
        reason = "no pass has anything to offer for a layer of this model"
        raise MemcError("E307", reason, fitting.original.model.source, "memc inspect MODEL --why")
    return Chooser(menu, limits, target, fitting.weights, fitting.threads, fitting.context)


def _quality(limit: Limit, distance: Distance) -> float:
    return distance.ratio if limit.what == "ppl" else distance.kl_mean


def _factor(limits: Limits, factor: float, found: Fit, distance: Distance, holds: bool) -> float:
    """Return what the sum of the layers' KL is to be multiplied with, by what one choice was measured to lose."""
    if not found.kl:
        return factor
    lost = [math.log(distance.ratio) if limit.what == "ppl" else distance.kl_mean for limit in limits.quality]
    shown = max([LEAST_FACTOR, *(nats / found.kl for nats in lost)])
    return shown if holds else max(shown, STRICTER * factor)


def _settings(chooser: Chooser, found: Fit) -> list[tuple[Pass, list[int]]]:
    """Return each setting that was picked with its layers, in the order of the menu."""
    by_setting = {
        index: [layer for layer, picked in found.picks.items() if picked == index]
        for index in sorted(set(found.picks.values()))
    }
    return [(chooser.menu.settings[index], layers) for index, layers in by_setting.items()]


def _passes(chooser: Chooser, found: Fit) -> list[Pass]:
    return told(_settings(chooser, found), chooser.menu.present)


def _apply(fitting: Fitting, chooser: Chooser, found: Fit) -> Program:
    return rewritten(fitting.original, fitting.target, _settings(chooser, found), chooser.menu.present)


def _facts(chooser: Chooser, found: Fit, distance: Distance, seconds: float) -> FitFacts:
    menu, limits = chooser.menu, chooser.limits
    reached = []
    for limit in limits.limits:
        value = _quality(limit, distance) if limit.is_quality else chooser.reached(limit, found.asks, 0.0)
        original = 1.0 if limit.is_quality else chooser.reached(limit, menu.original, 0.0)
        reached.append(FitLimit(limit=limit.text, reached=value, original=original, used=limit.used(value, original)))
    layers = [
        FitLayer(
            layer=layer,
            spec=menu.settings[found.picks[layer]].spec if layer in found.picks else "",
            kl={menu.settings[entry.setting].spec: entry.distance.kl_mean for entry in entries},
        )
        for layer, entries in menu.layers.items()
    ]
    return FitFacts(
        limits=reached,
        layers=layers,
        kl_expected=found.kl,
        kl_mean=distance.kl_mean,
        perplexity_ratio=distance.ratio,
        tokens=distance.tokens,
        seconds=seconds,
    )


def _refusal(chooser: Chooser, factor: float) -> MemcError:
    """Say how close the nearest choice comes, and which limit would have to give way by how much."""
    limits, nearest = chooser.limits.limits, chooser.nearest(factor)
    assert nearest is not None
    reached = [_told(chooser, limit, chooser.reached(limit, nearest.asks, factor * nearest.kl)) for limit in limits]
    ways = [
        f"{limit.text} by {share:.3g} times"
        for limit in limits
        if (share := chooser.instead(limit, factor)) is not None and share > 1
    ]
    hint = f"loosen {' or '.join(ways)}" if ways else "loosen more than one of them"
    where = f"--fit {','.join(limit.text for limit in limits)}"
    return MemcError("E209", f"no choice keeps the limits, the nearest has {', '.join(reached)}", where, hint)


def _told(chooser: Chooser, limit: Limit, value: float) -> str:
    at = f"{limit.what}@{limit.context}" if limit.context else limit.what
    match limit.what:
        case "state":
            return f"{at} {size(value)}"
        case "decode":
            before = chooser.reached(limit, chooser.menu.original, 0.0)
            return f"{at} {number(value)} ms ({before / value:.3g}x)"
        case "ppl":
            return f"{at} {value:.4g}x"
        case "kl":
            return f"{at} {number(value)}"

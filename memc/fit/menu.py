"""What every block may become: the settings on offer, what each costs, and how far it alone moves the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, field, replace
from functools import cache
from itertools import chain
from pathlib import Path

from memc.analysis.sensitivity import PRECISE, Distance, Yardstick
from memc.blocks import AttentionBlock, Block
from memc.cost import Demand, demands
from memc.errors import MemcError
from memc.fit.weights import quantised
from memc.partial import write_whole
from memc.pipeline import Calibration, Pass, Plan
from memc.plugins import load_plugin, registered
from memc.program import Program
from memc.progress import Progress
from memc.quantise import BITS
from memc.raising import find_blocks
from memc.relation import Close
from memc.target import Target

Slot = tuple[int, str]
"""A block that may become something else: its layer, and attention or feed_forward."""

Calibrate = Callable[[int, int], Calibration]
"""Gives at most so many sequences of so many tokens, to passes that ask for some."""


@dataclass(frozen=True)
class Setting:
    """A pass as it is on offer, and its plan, whose sites are of one kind of block."""

    pass_: Pass
    plan: Plan

    @property
    def kind(self) -> str:
        """The kind of block."""
        return self.plan.sites[0].kind

    @property
    def spec(self) -> str:
        """The spec string of the pass."""
        return self.pass_.spec

    def key(self, layer: int) -> str:
        """Name what is measured of it in a layer."""
        return f"{layer} {self.spec}"

    def alone(self, original: Program, layers: Sequence[int], calibrate: Calibrate) -> Iterator[tuple[int, Program]]:
        """Yield the original with each of ``layers`` alone rewritten."""
        plan = replace(self.plan, sites=tuple(site for site in self.plan.sites if site.layer in layers))
        wanted = self.pass_.calibrates()
        if wanted is not None:
            plan = replace(plan, calibration=calibrate(*wanted))
        yield from self.pass_.one_by_one(original, plan)


@dataclass(frozen=True)
class Entry:
    """A block as one of the settings leaves it: what a token asks more, by type of weights and context, and the KL."""

    setting: int
    more: Mapping[str, Mapping[int, Demand]]
    distance: Distance


@dataclass(frozen=True)
class Menu:
    """The settings on offer, what each block may become beside what it is, and what the original asks.

    ``weights`` has the distance of the original with weights of each type that may be chosen; ``original`` is by type
    and context. ``present`` are the layers that have a block of each kind.
    """

    settings: tuple[Setting, ...]
    slots: Mapping[Slot, tuple[Entry, ...]]
    weights: Mapping[str, Distance]
    original: Mapping[str, Mapping[int, Demand]]
    present: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Usage:
    """What limits make of costs by context: whether ``less`` of them helps, and whether so much is ``enough``."""

    less: Callable[[Mapping[int, Demand]], bool]
    enough: Callable[[Mapping[int, Demand]], bool]


def offered() -> tuple[Pass, ...]:
    """Return the settings that the known passes offer, in the order of their names."""
    found: list[Pass] = []
    for name in sorted(registered("memc.passes")):
        kind: type[Pass] = load_plugin("memc.passes", name)
        found += kind.from_options({}).offers()
    return tuple(found)


@dataclass
class Kept:
    """Distances by layer and setting in a file, so that each is measured once; None keeps nothing."""

    path: Path | None
    found: dict[str, Distance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there; a file that does not parse is no file."""
        try:
            held = json.loads(self.path.read_text()) if self.path is not None else {}
            self.found = {key: Distance(*values) for key, values in held.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.found = {}

    def save(self) -> None:
        """Write everything, whole or not at all; where it cannot be written it is measured again next time."""
        if self.path is None:
            return
        held = {key: astuple(one) for key, one in self.found.items()}
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps(held) + "\n")


def make_menu(
    original: Program,
    target: Target,
    contexts: Sequence[int],
    weights: Sequence[str],
    yardstick: Callable[[], Yardstick],
    shown: int,
    usage: Usage,
    kept: Kept,
    calibrate: Calibrate,
    progress: Progress,
) -> Menu:
    """Apply every setting on offer to every block alone and measure it, unless ``kept`` has it.

    ``shown`` is the first token that the yardstick looks at: a setting that is exact up to a later one is left out,
    since what it loses does not show. So is one that by ``usage`` takes less of nothing that is limited, and one that
    has no use because a dearer setting of the same pass, in all layers, is cheap enough: within a pass, what costs less
    loses more.
    """
    blocks: dict[Slot, Block] = {(block.layer, block.kind): block for block in find_blocks(original)}
    present = {kind: tuple(sorted(layer for layer, of in blocks if of == kind)) for kind in {of for _, of in blocks}}

    def costs(program: Program) -> dict[str, dict[int, Demand]]:
        return {kind: demands(program, contexts, kind) for kind in weights}

    asks, more = costs(original), dict[tuple[str, str], Mapping[str, Mapping[int, Demand]]]()

    def asks_more(slot: Slot, setting: Setting) -> Mapping[str, Mapping[int, Demand]]:
        key = _shape(blocks[slot]), setting.spec
        if key not in more:
            result = costs(rewritten(original, target, [(setting, [slot[0]])], present))
            more[key] = {kind: {c: result[kind][c] - asks[kind][c] for c in contexts} for kind in weights}
        return more[key]

    def useful(setting: Setting) -> bool:
        return any(usage.less(one) for one in by_site(setting))

    def by_site(setting: Setting) -> list[Mapping[int, Demand]]:
        return [asks_more((site.layer, site.kind), setting)[weights[0]] for site in setting.plan.sites]

    def enough(setting: Setting) -> bool:
        asked = {c: sum((more[c] for more in by_site(setting)), asks[weights[0]][c]) for c in contexts}
        return usage.enough(asked)

    def cheaper(setting: Setting, other: Setting) -> bool:
        pairs = list(zip(by_site(setting), by_site(other), strict=True))
        less = (usage.less({c: mine[c] - its[c] for c in contexts}) for mine, its in pairs)
        return all(less) and not any(usage.less({c: its[c] - mine[c] for c in contexts}) for mine, its in pairs)

    def spared(setting: Setting) -> bool:
        alike = (one for one in found if (one.pass_.name, one.plan.sites) == (setting.pass_.name, setting.plan.sites))
        return any(cheaper(setting, one) and enough(one) for one in alike)

    found = tuple(filter(useful, _on_offer(original, target, shown)))
    settings = tuple(setting for setting in found if not spared(setting))
    maker = _Measuring(original, settings, cache(yardstick), kept, calibrate, progress)
    types = {kind: maker.of_weights(kind) for kind in weights}
    maker.run()
    slots: dict[Slot, tuple[Entry, ...]] = {}
    for slot in sorted(blocks):
        entries = []
        for index, setting in enumerate(settings):
            distance = kept.found.get(setting.key(slot[0]))
            if distance is None or not any((site.layer, site.kind) == slot for site in setting.plan.sites):
                continue
            entries.append(Entry(index, asks_more(slot, setting), distance))
        slots[slot] = tuple(entries)
    return Menu(settings, {slot: found for slot, found in slots.items() if found}, types, asks, present)


def _on_offer(original: Program, target: Target, shown: int) -> Iterator[Setting]:
    """Yield the settings that find something to rewrite: first those that leave a block for the next one."""
    found = []
    for pass_ in offered():
        try:
            plan = pass_.plan(original, target)
        except MemcError as error:
            if error.code != "E203":  # an amount that no block of this model can lose
                raise
            continue
        if plan.sites and _exact_to(plan) <= shown:
            found.append(Setting(pass_, plan))
    yield from sorted(found, key=lambda setting: not setting.pass_.keeps_form())


@dataclass
class _Measuring:
    """Measures what is not known yet, layer after layer, so that the original runs through the text once."""

    original: Program
    settings: Sequence[Setting]
    yardstick: Callable[[], Yardstick]
    kept: Kept
    calibrate: Calibrate
    progress: Progress

    def of_weights(self, kind: str) -> Distance:
        """Return the distance of the original with weights of a type: none, where they are not quantised."""
        key = f"weights {kind}"
        if kind not in BITS:
            return Distance(tokens=1)
        if key not in self.kept.found:
            with self.progress.step(f"measure what weights in {kind} lose"):
                (found,) = self.yardstick().distances([quantised(self.original, kind)], precise=PRECISE)
            self.kept.found[key] = found
            self.kept.save()
        return self.kept.found[key]

    def run(self) -> None:
        """Measure every setting in every layer that it has a site in."""
        missing = [
            [layer for layer in _layers(setting) if setting.key(layer) not in self.kept.found]
            for setting in self.settings
        ]
        made: list[Iterator[Program]] = [
            (program for _, program in setting.alone(self.original, layers, self.calibrate))
            for setting, layers in zip(self.settings, missing, strict=True)
        ]
        for index, setting in enumerate(self.settings):
            if missing[index] and setting.pass_.calibrates() is not None:
                with self.progress.step(f"fit {setting.spec} to the text"):
                    first = self._next(index, made[index], missing)
                made[index] = chain([first] if first is not None else [], made[index])
        with self.progress.step("measure what each block loses", sum(map(len, missing))) as advance:
            for layer in sorted({layer for layers in missing for layer in layers}):
                open_ = [index for index, layers in enumerate(missing) if layer in layers]
                programs = {index: found for index in open_ if (found := self._next(index, made[index], missing))}
                if not programs:
                    continue
                measured = self.yardstick().distances(list(programs.values()), precise=PRECISE)
                for index, distance in zip(programs, measured, strict=True):
                    self.kept.found[self.settings[index].key(layer)] = distance
                self.kept.save()
                advance(len(programs), f"layer {layer}")

    def _next(self, index: int, made: Iterator[Program], missing: list[list[int]]) -> Program | None:
        """Return the next program of a setting; of one that the text does not suffice for, nothing, and no more."""
        try:
            return next(made)
        except MemcError as error:
            if error.code != "E207":
                raise
            self.progress.note(f"{self.settings[index].spec} is left out: {error.message}")
            missing[index].clear()
            return None


def rewritten(
    original: Program,
    target: Target,
    chosen: Sequence[tuple[Setting, Sequence[int]]],
    present: Mapping[str, Sequence[int]],
    calibrate: Calibrate | None = None,
) -> Program:
    """Apply settings one after the other, each to its layers; without ``calibrate`` to the shapes alone."""
    program = original
    for pass_ in told(chosen, present):
        plan = pass_.plan(program, target)
        if calibrate is not None and (wanted := pass_.calibrates()) is not None:
            plan = replace(plan, calibration=calibrate(*wanted))
        program, _ = pass_.apply(program, plan)
    return program


def told(chosen: Sequence[tuple[Setting, Sequence[int]]], present: Mapping[str, Sequence[int]]) -> list[Pass]:
    """Return the passes, each told its layers: a block that one has turned into another is not there for the next."""
    passes, left = [], {kind: set(layers) for kind, layers in present.items()}
    for setting, layers in chosen:
        passes.append(setting.pass_.only(layers, left[setting.kind]))
        if not setting.pass_.keeps_form():
            left[setting.kind] -= set(layers)
    return passes


def _layers(setting: Setting) -> list[int]:
    return sorted({site.layer for site in setting.plan.sites})


def _exact_to(plan: Plan) -> int:
    return max((one.tokens for one in plan.relations if isinstance(one, Close) and one.tokens), default=0)


def _shape(block: Block) -> str:
    """Say what the cost of a block depends on."""
    if isinstance(block, AttentionBlock):
        return repr((block.num_heads, block.num_kv_heads, block.head_dim, block.value_dim, block.mask))
    return repr((block.width, block.hidden, block.gate is not None))

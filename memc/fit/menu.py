"""What every layer may become: the settings on offer, what each costs, and how far it alone moves the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path

from memc import sites
from memc.analysis.sensitivity import Distance, Yardstick
from memc.blocks import AttentionBlock
from memc.cost import Demand, demands
from memc.pipeline import Pass, Plan
from memc.plugins import load_plugin, registered
from memc.program import Program
from memc.progress import Progress
from memc.relation import Close
from memc.target import Target


@dataclass(frozen=True)
class Entry:
    """One layer as one of the settings leaves it: what a token then asks for more, by context, and the distance."""

    setting: int
    more: Mapping[int, Demand]
    distance: Distance


@dataclass(frozen=True)
class Menu:
    """The settings on offer, what each layer may become beside what it is, and what the original asks, by context."""

    settings: tuple[Pass, ...]
    layers: Mapping[int, tuple[Entry, ...]]
    original: Mapping[int, Demand]
    present: tuple[int, ...]


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
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(held) + "\n")
            partial.replace(self.path)
        except OSError:
            partial.unlink(missing_ok=True)


def make_menu(
    original: Program,
    target: Target,
    contexts: Sequence[int],
    weights: str,
    yardstick: Callable[[], Yardstick],
    shown: int,
    kept: Kept,
    progress: Progress,
) -> Menu:
    """Apply every setting on offer to every layer alone and measure it, unless ``kept`` has it.

    ``shown`` is the first token that the yardstick looks at: a setting that is exact up to a later one is left out,
    since what it loses does not show.
    """
    settings, plans = [], []
    for setting in offered():
        plan = setting.plan(original, target)
        if plan.sites and _exact_to(plan) <= shown:
            settings.append(setting)
            plans.append(plan)
    blocks = {block.layer: block for block in sites.attention_blocks(original)}
    makes = _Makes(original, target, tuple(settings), tuple(blocks))
    asks = demands(original, contexts, weights)
    more: dict[tuple[str, int], Mapping[int, Demand]] = {}
    layers: dict[int, tuple[Entry, ...]] = {}
    yard = cache(yardstick)
    with progress.step("measure what each layer loses", sum(len(plan.sites) for plan in plans)) as advance:
        for layer, block in blocks.items():
            fits = [i for i, plan in enumerate(plans) if any(site.layer == layer for site in plan.sites)]
            missing = [index for index in fits if _key(layer, settings[index]) not in kept.found]
            if missing:
                measured = yard().distances([makes(layer, index) for index in missing])
                kept.found |= {_key(layer, settings[i]): one for i, one in zip(missing, measured, strict=True)}
                kept.save()
            for index in fits:
                if (_shape(block), index) not in more:
                    result = demands(makes(layer, index), contexts, weights)
                    more[_shape(block), index] = {c: result[c] - asks[c] for c in contexts}
            layers[layer] = tuple(
                Entry(index, more[_shape(block), index], kept.found[_key(layer, settings[index])]) for index in fits
            )
            advance(len(fits))
            makes.forget()
    return Menu(tuple(settings), layers, asks, tuple(blocks))


@dataclass
class _Makes:
    """Applies settings to one layer at a time, each once."""

    original: Program
    target: Target
    settings: tuple[Pass, ...]
    present: tuple[int, ...]
    made: dict[tuple[int, int], Program] = field(default_factory=dict)

    def __call__(self, layer: int, setting: int) -> Program:
        if (layer, setting) not in self.made:
            self.made[layer, setting] = rewritten(
                self.original, self.target, [(self.settings[setting], [layer])], self.present
            )
        return self.made[layer, setting]

    def forget(self) -> None:
        self.made.clear()


def rewritten(
    original: Program, target: Target, chosen: Sequence[tuple[Pass, Sequence[int]]], present: Sequence[int]
) -> Program:
    """Apply settings one after the other, each to its layers."""
    program = original
    for pass_ in told(chosen, present):
        program, _ = pass_.apply(program, pass_.plan(program, target))
    return program


def told(chosen: Sequence[tuple[Pass, Sequence[int]]], present: Sequence[int]) -> list[Pass]:
    """Return the passes, each told its layers: what an earlier one has rewritten is not there for the next."""
    passes, left = [], set(present)
    for setting, layers in chosen:
        passes.append(setting.only(layers, left))
        left -= set(layers)
    return passes


def _exact_to(plan: Plan) -> int:
    return max((one.tokens for one in plan.relations if isinstance(one, Close) and one.tokens), default=0)


def _key(layer: int, setting: Pass) -> str:
    return f"{layer} {setting.spec}"


def _shape(block: AttentionBlock) -> str:
    """Say what the cost of an attention depends on."""
    return repr((block.num_heads, block.num_kv_heads, block.head_dim, block.value_dim, block.mask))

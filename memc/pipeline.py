"""Passes: what they plan, what they report, and the pipeline that runs and checks them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor

from memc.objective import BlockObjective
from memc.options import Configurable, split_spec
from memc.options import option as option  # what passes declare their options with
from memc.plugins import load_plugin
from memc.program import Program
from memc.relation import Close, Relation
from memc.target import Target


@dataclass(frozen=True)
class Site:
    """One block that a pass will rewrite, but for the key-value heads ``kept`` and the query heads that read them."""

    layer: int
    path: str
    kind: str
    kept: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rejection:
    """One block that a pass leaves alone, and why; ``code`` is one of those in the pass's "Does not handle" list."""

    layer: int
    path: str
    kind: str
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """Sequences that a pass may look at what the model does on: ``tokens`` and ``positions [N, T]``, and from where."""

    tokens: Tensor
    positions: Tensor
    origin: str


@dataclass(frozen=True)
class Plan:
    """What a pass is going to do: made without weights, and the same when made twice.

    ``calibration`` is what the pass asked for by :meth:`Pass.calibrates`; a conversion adds it before it applies.
    """

    spec: str
    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    relations: tuple[Relation, ...]
    calibration: Calibration | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PassReport:
    """What a pass did. ``details`` holds per-site facts as JSON values, keyed by layer, and what it was resolved from.

    ``objectives`` tells how what was added is trained, one for each site; they are of the result's own nodes.
    ``learns`` names new parameters that learn the text itself, everything else frozen: there is nothing that they stand
    for and could imitate. ``recovers`` tells that the pass added nothing to train and took away what adapters on the
    projections that are left can win back: the result is still made of blocks that raising finds. ``adapts`` tells that
    it added nothing to train and made another function of its blocks, to which adapters on their projections can fit
    the model.
    """

    spec: str
    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    relations: tuple[Relation, ...]
    new_parameters: int = 0
    untrained: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    objectives: tuple[BlockObjective, ...] = ()
    learns: tuple[str, ...] = ()
    recovers: bool = False
    adapts: bool = False

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return bool(self.objectives or self.learns) or self.recovers or self.adapts

    @property
    def exact(self) -> int:
        """Leading tokens of a sequence that are right by construction, untrained."""
        return max((each.tokens or 0 for each in self.relations if isinstance(each, Close)), default=0)


@dataclass(frozen=True)
class Pass(Configurable, ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses whose fields are their options.

    A field carries its documentation as ``dataclasses.field(metadata={"help": ..., "unit": ..., "min": ..., "max": ...,
    "choices": ...})``, built with :func:`option`. The spec string ``name:option=value,...`` round-trips.
    """

    noun = "pass"

    @abstractmethod
    def plan(self, program: Program, target: Target) -> Plan:
        """Decide which blocks to rewrite. Pure; parameters may be fake."""

    @abstractmethod
    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        """Rewrite the plan's sites and return a new program; the one given stays as it was."""

    def open_share(self) -> float | None:
        """Return the share of the sites that are to stay as they are, which ones being left to training.

        None when the options settle everything. Until it is settled such a pass rewrites every site.
        """
        return None

    def resolve(self, program: Program, target: Target) -> tuple[Self, dict[str, Any]]:
        """Settle what the weights of ``program`` settle and no data are needed for.

        Returns the pass with nothing of the kind open, whose spec string says what was chosen, and what was found, for
        the details of the report under names of its own. Until it is resolved such a pass plans as much, evenly spread.
        """
        return self, {}

    def calibrates(self) -> tuple[int, int] | None:
        """Return how many sequences, of how many tokens, ``apply`` is to see of the conversion's text; None for none.

        It may get fewer, and none at all where only a plan is made: then it decides evenly, to the same shapes.
        """
        return None

    def quickens(self) -> bool:
        """Tell whether the pass is there to make a token take less time, so that what takes more is refused."""
        return False

    def keeps_form(self) -> bool:
        """Tell whether a block that it rewrites is still one of its kind, which a pass after it finds."""
        return False

    def trained_relations(self, plan: Plan) -> tuple[Relation, ...]:
        """Return what holds once training is over, instead of the plan's own relations."""
        return plan.relations

    def needs_training(self) -> str | None:
        """Return the option, as written, that only training can settle, or None."""
        return None

    def offers(self) -> tuple[Self, ...]:
        """Return the settings among which a conversion that is to fit limits chooses for every layer.

        None unless the pass needs no training and can be told by :meth:`only` which layers to rewrite. The sites of a
        setting are blocks of one kind.
        """
        return ()

    def one_by_one(self, program: Program, plan: Plan) -> Iterator[tuple[int, Program]]:
        """Yield, for each layer of the plan's sites in order, the program with that layer alone rewritten.

        As :meth:`apply` would, given that layer's sites; a pass whose layers share what calibration text shows, looks
        at it once.
        """
        for layer in sorted({site.layer for site in plan.sites}):
            alone = replace(plan, sites=tuple(site for site in plan.sites if site.layer == layer))
            yield layer, self.apply(program, alone)[0]

    def only(self, layers: Collection[int], present: Collection[int]) -> Self:
        """Return the pass rewriting ``layers`` alone of those ``present``; ``TypeError`` where it offers nothing."""
        raise TypeError(f"pass {self.name!r} cannot be told which layers to rewrite")

    def settle(self, layers: Iterable[int]) -> Self:
        """Return the pass with the layers named that stay as they are; raises ``TypeError`` if nothing is open."""
        raise TypeError(f"pass {self.name!r} leaves nothing open")


def parse_spec(spec: str) -> Pass:
    """Build a pass from ``name`` or ``name:option=value,...``; a comma inside brackets does not separate.

    Raises ``MemcError`` E202 for an unknown pass and E203 for a bad option.
    """
    name, options = split_spec(spec)
    cls: type[Pass] = load_plugin("memc.passes", name)
    return cls.from_options(options)

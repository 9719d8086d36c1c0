"""Passes: what they plan, what they report, and the pipeline that runs and checks them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from memc.errors import MemcError
from memc.objective import BlockObjective
from memc.plugins import did_you_mean, load_plugin
from memc.program import Program
from memc.relation import Relation
from memc.target import Target


@dataclass(frozen=True)
class Site:
    """One block that a pass will rewrite."""

    layer: int
    path: str
    kind: str


@dataclass(frozen=True)
class Rejection:
    """One block that a pass leaves alone, and why; ``code`` is one of those in the pass's "Does not handle" list."""

    layer: int
    path: str
    kind: str
    code: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a pass is going to do: made without weights, and the same when made twice."""

    spec: str
    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    relations: tuple[Relation, ...]


@dataclass(frozen=True)
class PassReport:
    """What a pass did. ``details`` holds per-site facts as JSON values, keyed by layer.

    ``objectives`` tells how what was added is trained, one for each site; they are of the result's own nodes.
    """

    spec: str
    sites: tuple[Site, ...]
    rejections: tuple[Rejection, ...]
    relations: tuple[Relation, ...]
    new_parameters: int = 0
    untrained: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    objectives: tuple[BlockObjective, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a program. Subclasses are frozen dataclasses whose fields are their options.

    A field carries its documentation as ``dataclasses.field(metadata={"help": ..., "unit": ..., "min": ..., "max": ...,
    "choices": ...})``, built with :func:`option`. The spec string ``name:option=value,...`` round-trips.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every option against its bounds."""
        for spec in dataclasses.fields(self):
            check_option(self.name, spec, getattr(self, spec.name))

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

    def trained_relations(self, plan: Plan) -> tuple[Relation, ...]:
        """Return what holds once training is over, instead of the plan's own relations."""
        return plan.relations

    def needs_training(self) -> str | None:
        """Return the option, as written, that only training can settle, or None."""
        return None

    def settle(self, layers: Iterable[int]) -> Self:
        """Return the pass with the layers named that stay as they are; raises ``TypeError`` if nothing is open."""
        raise TypeError(f"pass {self.name!r} leaves nothing open")

    @property
    def spec(self) -> str:
        """Spec string with the options that differ from their defaults."""
        parts = [
            f"{f.name}={format_option(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (":" + ",".join(parts) if parts else "")

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        """Build the pass from option values, text or typed.

        Raises ``MemcError`` E203 for an unknown option or a value that does not fit.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for key, value in options.items():
            name = key.replace("-", "_")
            if name not in fields:
                raise MemcError("E203", f"pass {cls.name!r} has no option {key!r}", next=did_you_mean(key, fields))
            values[name] = parse_option(cls.name, fields[name], value)
        return cls(**values)


def option(default: Any, help: str, **bounds: Any) -> Any:
    """Declare an option of a pass: its default, what it means, and ``unit``, ``min``, ``max`` or ``choices``."""
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def format_option(value: Any) -> str:
    """Render an option's value as the spec string has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_option(pass_name: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    """Turn text into the type of the option's default; other values pass through."""
    if not isinstance(value, str) or isinstance(spec.default, str):
        return value if not isinstance(spec.default, str) else format_option(value)
    kind: Any = type(spec.default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        where = f"{pass_name}:{spec.name}={value}"
        raise MemcError("E203", f"option {spec.name!r} takes {kind.__name__}", where=where) from None


def check_option(pass_name: str, spec: dataclasses.Field[Any], value: Any) -> None:
    """Check a value against the option's bounds; raises ``MemcError`` E203."""
    limits = spec.metadata
    where = f"{pass_name}:{spec.name}={format_option(value)}"
    if type(value) is not type(spec.default) and not (isinstance(spec.default, float) and isinstance(value, int)):
        raise MemcError("E203", f"option {spec.name!r} takes {type(spec.default).__name__}", where=where)
    if "choices" in limits and value not in limits["choices"]:
        raise MemcError("E203", f"option {spec.name!r} is one of {', '.join(limits['choices'])}", where=where)
    low, high = limits.get("min"), limits.get("max")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise MemcError("E203", f"option {spec.name!r} is {bounds}", where=where)


def parse_spec(spec: str) -> Pass:
    """Build a pass from ``name`` or ``name:option=value,...``; a comma inside brackets does not separate.

    Raises ``MemcError`` E202 for an unknown pass and E203 for a bad option.
    """
    name, _, text = spec.partition(":")
    cls: type[Pass] = load_plugin("memc.passes", name)
    options: dict[str, Any] = {}
    for part in split_options(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise MemcError("E203", f"option {part!r} has no value", where=spec, next=f"write {name}:{part}=VALUE")
        options[key.strip()] = value.strip()
    return cls.from_options(options)


def split_options(text: str) -> Iterable[str]:
    """Split at commas outside brackets."""
    depth, start = 0, 0
    for index, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    if text[start:]:
        yield text[start:]

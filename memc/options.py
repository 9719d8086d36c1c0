"""Things that a person configures by a spec string, ``name:option=value,...``: passes, and tasks of an evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from memc.arguments import LARGEST
from memc.errors import MemcError
from memc.plugins import did_you_mean


@dataclass(frozen=True)
class Configurable:
    """A frozen dataclass whose fields, declared with :func:`option`, are its options; its spec string round-trips."""

    noun: ClassVar[str]
    """What it is called in a message: pass or task."""
    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check every option against its bounds."""
        for spec in dataclasses.fields(self):
            check_option(self.name, spec, getattr(self, spec.name))

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
        """Build it from option values, text or typed.

        Raises ``MemcError`` E203 for an unknown option or a value that does not fit.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for key, value in options.items():
            name = key.replace("-", "_")
            if name not in fields:
                what = f"{cls.noun} {cls.name!r} has no option {key!r}"
                raise MemcError("E203", what, next=did_you_mean(key, fields))
            values[name] = parse_option(cls.name, fields[name], value)
        return cls(**values)


def option(default: Any, help: str, **bounds: Any) -> Any:
    """Declare an option: its default, what it means, and ``unit``, ``min``, ``max`` or ``choices``."""
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


def format_option(value: Any) -> str:
    """Render an option's value as the spec string has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_option(owner: str, spec: dataclasses.Field[Any], value: Any) -> Any:
    """Turn text into the type of the option's default, ``25%`` into 0.25; other values pass through."""
    if not isinstance(value, str) or isinstance(spec.default, str):
        return value if not isinstance(spec.default, str) else format_option(value)
    kind: Any = type(spec.default)
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        if kind is float and value.endswith("%"):
            return float(value[:-1]) / 100
        return kind(value)
    except (KeyError, ValueError):
        where = f"{owner}:{spec.name}={value}"
        raise MemcError("E203", f"option {spec.name!r} takes {kind.__name__}", where=where) from None


def check_option(owner: str, spec: dataclasses.Field[Any], value: Any) -> None:
    """Check a value against the option's bounds; raises ``MemcError`` E203."""
    limits = spec.metadata
    where = f"{owner}:{spec.name}={format_option(value)}"
    if type(value) is not type(spec.default) and not (isinstance(spec.default, float) and isinstance(value, int)):
        raise MemcError("E203", f"option {spec.name!r} takes {type(spec.default).__name__}", where=where)
    if "choices" in limits and value not in limits["choices"]:
        raise MemcError("E203", f"option {spec.name!r} is one of {', '.join(limits['choices'])}", where=where)
    low, high = limits.get("min"), limits.get("max")
    if type(value) is int and high is None and value > LARGEST:
        low, high = low or 0, LARGEST
    if isinstance(value, float) and not math.isfinite(value):
        raise MemcError("E203", f"option {spec.name!r} takes a finite number", where=where)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise MemcError("E203", f"option {spec.name!r} is {bounds}", where=where)


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name:option=value,...`` into name and options. Raises ``MemcError`` E203 where a value is missing."""
    name, _, text = spec.partition(":")
    options: dict[str, str] = {}
    for part in split_options(text):
        key, equals, value = part.partition("=")
        if not equals:
            raise MemcError("E203", f"option {part!r} has no value", where=spec, next=f"write {name}:{part}=VALUE")
        options[key.strip()] = value.strip()
    return name, options


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

"""Limits that a conversion is to keep, as text: ``state@32k<=64MiB,decode@32k>=2x,ppl<=1.05x``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memc.arguments import LARGEST
from memc.errors import MemcError
from memc.plugins import did_you_mean

if TYPE_CHECKING:
    from memc.recipe import Recipe

CONTEXT = 32_768
"""Tokens at which state and decoding are looked at unless a limit says where."""

Quantity = Literal["state", "decode", "ppl", "kl"]

HELP = (
    "limits, all of which are to hold: state[@N]<=SIZE|Rx, decode[@N]>=Rx or <=Tms (at a context of N tokens),"
    " ppl<=Rx, kl<=NATS; Rx is times the original"
)

_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_FORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "state": {"<=": (*_BYTES, "x")},
    "decode": {">=": ("x",), "<=": ("ms", "x")},
    "ppl": {"<=": ("x",)},
    "kl": {"<=": ("",)},
}
_LIMIT = re.compile(
    r"(?P<what>[a-z]+)(?:@(?P<context>[1-9][0-9]*)(?P<kilo>k?))?(?P<sign><=|>=)"
    r"(?P<value>[0-9]+(?:\.[0-9]+)?)(?P<unit>[A-Za-z]*)"
)


@dataclass(frozen=True)
class Limit:
    """One limit. ``most`` is in bytes, milliseconds, nats, or times the original where ``relative``.

    A limit that asks for at least so many times the speed is kept as the most that the time may be. ``context`` is 0
    where the limit is about quality.
    """

    text: str
    what: Quantity
    context: int
    most: float
    relative: bool

    @property
    def is_quality(self) -> bool:
        """Whether it is about how near the outputs stay, not about what a token costs."""
        return self.what in ("ppl", "kl")

    def used(self, value: float, original: float = 1.0) -> float:
        """Return the share of the limit that ``value`` uses: at most 1 where it holds."""
        return value / (self.most * original if self.relative else self.most)

    def spent(self, value: float, original: float = 1.0) -> float:
        """Return the share of what it allows: as :meth:`used`, but of a perplexity what is over the original's."""
        if self.what == "ppl" and self.most > 1:
            return max(math.log(value), 0.0) / math.log(self.most)
        return self.used(value, original)


@dataclass(frozen=True)
class Limits:
    """All limits of one conversion."""

    limits: tuple[Limit, ...]

    @property
    def costs(self) -> tuple[Limit, ...]:
        """Those about what a token costs."""
        return tuple(limit for limit in self.limits if not limit.is_quality)

    @property
    def quality(self) -> tuple[Limit, ...]:
        """Those about how near the outputs stay."""
        return tuple(limit for limit in self.limits if limit.is_quality)

    @property
    def contexts(self) -> tuple[int, ...]:
        """The contexts that the limits speak of."""
        return tuple(sorted({limit.context for limit in self.costs}))

    def budgets(self) -> Mapping[str, float]:
        """Return the quality limits as budgets of verification, by metric."""
        names = {"ppl": "perplexity_ratio", "kl": "kl_mean"}
        return {names[limit.what]: limit.most for limit in self.quality}


def parse_limits(text: str, context: int | None = None) -> Limits:
    """Read limits; those that name no context are at ``context``, or at ``CONTEXT``.

    Raises ``MemcError`` E200 for anything that is not a limit, or two of one quantity at one place.
    """
    found: list[Limit] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        limit = _parse(part, context or CONTEXT)
        if any((limit.what, limit.context) == (other.what, other.context) for other in found):
            raise _refusal(f"two limits of {limit.what} at one place", part, "keep the one that is meant")
        found.append(limit)
    if not found:
        raise _refusal("there is no limit", text, "for example --fit 'state<=0.25x,ppl<=1.05x'")
    return Limits(tuple(found))


def read_limits(recipe: Recipe) -> Limits | None:
    """Return the limits of a recipe, None where it has none.

    Raises ``MemcError`` E200 for limits that are none, or that come with what they are to choose.
    """
    if recipe.fit is None:
        return None
    limits = parse_limits(recipe.fit, recipe.context)
    where = f"--fit {recipe.fit}"
    if recipe.passes:
        raise MemcError("E200", "limits choose the passes, and there are passes", where, "leave out one of the two")
    if recipe.data and recipe.tokens:
        raise MemcError("E200", "what limits choose from needs no training", where, "leave out --tokens")
    return limits


def _parse(part: str, context: int) -> Limit:
    match = _LIMIT.fullmatch(re.sub(r"\s+", "", part))
    if match is None:
        raise _refusal("this is not a limit", part, HELP)
    what, sign, unit = match["what"], match["sign"], match["unit"]
    if what not in _FORMS:
        raise _refusal(f"limit of an unknown quantity {what!r}", part, did_you_mean(what, _FORMS))
    if sign not in _FORMS[what]:
        raise _refusal(f"{what} is limited by {' or '.join(_FORMS[what])}", part, HELP)
    if unit not in _FORMS[what][sign]:
        units = ", ".join(repr(name) for name in _FORMS[what][sign])
        raise _refusal(f"{what}{sign} takes a value in {units}", part, HELP)
    if what in ("ppl", "kl") and match["context"]:
        raise _refusal(
            f"{what} is measured on text, not at a context", part, f"write {what}{sign}{match['value']}{unit}"
        )
    value = float(match["value"])
    if value <= 0:
        raise _refusal("a limit is over 0", part, HELP)
    at = int(match["context"]) * (1024 if match["kilo"] else 1) if match["context"] else context
    if at > LARGEST:
        raise _refusal(f"a context is at most {LARGEST} tokens", part, HELP)
    most = 1 / value if sign == ">=" else value * _BYTES.get(unit, 1)
    return Limit(part, what, 0 if what in ("ppl", "kl") else at, most, unit == "x")  # type: ignore[arg-type]


def _refusal(reason: str, where: str, hint: str) -> MemcError:
    return MemcError("E200", reason, f"--fit {where}", hint)

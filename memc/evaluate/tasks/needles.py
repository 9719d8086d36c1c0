"""Needles in a haystack: a passkey in noise, and the kinds of RULER (arXiv 2404.06654), in words of our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memc.errors import MemcError
from memc.evaluate.tasks.base import DEPTHS, Sample, Task, Words
from memc.evaluate.tasks.lexicon import NOISE, names, sentence
from memc.evaluate.tasks.prose import Part, fit
from memc.options import option

Needle = tuple[float, str]
"""How deep it stands, from 0 to 1, and its text."""


@dataclass(frozen=True)
class Passkey(Task):
    """A number of five digits in repeated noise (arXiv 2305.16300), at every depth."""

    name = "passkey"
    summary = "a number of five digits in repeated noise"

    @property
    def depths(self) -> tuple[float, ...]:
        """The whole grid."""
        return DEPTHS

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        key = str(random.integers(10_000, 100_000))
        needle = f" The pass key is {key}. Remember it: {key} is the pass key."
        head = Part("A pass key is hidden in this text. Find it and remember it: you will be asked for it.")
        asked = [Part("\n\nWhat is the pass key? The pass key is "), Part(key, answer=True, depth=depth)]

        def build(units: int) -> list[Part]:
            hay = [NOISE[n % len(NOISE)] for n in range(units)]
            return [head, *haystack(hay, [(depth or 0.0, needle)]), *asked]

        return fit(self, words, length, build)


@dataclass(frozen=True)
class NeedleSingle(Task):
    """One number of one thing, among sentences that tell nothing.

    The base of its family: ``keys`` things have ``values`` numbers each, and ``queries`` of the things are asked for.
    Where one number is asked for it stands at every depth in turn, else they all stand at depths drawn at random.
    """

    name = "needle_single"
    summary = "the number of one thing"

    keys: int = option(1, "things that have numbers", min=1, max=64)
    values: int = option(1, "numbers of each thing", min=1, max=64)
    queries: int = option(1, "things that are asked for", min=1, max=64)

    @property
    def depths(self) -> tuple[float | None, ...]:
        """The whole grid where one number is asked for."""
        return DEPTHS if self.queries * self.values == 1 else (None,)

    @property
    def chance(self) -> float | None:
        """One of the numbers in the text."""
        numbers = self.keys * self.values
        return 1 / numbers if numbers > 1 else None

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        if self.queries > self.keys:
            what = f"{self.queries} queries for {self.keys} keys"
            raise MemcError("E203", what, self.spec, f"{self.name}:queries={self.keys}")
        keys = names(self.keys, random)
        numbers = (10**6 + random.choice(9 * 10**6, self.keys * self.values, replace=False)).tolist()
        held = {key: numbers[n * self.values : (n + 1) * self.values] for n, key in enumerate(keys)}
        asked = {key: held[key] for key in keys[: self.queries]}
        places = self._places(depth, random)
        needles = [
            (places.pop(0) if key in asked else float(random.random()), f" The secret number of the {key} is {number}.")
            for key in keys
            for number in held[key]
        ]
        at = [place for place, _ in needles]
        tail: list[Part] = []
        for n, key in enumerate(random.permutation(list(asked)).tolist()):
            first = keys.index(key) * self.values
            told = zip(at[first : first + self.values], held[key], strict=True)
            tail += self._asked(n, key, sorted(told, key=_place))
        seed = int(random.integers(2**32))
        head = Part("Some things in this text have secret numbers. Remember them: you will be asked for them.")

        def build(units: int) -> list[Part]:
            drawn = np.random.default_rng(seed)
            return [head, *haystack([sentence(drawn) for _ in range(units)], needles), *tail]

        return fit(self, words, length, build)

    def _places(self, depth: float | None, random: np.random.Generator) -> list[float]:
        if depth is not None:
            return [depth]
        count = self.queries * self.values
        return [float(d) for d in random.choice(DEPTHS, count, replace=count > len(DEPTHS))]

    def _asked(self, index: int, key: str, told: list[tuple[float, int]]) -> list[Part]:
        """Return one thing's question and answers, in the order of the text."""
        opening = "\n\nWhat are the secret numbers?" if index == 0 else "."
        joint = " The secret number" + ("s" if self.values > 1 else "") + f" of the {key}"
        joint += ", in the order of the text, are " if self.values > 1 else " is "
        parts = [Part(opening + joint)]
        for n, (place, number) in enumerate(told):
            parts += ([Part(", ")] if n else []) + [Part(str(number), answer=True, depth=place)]
        return parts


@dataclass(frozen=True)
class NeedleMultikey(NeedleSingle):
    """One number among those of other things."""

    name = "needle_multikey"
    summary = "the number of one thing among others that have one"
    keys: int = option(4, "things that have numbers", min=1, max=64)


@dataclass(frozen=True)
class NeedleMultivalue(NeedleSingle):
    """All numbers of one thing, in the order of the text."""

    name = "needle_multivalue"
    summary = "all numbers of one thing, in order"
    values: int = option(4, "numbers of each thing", min=1, max=64)


@dataclass(frozen=True)
class NeedleMultiquery(NeedleSingle):
    """The numbers of several things, one after the other."""

    name = "needle_multiquery"
    summary = "the numbers of several things"
    keys: int = option(4, "things that have numbers", min=1, max=64)
    queries: int = option(4, "things that are asked for", min=1, max=64)


def haystack(hay: Sequence[str], needles: Sequence[Needle]) -> list[Part]:
    """Put needles into hay: one of depth d stands behind the share d of it."""
    parts: list[Part] = []
    done = 0
    for place, text in sorted(needles, key=_place):
        stop = round(place * len(hay))
        parts += [Part(piece, filler=True) for piece in hay[done:stop]]
        parts.append(Part(text))
        done = stop
    return parts + [Part(piece, filler=True) for piece in hay[done:]]


def _place(needle: tuple[float, object]) -> float:
    return needle[0]

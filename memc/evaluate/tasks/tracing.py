"""Following and counting, the other kinds of RULER (arXiv 2404.06654): what no single place in the text answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.evaluate.tasks.base import Sample, Task, Words
from memc.evaluate.tasks.lexicon import MOST_NAMES, letters, names, sentence
from memc.evaluate.tasks.needles import haystack
from memc.evaluate.tasks.prose import Part, fit
from memc.options import option


@dataclass(frozen=True)
class VariableTracking(Task):
    """Chains of assignments in a haystack; asked is every variable of one chain, in the order of the text."""

    name = "variable_tracking"
    summary = "every variable that holds one value, through a chain of assignments"

    chains: int = option(2, "chains, one of them asked for", min=1, max=64)
    hops: int = option(4, "assignments of a variable to another in each chain", min=1, max=64)

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        size = self.hops + 1
        variables = [word.upper() for word in letters(self.chains * size, 5, random)]
        values = (10_000 + random.choice(90_000, self.chains, replace=False)).tolist()
        needles = []
        for chain, value in enumerate(values):
            held = str(value)
            places = np.sort(random.random(size)).tolist()
            for place, variable in zip(places, variables[chain * size : (chain + 1) * size], strict=True):
                needles.append((place, f" VAR {variable} = {held}."))
                held = f"VAR {variable}"
        head = Part("Variables are set in this text. Remember which value each of them holds.")
        question = f"\n\nThe variables that hold the value {values[0]}, in the order of the text, are VAR "
        tail = listed(question, variables[:size], ", VAR ")
        seed = int(random.integers(2**32))

        def build(units: int) -> list[Part]:
            drawn = np.random.default_rng(seed)
            return [head, *haystack([sentence(drawn) for _ in range(units)], needles), *tail]

        return fit(self, words, length, build)


@dataclass(frozen=True)
class CommonWords(Task):
    """A list of words in which a few come often and the others seldom; asked are the few, as they first appear."""

    name = "common_words"
    summary = "the words that come often in a list"

    common: int = option(5, "words that come often", min=1, max=64)
    often: int = option(8, "times that each of them comes", min=2)
    rare: int = option(2, "most times that any other comes, below `often`", min=1)

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        if self.rare >= self.often:
            hint = f"{self.name}:rare={self.often - 1}, or more of 'often'"
            raise MemcError("E203", f"rare words come {self.rare} times, no less than common ones", self.spec, hint)
        drawn = [name.replace(" ", "-") for name in names(MOST_NAMES, random)]
        common, others = drawn[: self.common], drawn[self.common :]
        seed = int(random.integers(2**32))

        def build(units: int) -> list[Part]:
            if units > len(others) * self.rare:
                what = f"task {self.spec} has words for fewer than {length} tokens"
                raise MemcError("E200", what, "--lengths", f"give less, or {self.name}:often=64,rare=32")
            items = [(word, False) for word in common for _ in range(self.often)]
            items += [(others[n // self.rare], True) for n in range(units)]
            order = [items[n] for n in np.random.default_rng(seed).permutation(len(items)).tolist()]
            few = sorted(common, key=[word for word, _ in order].index)
            question = f"\n\nThe {self.common} words that come most often, as they first appear, are: "
            return [Part("Remember which words come often in this list:"), *_list(order), *listed(question, few)]

        return fit(self, words, length, build)


@dataclass(frozen=True)
class FrequentWords(Task):
    """Made-up words with the frequencies of Zipf's law; asked are the most frequent, the first of them first."""

    name = "frequent_words"
    summary = "the most frequent of made-up words, in order"

    asked: int = option(3, "words that are asked for", min=1, max=6)
    alpha: float = option(2.0, "exponent: the k-th word comes k ** -alpha as often", min=1.1, max=4.0)

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        seed = int(random.integers(2**32))
        least = self._least()

        def build(units: int) -> list[Part]:
            drawn = np.random.default_rng(seed)
            counts = self._counts(least + units)
            made = letters(len(counts), 6, drawn)
            items = [(made[n], n > self.asked) for n, count in enumerate(counts) for _ in range(count)]
            order = [items[n] for n in drawn.permutation(len(items)).tolist()]
            question = f"\n\nThe {self.asked} most frequent words, the most frequent first, are: "
            head = Part("Remember how often each word comes in this list:")
            return [head, *_list(order), *listed(question, made[: self.asked])]

        return fit(self, words, length, build)

    def _expected(self, total: int) -> npt.NDArray[np.float64]:
        share = np.arange(1, total + 1, dtype=np.float64) ** -self.alpha
        return np.asarray(total * share / share.sum(), np.float64)

    def _counts(self, total: int) -> list[int]:
        """Return how often each word comes, most first; those past the law's last whole count come once."""
        counts = [int(count) for count in self._expected(total) if count >= 1]
        return counts + [1] * (total - sum(counts))

    def _least(self) -> int:
        """Return the least total at which each word asked for is expected once more than the next, and twice."""
        total = self.asked + 1
        while (expected := self._expected(total))[self.asked - 1] < 2 or np.diff(-expected[: self.asked + 1]).min() < 1:
            total += 1
        return total


def listed(question: str, answers: Sequence[str], joint: str = ", ") -> list[Part]:
    """Ask for several words, one after the other."""
    parts: list[Part] = []
    for n, answer in enumerate(answers):
        parts += [Part(joint if n else question), Part(answer, answer=True)]
    return parts


def _list(order: Sequence[tuple[str, bool]]) -> list[Part]:
    """Return a list of words as parts; the flag says which are filler."""
    return [Part(f" {word},", filler=filler) for word, filler in order]

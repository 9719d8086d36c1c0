"""What a task is: samples made of a seed, each a sequence of tokens and the places in it that must be recalled."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.options import Configurable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

I64 = npt.NDArray[np.int64]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the text an answer stands: 0 at its start, 1 just before the question."""


@dataclass(frozen=True)
class Question:
    """Tokens of a sample that must be predicted.

    ``ids[ask:start]`` is the question and ``ids[start:stop]`` its one right answer; ``depth`` is one of ``DEPTHS`` or
    None where depth means nothing.
    """

    ask: int
    start: int
    stop: int
    depth: float | None = None


@dataclass(frozen=True)
class Sample:
    """One sequence ``ids [length]`` and its questions, in order; each sees the right answers of those before it."""

    ids: I64
    questions: tuple[Question, ...]

    def __post_init__(self) -> None:
        """Check that the questions are in order, within the sequence, and have something before and in them."""
        stops = [1, *(question.stop for question in self.questions)]
        assert all(stop <= q.ask <= q.start < q.stop for stop, q in zip(stops, self.questions, strict=False))
        assert self.questions and stops[-1] <= len(self.ids)


@dataclass(frozen=True)
class Words:
    """The tokens that a task may use.

    ``vocab`` ids in all; ``special`` ones are never drawn; ``start`` begins every sequence. ``tokenizer`` is None where
    the artifact has none: tasks made of text then refuse.
    """

    vocab: int
    special: frozenset[int] = frozenset()
    start: tuple[int, ...] = ()
    tokenizer: Tokenizer | None = None

    @property
    def plain(self) -> I64:
        """Ids that are ordinary tokens, in order."""
        return np.setdiff1d(np.arange(self.vocab), sorted(self.special))


@dataclass(frozen=True)
class Task(Configurable, ABC):
    """A kind of question about what stands earlier in a sequence; its fields are its options."""

    noun = "task"
    summary: ClassVar[str]

    @property
    def depths(self) -> tuple[float | None, ...]:
        """The depths for which samples are made, each as many."""
        return (None,)

    @property
    def chance(self) -> float | None:
        """Share of right answers of somebody who knows what may be an answer and guesses among it; None: about 0."""
        return None

    @abstractmethod
    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample of exactly ``length`` tokens.

        Raises ``MemcError``: E200 when the length or the vocabulary is too small for the task, E308 for a task of text
        without a tokenizer.
        """

    def samples(self, words: Words, length: int, count: int, seed: int) -> list[Sample]:
        """Make ``count`` samples for each depth: the same ones for the same arguments."""
        name = zlib.crc32(self.spec.encode())
        return [
            self.sample(words, length, depth, np.random.default_rng([seed, name, length, place, index]))
            for place, depth in enumerate(self.depths)
            for index in range(count)
        ]

    def too_short(self, length: int, needed: int) -> MemcError:
        """Return the error that says how many tokens the task needs."""
        return MemcError("E200", f"task {self.spec} needs {needed} tokens, not {length}", "--lengths", f"give {needed}")

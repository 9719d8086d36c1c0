"""Held-out text that says when to stop: each text apart, so that no gain in one hides a loss in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OWN = "sampled from the original"
"""Name of the text that the original wrote itself."""

SLACK = 1e-3
"""Nats a token by which a text may be further from the original than at the start and still count as no worse: what is
all but exact at the start (text shorter than a window) is no reason to train nothing."""


@dataclass(frozen=True)
class GuardText:
    """Held-out sequences of one text: ``tokens`` and ``positions [N,T]``."""

    name: str
    tokens: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Guard:
    """The held-out texts of a training."""

    texts: tuple[GuardText, ...]

    @classmethod
    def of(cls, tokens: Tensor, positions: Tensor, name: str = "held-out text") -> Guard:
        """Return the guard of a single text."""
        return cls((GuardText(name, tokens, positions),))

    def to(self, device: torch.device) -> Guard:
        """Return the guard with its sequences on ``device``."""
        return Guard(tuple(GuardText(t.name, t.tokens.to(device), t.positions.to(device)) for t in self.texts))

    @property
    def given(self) -> Guard:
        """The texts that were given, if there are any: of its own the original knows most, and any lesson hurts it."""
        return Guard(tuple(text for text in self.texts if text.name != OWN) or self.texts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the texts."""
        return tuple(text.name for text in self.texts)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All of their sequences: tokens and positions ``[N,T]``."""
        return torch.cat([t.tokens for t in self.texts]), torch.cat([t.positions for t in self.texts])

    @property
    def text_of(self) -> tuple[int, ...]:
        """The number of the text that each of :attr:`rows` is from."""
        return tuple(index for index, text in enumerate(self.texts) for _ in text.tokens)


@dataclass(frozen=True)
class Look:
    """What the guard said after ``step`` steps: the loss of each text, in nats a token."""

    step: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the texts, each weighing alike."""
        return sum(self.values) / len(self.values)


def best_of(looks: Sequence[Look]) -> int:
    """Return the index of the look of the least mean among those in which no text is worse than in the first."""
    first = looks[0].values
    unhurt = [i for i, look in enumerate(looks) if all(v <= f + SLACK for v, f in zip(look.values, first, strict=True))]
    return min(unhurt, key=lambda index: looks[index].mean)

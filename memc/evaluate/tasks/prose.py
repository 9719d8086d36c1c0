"""Samples made of text: its parts, what is asked in it, and filler until it has exactly as many tokens as wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.evaluate.tasks.base import Question, Sample, Task, Words

SLACK = 16
"""Tokens of filler that may be cut off, to spare the search for the shortest filler that is enough."""


@dataclass(frozen=True)
class Part:
    """A piece of a text. Tokens of ``filler`` may be cut off; an ``answer`` is asked by the piece before it."""

    text: str
    filler: bool = False
    answer: bool = False
    depth: float | None = None


@dataclass(frozen=True)
class _Encoded:
    """The tokens of a text: ids, and the characters ``[N,2]`` that each covers."""

    units: int
    parts: Sequence[Part]
    ids: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]

    @property
    def edges(self) -> list[int]:
        """Where the parts start, and the end of the last."""
        return list(accumulate((len(part.text) for part in self.parts), initial=0))

    def touching(self, index: int) -> slice:
        """Return the tokens that cover a character of a part."""
        low, high = self.edges[index : index + 2]
        inside = np.flatnonzero((self.spans[:, 1] > low) & (self.spans[:, 0] < high))
        return slice(int(inside[0]), int(inside[-1]) + 1)


def fit(task: Task, words: Words, length: int, build: Callable[[int], Sequence[Part]]) -> Sample:
    """Make a sample of exactly ``length`` tokens of the text ``build(n)``, which has ``n`` units of filler.

    The first n at hand that is long enough is taken and its first tokens of filler are cut off where it is too long.
    Raises ``MemcError``: E308 without a tokenizer, E200 when the text without filler is too long.
    """
    room = length - len(words.start)
    low = bare = _encode(task, words, build, 0)
    if len(bare.ids) > room:
        raise task.too_short(length, len(bare.ids) + len(words.start))
    high = bare if len(bare.ids) == room else None
    guess = max((room - len(low.ids)) // SLACK, 1)
    while high is None or (len(high.ids) - room > SLACK and high.units - low.units > 1):
        tried = _encode(task, words, build, guess)
        if len(tried.ids) >= room:
            high = tried
        else:
            low = tried
        if high is None:
            per_unit = max((len(tried.ids) - len(bare.ids)) / tried.units, 1)
            guess = low.units + int((room - len(low.ids)) / per_unit) + 1
        else:
            share = (room - len(low.ids)) / (len(high.ids) - len(low.ids))
            guess = min(max(low.units + round(share * (high.units - low.units)), low.units + 1), high.units - 1)
    return _cut(task, words, high, length)


def _encode(task: Task, words: Words, build: Callable[[int], Sequence[Part]], units: int) -> _Encoded:
    if words.tokenizer is None:
        raise MemcError("E308", f"task {task.name} is made of text, the artifact has no tokenizer", next="--task mqar")
    parts = build(units)
    encoding = words.tokenizer.encode("".join(part.text for part in parts), add_special_tokens=False)
    return _Encoded(units, parts, np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2))


def _cut(task: Task, words: Words, text: _Encoded, length: int) -> Sample:
    """Cut the first tokens of filler off, put the starting tokens in front, and find the questions."""
    edges = text.edges
    spare = np.zeros(len(text.ids), bool)
    for part, low, high in zip(text.parts, edges, edges[1:], strict=False):
        if part.filler:
            spare |= (text.spans[:, 0] >= low) & (text.spans[:, 1] <= high)
    excess = len(text.ids) + len(words.start) - length
    cut = np.flatnonzero(spare)[:excess]
    if len(cut) < excess:
        raise task.too_short(length, length + excess - len(cut))
    kept = np.ones(len(text.ids), bool)
    kept[cut] = False
    before = np.concatenate([[0], np.cumsum(kept)]) + len(words.start)  # place of each token in the sample
    questions: list[Question] = []
    for index, part in enumerate(text.parts):
        if part.answer:
            ask, answer = text.touching(index - 1), text.touching(index)
            earliest = questions[-1].stop if questions else 1
            start, stop = int(before[answer.start]), int(before[answer.stop])
            questions.append(Question(min(max(int(before[ask.start]), earliest), start), start, stop, part.depth))
    return Sample(np.concatenate([np.array(words.start, np.int64), text.ids[kept]]), tuple(questions))

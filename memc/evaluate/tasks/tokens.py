"""Recall among random tokens: needs no text, so that any decoder can be asked, one trained on nothing else included.

Only the lowest ``vocab`` ordinary ids are used: in a vocabulary made by merging they are the frequent ones, and a small
model that does not copy a rare token says nothing about memory by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memc.errors import MemcError
from memc.evaluate.tasks.base import I64, Question, Sample, Task, Words
from memc.options import option

VOCAB = 8192
"""Ids that are used, as many as Zoology has."""
VOCAB_HELP = "lowest ordinary ids of the vocabulary that are used"


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """Multi-query associative recall (Zoology, arXiv 2312.04927), on the ids of any vocabulary.

    ``k1 v1 ... kN vN``, told ``passes`` times, in another order each time; then every key once more, in any order,
    followed by its value. Keys come from the lower half of the vocabulary and values from the upper, none twice; the
    slot of a query after the pairs is drawn with probability proportional to ``slot ** (power - 1)``. Two differences
    from the original: fillers are never a key of the sample, so that there is one right answer, and ``gap`` fillers may
    stand before the first slot, so that every answer is that many tokens away.
    """

    name = "mqar"
    summary = "multi-query associative recall: keys and values, then the keys again"

    pairs: int = option(16, "keys and values", min=1)
    gap: int = option(0, "least distance from a value to where it is asked for", unit="tokens", min=0)
    passes: int = option(1, "times that the pairs are told", min=1)
    vocab: int = option(VOCAB, VOCAB_HELP, min=2)
    power: float = option(0.01, "exponent of the distribution of the distances: 1 is uniform", min=1e-3, max=10.0)

    @property
    def chance(self) -> float:
        """One of the values of the sample."""
        return 1 / self.pairs

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        first = len(words.start)
        body = first + 2 * self.pairs * self.passes
        # The last value stands one before the body; a value asked for at the first slot answers one after it.
        queries = body + max(self.gap - 2, 0)
        slots = (length - queries) // 2
        if slots < self.pairs:
            raise self.too_short(length, queries + 2 * self.pairs)
        plain = words.plain[: self.vocab]
        half = len(plain) // 2
        keys = draw(self, plain[:half], self.pairs, random)
        values = draw(self, plain[half:], self.pairs, random)
        likely = np.arange(1, slots + 1) ** (self.power - 1)
        chosen = random.choice(slots, self.pairs, replace=False, p=likely / likely.sum())
        ids = random.choice(np.setdiff1d(plain, keys), length)
        ids[:first] = words.start
        told = np.concatenate([random.permutation(self.pairs) for _ in range(self.passes)])
        ids[first:body:2], ids[first + 1 : body : 2] = keys[told], values[told]
        at = queries + 2 * chosen
        ids[at], ids[at + 1] = keys, values
        return Sample(ids, tuple(Question(place, place + 1, place + 2) for place in sorted(at.tolist())))


@dataclass(frozen=True)
class JointRecall(Task):
    """Recall by two keys together (arXiv 2507.00449): the value of a key depends on the context that it stands in.

    Every context token is followed by all keys, each with a value of its own there; then ``queries`` times a context,
    a key, and the value to recall. Fillers between the two make up the length.
    """

    name = "joint_recall"
    summary = "recall by a context and a key together"

    contexts: int = option(4, "contexts", min=1)
    keys: int = option(4, "keys in each context", min=1)
    queries: int = option(8, "pairs of context and key that are asked for", min=1)
    vocab: int = option(VOCAB, VOCAB_HELP, min=2)

    @property
    def chance(self) -> float:
        """One of the values that the key has."""
        return 1 / self.contexts

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        first, block = len(words.start), 1 + 2 * self.keys
        told, asked = self.contexts * block, 3 * self.queries
        if self.queries > self.contexts * self.keys:
            what = f"{self.queries} queries for {self.contexts * self.keys} pairs of context and key"
            raise MemcError("E203", what, self.spec, f"{self.name}:queries={self.contexts * self.keys}")
        if first + told + asked > length:
            raise self.too_short(length, first + told + asked)
        plain = words.plain[: self.vocab]
        drawn = draw(self, plain, self.contexts + self.keys + self.contexts * self.keys, random)
        contexts, keys, flat = np.split(drawn, [self.contexts, self.contexts + self.keys])
        values = flat.reshape(self.contexts, self.keys)
        ids = random.choice(np.setdiff1d(plain, drawn[: self.contexts + self.keys]), length)
        ids[:first] = words.start
        # Keys stand in another order in each context: the place must not tell the value.
        for c in range(self.contexts):
            start, order = first + c * block, random.permutation(self.keys)
            ids[start] = contexts[c]
            ids[start + 1 : start + block : 2], ids[start + 2 : start + block : 2] = keys[order], values[c, order]
        questions = []
        for n, pair in enumerate(random.choice(self.contexts * self.keys, self.queries, replace=False)):
            c, k = divmod(int(pair), self.keys)
            ask = length - asked + 3 * n
            ids[ask : ask + 3] = contexts[c], keys[k], values[c, k]
            questions.append(Question(ask, ask + 2, ask + 3))
        return Sample(ids, tuple(questions))


@dataclass(frozen=True)
class Copy(Task):
    """Random tokens, none twice, and the same again: the last ``asked`` of them are to be predicted.

    Every answer stands half the length before: the plainest test of induction at a distance.
    """

    name = "copy"
    summary = "a sequence of random tokens, repeated"

    asked: int = option(32, "tokens at the end that are asked for", unit="tokens", min=1)
    vocab: int = option(VOCAB, VOCAB_HELP, min=2)

    def sample(self, words: Words, length: int, depth: float | None, random: np.random.Generator) -> Sample:
        """Make one sample; see ``Task.sample``."""
        first = len(words.start)
        size = (length - first) // 2
        if size <= self.asked:
            raise self.too_short(length, first + 2 * (self.asked + 1))
        once = draw(self, words.plain[: self.vocab], length - first - size, random)
        ids = np.concatenate([np.array(words.start, np.int64), once, once[:size]])
        places = range(length - self.asked, length)
        return Sample(ids, tuple(Question(n - (n == places[0]), n, n + 1) for n in places))


def draw(task: Task, plain: I64, count: int, random: np.random.Generator) -> I64:
    """Draw ids without repetition. Raises ``MemcError`` E200 when there are not as many."""
    if count > len(plain):
        what = f"task {task.spec} draws {count} different tokens, the vocabulary offers {len(plain)}"
        raise MemcError("E200", what, next="ask for fewer, or for a shorter length")
    return random.choice(plain, count, replace=False)

"""Packed sequences of a corpus: what training and its guard read, at any index, in any number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from memc.data.cache import read_tokens
from memc.data.sources import digest_of
from memc.data.stream import TokenStream
from memc.errors import MemcError
from memc.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Packed sequences: token ids and positions, both ``[B, T]``; position 0 starts a document and clears the state."""

    tokens: Array
    positions: Array


@dataclass(frozen=True)
class _Segment:
    stream: TokenStream
    start: int
    stop: int


class _Pool:
    """Segments of streams, one after the other."""

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self.segments = [segment for segment in segments if segment.stop > segment.start]
        self.ends = np.cumsum([segment.stop - segment.start for segment in self.segments], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if self.segments else 0

    def take(self, start: int, length: int) -> tuple[Array, Array]:
        """Return ``length`` tokens and their positions, which start at 0 here and at every document."""
        tokens, first = np.empty(length, np.int64), np.zeros(length, bool)
        first[0] = True
        done = 0
        while done < length:
            index = int(np.searchsorted(self.ends, start + done, side="right"))
            segment = self.segments[index]
            at = segment.stop - (int(self.ends[index]) - start - done)
            count = min(length - done, segment.stop - at)
            tokens[done : done + count] = segment.stream.ids[at : at + count]
            starts = segment.stream.starts
            low, high = np.searchsorted(starts, [at, at + count])
            first[done + starts[low:high] - at] = True
            done += count
        steps = np.arange(length)
        return tokens, steps - np.maximum.accumulate(np.where(first, steps, 0))


class Corpus:
    """Streams of tokens, each with its end held out.

    The last ``guard`` of each stream (a share, in whole blocks of ``block`` tokens, at least one) is in no training
    sequence; of several streams those shorter than two blocks are first joined. Without ``weights`` an epoch is every
    token once. With them (one for each of ``streams``, which may be several together, on any positive scale) each gives
    its share of the sequences of an epoch, which ends when the scarcest is used up; none gives a sequence twice before
    it has given all.

    Raises ``ValueError`` for no streams, a guard outside [0, 0.5], or weights that are not positive and one for each.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream | Sequence[TokenStream]],
        weights: Sequence[float] | None = None,
        *,
        guard: float = 0.05,
        block: int = 512,
    ) -> None:
        """Split the streams; nothing is copied but those that are joined."""
        if not streams:
            raise ValueError("a corpus needs at least one stream")
        if not 0 <= guard <= 0.5:
            raise ValueError(f"guard of {guard} is no share between 0 and 0.5")
        if weights is not None and (len(weights) != len(streams) or not all(0 < w < float("inf") for w in weights)):
            raise ValueError("weights have to be positive numbers, one a stream")
        sources = [[source] if isinstance(source, TokenStream) else list(source) for source in streams]
        every = [stream for several in sources for stream in several]
        self.names = [stream.name for stream in every]
        grouped = [[stream.digest for stream in several] for several in sources]
        self.digest = digest_of([grouped, weights and list(weights), guard, block])
        self.weights = [1.0] if weights is None else [weight / sum(weights) for weight in weights]
        pools = [every] if weights is None else sources
        self.pool_names = [", ".join(stream.name for stream in pool) for pool in pools]
        parts = [
            [_split(stream, guard, block) for stream in (_joined(pool, block) if len(pool) > 1 else pool)]
            for pool in pools
        ]
        self.train = [_Pool([segment for segment, _ in pool]) for pool in parts]
        self.held_out = [_Pool([segment]) for pool in parts for _, segment in pool]

    @classmethod
    def read(
        cls,
        sources: Sequence[str | Path],
        tokenizer: Tokenizer | None,
        weights: Sequence[float] | None = None,
        *,
        limit: int | None = None,
        guard: float = 0.05,
        block: int = 512,
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> Corpus:
        """Read sources through the cache of tokens, at most ``limit`` tokens of each. Raises as ``read_tokens``."""
        streams = [read_tokens(s, tokenizer, limit=limit, folder=folder, progress=progress) for s in sources]
        return cls(streams, weights, guard=guard, block=block)

    def sequences(self, length: int, seed: int = 0, epoch: int = 0) -> Sequences:
        """Return the training sequences of ``length`` tokens from ``epoch`` on. Raises ``MemcError`` E207: too few."""
        return Sequences(self, length, seed, epoch)

    def guard(self, length: int, limit: int | None = None) -> Batch:
        """Return held-out sequences in the order of the streams; no more than ``limit``, evenly taken from all.

        Raises ``MemcError`` E207 when the held-out part has not one sequence.
        """
        rows = [(pool, row * length) for pool in self.held_out for row in range(pool.tokens // length)]
        if not rows:
            held = sum(pool.tokens for pool in self.held_out)
            reason = f"{held} tokens are held out, fewer in each place than one sequence of {length}"
            raise MemcError("E207", reason, self.where, "give more --data, or shorter sequences")
        if limit is not None and limit < len(rows):
            rows = [rows[index * len(rows) // limit] for index in range(limit)]
        return _stack([pool.take(start, length) for pool, start in rows])

    def guards(self, length: int, each: int) -> list[tuple[str, Batch]]:
        """Return held-out sequences of each text apart, by its name: ``each`` at most, evenly taken from it.

        Raises ``MemcError`` E207 as :meth:`guard`.
        """
        found = []
        for pool in self.held_out:
            if count := pool.tokens // length:
                starts = [index * count // each for index in range(each)] if each < count else list(range(count))
                rows = _stack([pool.take(start * length, length) for start in starts])
                found.append((pool.segments[0].stream.name, rows))
        return found or [(self.where, self.guard(length))]

    @property
    def where(self) -> str:
        """Names of the streams, for messages."""
        return ", ".join(self.names)


class Sequences:
    """The shuffled training sequences of a corpus, the same for the same seed wherever and whenever they are asked for.

    An index counts sequences from the first of ``epoch`` on, over the following epochs. The tokens that do not fill a
    sequence are dropped, at either end of a stream, by the seed and the epoch. ``len`` is the sequences of an epoch.
    """

    def __init__(self, corpus: Corpus, length: int, seed: int, epoch: int) -> None:
        """See ``Corpus.sequences``."""
        if length < 1 or seed < 0 or epoch < 0:
            raise ValueError("length has to be positive, seed and epoch not negative")
        self.corpus, self.length, self.seed, self.epoch = corpus, length, seed, epoch
        self._available = [pool.tokens // length for pool in corpus.train]
        if not all(self._available):
            fewest = int(np.argmin(self._available))
            where = corpus.pool_names[fewest]
            reason = f"data give {corpus.train[fewest].tokens} tokens for training, fewer than one sequence of {length}"
            raise MemcError("E207", reason, where, "give more --data, or shorter sequences")
        scale = min(count / weight for count, weight in zip(self._available, corpus.weights, strict=True))
        # What a stream gives in an epoch; no stream is left out for its small weight.
        self._counts = [
            min(count, max(1, round(scale * weight)))
            for count, weight in zip(self._available, corpus.weights, strict=True)
        ]
        self._firsts = np.cumsum([0, *self._counts])
        self._within = [_order(count, seed, 1, pool) for pool, count in enumerate(self._available)]
        self._shuffled = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Return the sequences of one epoch."""
        return int(self._firsts[-1])

    def __iter__(self) -> Iterator[Batch]:
        """Yield the sequences of one epoch, one at a time."""
        return (self.batch(index, 1) for index in range(len(self)))

    def batch(self, step: int, size: int) -> Batch:
        """Return batch ``step`` of ``size`` sequences."""
        return _stack([self._at(index) for index in range(step * size, (step + 1) * size)])

    def require(self, tokens: int) -> None:
        """Raise ``MemcError`` E207 when one epoch has fewer than ``tokens`` tokens."""
        if (most := len(self) * self.length) < tokens:
            reason = f"{tokens} tokens are asked for, the data give {most} in sequences of {self.length}"
            raise MemcError("E207", reason, self.corpus.where, f"give more --data, or --tokens {most}")

    def _at(self, index: int) -> tuple[Array, Array]:
        epoch, place = divmod(index, len(self))
        epoch += self.epoch
        if self._shuffled[0] != epoch:
            self._shuffled = epoch, _order(len(self), self.seed, 0, epoch)
        slot = int(self._shuffled[1][place])
        source = int(np.searchsorted(self._firsts, slot, side="right")) - 1
        ordinal = epoch * self._counts[source] + slot - int(self._firsts[source])
        turn, place = divmod(ordinal, self._available[source])
        pool, block = self.corpus.train[source], int(self._within[source][place])
        spare = pool.tokens - self._available[source] * self.length
        shift = int(_bits(1, self.seed, 2, source, turn)[0] % np.uint64(spare + 1))
        return pool.take(shift + block * self.length, self.length)


def _split(stream: TokenStream, guard: float, block: int) -> tuple[_Segment, _Segment]:
    blocks = len(stream) // block
    held = min(max(1, round(len(stream) * guard / block)), blocks - 1) * block if guard and blocks > 1 else 0
    cut = len(stream) - held
    return _Segment(stream, 0, cut), _Segment(stream, cut, len(stream))


def _joined(streams: Sequence[TokenStream], block: int) -> list[TokenStream]:
    """Join the streams of fewer than two blocks into one, so that many small files have a held-out part too."""
    small = [stream for stream in streams if len(stream) < 2 * block]
    joined = TokenStream.of([document for stream in small for document in stream.documents()], "small files")
    return [stream for stream in streams if len(stream) >= 2 * block] + [joined][: len(small)]


def _stack(rows: Sequence[tuple[Array, Array]]) -> Batch:
    tokens, positions = zip(*rows, strict=True)
    return Batch(np.stack(tokens), np.stack(positions))


def _bits(count: int, *seed: int) -> npt.NDArray[np.uint64]:
    """Return random bits from what numpy promises never to change: a seed sequence and a bit generator, no more."""
    return np.asarray(np.random.Philox(np.random.SeedSequence(seed)).random_raw(count), np.uint64)


def _order(count: int, *seed: int) -> Array:
    return np.argsort(_bits(count, *seed), kind="stable").astype(np.int64)

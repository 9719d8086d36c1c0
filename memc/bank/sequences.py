"""What the blocks of a bank are trained on: passages of one cluster, packed into sequences of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memc.bank.layout import BankShape, Cluster
from memc.bank.passages import Passages

I64 = npt.NDArray[np.int64]
Encode = Callable[[str], list[int]]
"""Gives the token ids of a text, with those that start and end one."""


@dataclass(frozen=True)
class PackedSequence:
    """Passages of ``cluster``, one after the other: ``tokens`` and ``positions [T]``, which start at 0 with each."""

    cluster: Cluster
    tokens: I64
    positions: I64


def held_out(passages: Passages, share: float) -> npt.NDArray[np.bool_]:
    """Tell of each passage whether it is held out: the last ``share`` of those of each source."""
    chosen = np.zeros(len(passages), bool)
    for source in np.unique(passages.sources):
        rows = np.flatnonzero(passages.sources == source)
        chosen[rows[len(rows) - int(share * len(rows)) :]] = True
    return chosen


def pack(
    passages: Passages, shape: BankShape, chosen: npt.NDArray[np.bool_], encode: Encode, length: int, seed: int
) -> Iterator[PackedSequence]:
    """Yield sequences of at most ``length`` tokens of the ``chosen`` passages, cluster by cluster of the last level.

    That is the last one that stores something. Passages come in random order; one that is cut starts anew.
    """
    level = shape.storing()[-1]
    numbers = np.where(chosen, passages.clusters[:, level], -1)
    for number in np.unique(numbers[chosen]):
        rng = np.random.default_rng([seed, level, int(number)])
        ids = [encode(passages.text(int(row))) for row in rng.permutation(np.flatnonzero(numbers == number))]
        yield from _packed(shape.cluster(level, int(number)), ids, length)


def _packed(cluster: Cluster, documents: list[list[int]], length: int) -> Iterator[PackedSequence]:
    tokens = np.concatenate([np.asarray(document, np.int64) for document in documents])
    starts = np.concatenate([np.arange(len(document)) for document in documents]) == 0
    for start in range(0, len(tokens), length):
        first = starts[start : start + length].copy()
        first[0] = True
        steps = np.arange(len(first))
        positions = steps - np.maximum.accumulate(np.where(first, steps, 0))
        if positions.any():  # one token after another is what can be learned
            yield PackedSequence(cluster, tokens[start : start + length], positions)

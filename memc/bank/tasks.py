"""The pieces of work of building a bank: each reads what it needs from the folder and gives arrays back. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from memc.bank.encoder import Encoder, EncoderFacts
from memc.bank.kmeans import fit_node
from memc.bank.layout import BankShape
from memc.bank.manifest import ENCODER, PASSAGES
from memc.bank.passages import CLUSTERS, EMBEDDINGS, texts
from memc.bank.tree import nearest_child

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK = 64
"""Passages that are embedded between two savings; always the same ones, so that going on changes nothing."""

ROWS = 1 << 16
"""Passages that are sorted into their clusters at once; always the same ones, for the same reason."""


@dataclass(frozen=True)
class EmbedBlock:
    """Embed passages number ``BLOCK`` times n and on."""

    place: Path
    facts: EncoderFacts
    count: int
    threads: int | None

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded when first needed. Raises ``MemcError`` as ``Encoder``."""
        return Encoder(self.place / ENCODER, self.facts, threads=self.threads)

    def __call__(self, number: int) -> F32:
        """Return the embeddings ``[BLOCK,width]``, fewer of the last block."""
        start = number * BLOCK
        found = texts(self.place / PASSAGES, start, min(start + BLOCK, self.count))
        # One passage of a crawl that no encoder can read is no reason to build nothing of the others.
        return self.encoder.encode(found, blank=True).astype("<f4")


@dataclass(frozen=True)
class Levels:
    """What is there of a tree that is being made, in the folder ``place``: arrays that are read as they are needed."""

    place: Path
    count: int
    width: int
    shape: BankShape

    @cached_property
    def embeddings(self) -> F32:
        """The embeddings ``[count,width]`` of the passages."""
        return np.memmap(self.place / PASSAGES / EMBEDDINGS, "<f4", "r", shape=(self.count, self.width))

    def places(self, mode: Literal["r", "w+"]) -> Any:
        """Map ``[count,levels]``: the place of each passage's cluster in its level, as far as that is known."""
        path = self.place / PASSAGES / CLUSTERS
        return np.memmap(path, "<i4", mode, shape=(self.count, self.shape.levels))

    def parents(self, level: int, rows: slice) -> I64:
        """Return the places of some passages in the level above, 0 of the root."""
        if level == 0:
            return np.zeros(min(rows.stop, self.count) - rows.start, np.int64)
        return np.asarray(self.places("r")[rows, level - 1], np.int64)

    def centroids(self, level: int) -> Path:
        """Return the file of a level's centroids ``[clusters,width]``."""
        return self.place / f"level-{level}.npy"

    @property
    def members(self) -> Path:
        """The file of the passages in the order of their nodes, of the level that is being fitted."""
        return self.place / "members.npy"


@dataclass(frozen=True)
class FitNode:
    """Cluster the passages of node n of a level; ``ends`` are where those of each node end in ``levels.members``."""

    levels: Levels
    level: int
    seed: int
    ends: I64

    def __call__(self, number: int) -> F32:
        """Return the centroids ``[branch,width]`` of the node's children, zeros of one without passages."""
        levels = self.levels
        start = int(self.ends[number - 1]) if number else 0
        members = np.array(np.load(levels.members, mmap_mode="r")[start : int(self.ends[number])])
        if not len(members):
            return np.zeros((levels.shape.branch, levels.width), np.float32)
        rng = np.random.default_rng([self.seed, self.level, number])
        return fit_node(lambda rows: np.asarray(levels.embeddings[rows]), members, levels.shape.branch, rng)


@dataclass(frozen=True)
class AssignBlock:
    """Find the clusters of a level that passages number ``ROWS`` times n and on belong to."""

    levels: Levels
    level: int

    @cached_property
    def centroids(self) -> F32:
        """The centroids of the level."""
        found: F32 = np.load(self.levels.centroids(self.level))
        return found

    def __call__(self, number: int) -> tuple[I64, F32]:
        """Return place in the level, and distance, of each passage's cluster."""
        rows = slice(number * ROWS, min((number + 1) * ROWS, self.levels.count))
        embeddings, parents = self.levels.embeddings[rows], self.levels.parents(self.level, rows)
        return nearest_child(embeddings, parents, self.centroids, self.levels.shape.branch)

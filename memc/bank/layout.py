"""The shape of a memory bank: a tree of clusters, and the size of the record that each of them has."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from memc.errors import MemcError

Cluster = tuple[int, ...]
"""A cluster by its way from the root: child numbers, the coarsest first. One of n numbers is of level n - 1.

The root, of no numbers, is the generic block: as many units as a whole path, trained on all passages.
"""

MATRICES = ("gate", "up", "down")
"""The matrices ``[units, width]`` of a block in one layer, in the order of a record."""

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class BankShape:
    """Sizes of a bank (hierarchical memories, arXiv 2510.02375).

    Every cluster has ``branch`` children; ``ranks[l]`` is the number of hidden units that a record of level l adds to
    the feed-forward block of each of ``layers`` (decoder layers, sorted), 0 for a level that stores nothing;
    ``width`` is that of the model, ``dtype`` the type in the file.
    """

    branch: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    width: int
    dtype: Dtype = "float32"

    @property
    def levels(self) -> int:
        """Number of levels of the tree, the root not counted."""
        return len(self.ranks)

    @property
    def units(self) -> int:
        """Hidden units that a whole path adds to a layer."""
        return sum(self.ranks)

    @property
    def itemsize(self) -> int:
        """Bytes of a value in the file."""
        return 4 if self.dtype == "float32" else 2

    def rank(self, level: int) -> int:
        """Return the hidden units of a record of a level; level -1 is the generic block."""
        return self.units if level < 0 else self.ranks[level]

    def clusters(self, level: int) -> int:
        """Return how many clusters a level has."""
        return int(self.branch ** (level + 1))

    def record_shape(self, level: int) -> tuple[int, int, int, int]:
        """Return ``[layers, 3, units, width]`` of a record."""
        return len(self.layers), len(MATRICES), self.rank(level), self.width

    def record_bytes(self, level: int) -> int:
        """Return the bytes of a record in the file."""
        return math.prod(self.record_shape(level)) * self.itemsize

    def level_bytes(self, level: int) -> int:
        """Return the bytes of all records of a level."""
        return self.clusters(level) * self.record_bytes(level)

    def storing(self) -> list[int]:
        """Return the levels whose clusters have a record."""
        return [level for level, rank in enumerate(self.ranks) if rank]

    def number(self, cluster: Cluster) -> int:
        """Return the place of a cluster in its level."""
        number = 0
        for child in cluster:
            number = number * self.branch + child
        return number

    def cluster(self, level: int, number: int) -> Cluster:
        """Return the cluster at a place of a level."""
        children = []
        for _ in range(level + 1):
            number, child = divmod(number, self.branch)
            children.append(child)
        return tuple(reversed(children))

    def all_clusters(self, level: int) -> Iterator[Cluster]:
        """Yield the clusters of a level in order."""
        return (self.cluster(level, number) for number in range(self.clusters(level)))


def name(cluster: Cluster) -> str:
    """Return a cluster as it is written: ``0.3.1``; the root is ``generic``."""
    return ".".join(map(str, cluster)) or "generic"


def parse_cluster(text: str, shape: BankShape) -> Cluster:
    """Read a cluster as ``name`` writes it. Raises ``MemcError`` E200 for what is no cluster of the bank."""
    parts = text.split(".")
    if not all(part.isdecimal() and int(part) < shape.branch for part in parts) or len(parts) > shape.levels:
        hint = f"at most {shape.levels} numbers below {shape.branch}, like {name((0,) * min(3, shape.levels))}"
        raise MemcError("E200", f"the bank has no cluster {text!r}", next=hint)
    return tuple(map(int, parts))

"""The tree of clusters: which one a text belongs to, found by going down from the root."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memc.bank.layout import Cluster
from memc.errors import MemcError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

ROWS = 1024
"""Embeddings whose distances are computed at once: it bounds the memory."""


@dataclass(frozen=True)
class TreePath:
    """The clusters that a text belongs to, one a level, the coarsest first.

    ``distances [levels]`` are Euclidean, to the centroid of each level. The text is near the passages of the first
    ``depth`` levels; deeper it is further from its cluster than passages are, and 0 says that it is like nothing in
    the bank.
    """

    cluster: Cluster
    distances: tuple[float, ...]
    depth: int

    @property
    def near(self) -> Cluster:
        """The deepest cluster that the text is near, empty for none."""
        return self.cluster[: self.depth]


@dataclass(frozen=True)
class Tree:
    """Centroids of every level.

    ``centroids[l] [branch^(l+1), width]`` float32, children of one cluster in a row; ``counts[l]`` passages of each;
    ``limits[l]`` is how far a text may be from its centroid and still count as near.
    """

    branch: int
    centroids: tuple[F32, ...]
    counts: tuple[I64, ...]
    limits: tuple[float, ...]

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return int(self.centroids[0].shape[1])

    def descend(self, embedding: F32) -> TreePath:
        """Find the path of one embedding ``[width]``, by ``branch`` distances a level.

        Clusters without passages are passed over: a node that has passages has a child with some.
        """
        parents, distances = self.assign(embedding[None])
        levels = len(self.centroids)
        cluster = tuple(int(parents[0, level]) % self.branch for level in range(levels))
        within = [float(distances[0, level]) <= self.limits[level] for level in range(levels)]
        depth = next((level for level, near in enumerate(within) if not near), levels)
        return TreePath(cluster, tuple(map(float, distances[0])), depth)

    def assign(self, embeddings: F32) -> tuple[I64, F32]:
        """Return place in the level, and distance, of the cluster of each embedding: both ``[N, levels]``."""
        places = np.zeros((len(embeddings), len(self.centroids)), np.int64)
        distances = np.zeros(places.shape, np.float32)
        parent = np.zeros(len(embeddings), np.int64)
        for level, (centroids, counts) in enumerate(zip(self.centroids, self.counts, strict=True)):
            parent, far = nearest_child(embeddings, parent, centroids, self.branch, counts)
            places[:, level], distances[:, level] = parent, far
        return places, distances

    def nearest_leaf(self, embeddings: F32) -> I64:
        """Return the place of the nearest leaf of each embedding, by the distance to every one of them."""
        root = np.zeros(len(embeddings), np.int64)
        return nearest_child(embeddings, root, self.centroids[-1], None, self.counts[-1])[0]

    def save(self, path: Path) -> None:
        """Write the tree as safetensors."""
        arrays: dict[str, npt.NDArray[np.generic]] = {"limits": np.array(self.limits, np.float32)}
        for level, (centroids, counts) in enumerate(zip(self.centroids, self.counts, strict=True)):
            arrays[f"centroids.{level}"], arrays[f"counts.{level}"] = centroids, counts
        save_file(arrays, path)

    @classmethod
    def load(cls, path: Path, branch: int, levels: int, width: int) -> Tree:
        """Read a tree. Raises ``MemcError`` E310 when it is missing, damaged or of other sizes."""
        try:
            arrays = load_file(path)
            centroids = tuple(arrays[f"centroids.{level}"] for level in range(levels))
            counts = tuple(arrays[f"counts.{level}"] for level in range(levels))
            limits = tuple(map(float, arrays["limits"]))
        except (SafetensorError, OSError, KeyError) as error:
            raise MemcError("E310", f"tree of the bank does not read: {error}", str(path), "build it again") from error
        sizes = [branch ** (level + 1) for level in range(levels)]
        found = [each.shape for each in centroids], [each.shape for each in counts], len(limits)
        if found != ([(size, width) for size in sizes], [(size,) for size in sizes], levels):
            raise MemcError("E310", "tree of the bank has other sizes than bank.json", str(path), "build it again")
        return cls(branch, centroids, counts, limits)


def nearest_child(
    embeddings: F32, parents: I64, centroids: F32, branch: int | None, counts: I64 | None = None
) -> tuple[I64, F32]:
    """Return place and distance of the nearest child of each embedding's parent; both ``[N]``.

    ``centroids [parents * branch, width]`` has the children of parent p in rows ``p * branch`` and on; with ``branch``
    None there is one parent, of all. Children whose count is 0 do not count. Ties go to the first.
    """
    branch = branch or len(centroids)
    children = centroids.reshape(-1, branch, centroids.shape[1])
    empty = None if counts is None else (counts == 0).reshape(-1, branch)
    places, distances = np.empty(len(parents), np.int64), np.empty(len(parents), np.float32)
    for rows in _groups(parents):
        parent = int(parents[rows[0]])
        near, x = children[parent], np.ascontiguousarray(embeddings[rows], np.float32)
        far = np.einsum("be,be->b", near, near) - 2 * (x @ near.T) + np.einsum("ne,ne->n", x, x)[:, None]
        if empty is not None:
            far[:, empty[parent]] = np.inf
        chosen = far.argmin(axis=1)
        places[rows] = parent * branch + chosen
        distances[rows] = np.sqrt(np.maximum(far[np.arange(len(rows)), chosen], 0))
    return places, distances


def _groups(parents: I64) -> Sequence[I64]:
    """Return the rows of each parent that has some, in groups of at most ``ROWS``."""
    order = np.argsort(parents, kind="stable")
    whole = np.split(order, np.flatnonzero(np.diff(parents[order])) + 1) if len(order) else []
    return [rows[start : start + ROWS] for rows in whole for start in range(0, len(rows), ROWS)]

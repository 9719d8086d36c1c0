"""Balanced k-means in mini-batches, one node of a tree at a time (arXiv 2510.02375, appendix A)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

STEPS = 20
BATCH = 6400
"""Embeddings of a step; a node with no more than that sees all of them in every step."""

FULL = 1.5
"""How many times its even share of a step a cluster may take before it gives half to the smallest."""

_KEPT = 0.5  # what a step leaves of the sums of those before it, where each sees other embeddings


def fit_node(read: Callable[[I64], F32], members: I64, branch: int, rng: np.random.Generator) -> F32:
    """Return ``branch`` centroids ``[branch, width]`` of the embeddings that ``read`` gives of ``members``.

    Starts from k-means++ and takes ``STEPS`` steps of expectation and maximisation, each on ``BATCH`` fresh members.
    After each assignment a cluster with more than ``FULL`` times its share gives a random half to the smallest. With
    fewer members than clusters they are the centroids themselves, some of them twice. Depends on ``rng`` alone.
    """
    if len(members) <= branch:
        return read(members[np.arange(branch) % len(members)])
    whole = read(members) if len(members) <= BATCH else None
    first = whole if whole is not None else read(_draw(members, rng))
    centroids = _spread(first, branch, rng)
    sums, counts = np.zeros(centroids.shape, np.float64), np.zeros(branch, np.float64)
    for _ in range(STEPS):
        batch = whole if whole is not None else read(_draw(members, rng))
        chosen = _balanced(_squares(batch, centroids).argmin(axis=1), branch, rng)
        kept = _KEPT if whole is None else 0.0
        sums *= kept
        counts *= kept
        np.add.at(sums, chosen, batch)
        counts += np.bincount(chosen, minlength=branch)
        seen = counts > 0
        centroids[seen] = (sums[seen] / counts[seen, None]).astype(np.float32)
    return centroids


def _draw(members: I64, rng: np.random.Generator) -> I64:
    """Return a random batch in ascending order, which is how a disk reads it fastest."""
    return np.sort(rng.choice(members, BATCH, replace=False))


def _spread(points: F32, branch: int, rng: np.random.Generator) -> F32:
    """Choose starting centroids by k-means++: each with a chance of its squared distance to those before it."""
    chosen = [int(rng.integers(len(points)))]
    far = _squares(points, points[chosen])[:, 0].astype(np.float64)
    while len(chosen) < branch:
        total = far.sum()
        chance = far / total if total > 0 else None  # None: all that is left is equal to what was chosen
        chosen.append(int(rng.choice(len(points), p=chance)))
        far = np.minimum(far, _squares(points, points[chosen[-1:]])[:, 0])
    return points[chosen].copy()


def _balanced(chosen: I64, branch: int, rng: np.random.Generator) -> I64:
    most = FULL * len(chosen) / branch
    counts = np.bincount(chosen, minlength=branch)
    for _ in range(branch):
        large, small = int(counts.argmax()), int(counts.argmin())
        if counts[large] <= most or large == small:
            break
        moved = rng.permutation(np.flatnonzero(chosen == large))[: (counts[large] - counts[small]) // 2]
        chosen[moved] = small
        counts[large] -= len(moved)
        counts[small] += len(moved)
    return chosen


def _squares(points: F32, centroids: F32) -> F32:
    """Return squared distances ``[N, branch]``."""
    dots = points @ centroids.T
    norms = np.einsum("ne,ne->n", points, points)[:, None] + np.einsum("be,be->b", centroids, centroids)
    squares: F32 = np.maximum(norms - 2 * dots, 0)
    return squares

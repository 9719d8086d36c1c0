"""Clustering and descent: clusters that are there are found, evenly, and the same ones with the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from memc.bank import kmeans
from memc.bank.kmeans import _balanced, fit_node
from memc.bank.tree import Tree, nearest_child

BRANCH = 4


def points(counts: list[int], width: int = 12, spread: float = 0.2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return points around random centres, and which centre each is of."""
    generator = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(5).normal(size=(len(counts), width))
    labels = np.repeat(np.arange(len(counts)), counts)
    return (centres[labels] + spread * generator.normal(size=(len(labels), width))).astype(np.float32), labels


def fit(x: np.ndarray, branch: int = BRANCH, seed: int = 0) -> np.ndarray:
    return fit_node(lambda rows: x[rows], np.arange(len(x)), branch, np.random.default_rng(seed))


@pytest.mark.parametrize("batch", [6400, 64])
def test_separate_clusters_are_found(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "BATCH", batch)
    x, labels = points([60] * BRANCH)
    chosen, _ = nearest_child(x, np.zeros(len(x), np.int64), fit(x), BRANCH)
    pairs = set(zip(labels.tolist(), chosen.tolist(), strict=True))
    assert len(pairs) == BRANCH


def test_a_cluster_that_is_too_large_is_shared_out() -> None:
    x, _ = points([300, 10, 10, 10])
    chosen, _ = nearest_child(x, np.zeros(len(x), np.int64), fit(x), BRANCH)
    assert np.bincount(chosen, minlength=BRANCH).max() <= 2 * kmeans.FULL * len(x) / BRANCH
    after = np.bincount(_balanced(np.zeros(100, np.int64), BRANCH, np.random.default_rng(0)), minlength=BRANCH)
    assert after.sum() == 100 and after.max() <= kmeans.FULL * 100 / BRANCH


def test_the_seed_alone_decides() -> None:
    x, _ = points([50] * BRANCH)
    assert np.array_equal(fit(x), fit(x))
    assert not np.array_equal(fit(x), fit(x, seed=1))


@pytest.mark.parametrize("count", [1, 3, 4])
def test_fewer_members_than_clusters_are_the_centroids(count: int) -> None:
    x, _ = points([count])
    centroids = fit(x)
    assert centroids.shape == (BRANCH, x.shape[1])
    chosen, distances = nearest_child(x, np.zeros(count, np.int64), centroids, BRANCH)
    assert np.allclose(distances, 0, atol=1e-2) and len(set(chosen.tolist())) == count


def test_equal_points_end() -> None:
    x = np.ones((50, 3), np.float32)
    assert np.array_equal(fit(x), np.ones((BRANCH, 3), np.float32))


def tree(x: np.ndarray, levels: int, branch: int) -> Tree:
    """Fit a tree level by level, as the builder does."""
    parents, centroids, counts = np.zeros(len(x), np.int64), [], []
    for level in range(levels):
        members = [np.flatnonzero(parents == node) for node in range(branch**level)]
        fitted = [
            fit_node(lambda rows: x[rows], own, branch, np.random.default_rng([level, node]))
            if len(own)
            else np.zeros((branch, x.shape[1]), np.float32)
            for node, own in enumerate(members)
        ]
        centroids.append(np.concatenate(fitted))
        parents, _ = nearest_child(x, parents, centroids[-1], branch)
        counts.append(np.bincount(parents, minlength=branch ** (level + 1)))
    return Tree(branch, tuple(centroids), tuple(counts), (10.0,) * levels)


def test_descent_recalls_what_an_exhaustive_search_does_within_a_hundredth() -> None:
    generator = np.random.default_rng(0)
    branch, levels, width = 8, 3, 32
    coarse = generator.normal(size=(branch, width))
    middle = coarse[:, None] + 0.5 * generator.normal(size=(branch, branch, width))
    fine = (middle[:, :, None] + 0.25 * generator.normal(size=(branch, branch, branch, width))).reshape(-1, width)
    labels = np.repeat(np.arange(len(fine)), 12)
    x = (fine[labels] + 0.03 * generator.normal(size=(len(labels), width))).astype(np.float32)
    made = tree(x, levels, branch)
    leaves = made.assign(x)[0][:, -1]
    majority = {leaf: np.bincount(labels[leaves == leaf]).argmax() for leaf in np.unique(leaves)}
    queries = (fine + 0.03 * generator.normal(size=fine.shape)).astype(np.float32)
    greedy, exhaustive = made.assign(queries)[0][:, -1], made.nearest_leaf(queries)
    recall = [np.mean([majority[leaf] == n for n, leaf in enumerate(found)]) for found in (greedy, exhaustive)]
    assert recall[0] >= recall[1] - 0.01, recall
    assert recall[0] > 0.5  # 1/512 by chance


def test_descent_passes_over_empty_clusters_and_says_how_far_it_is_near() -> None:
    centroids = (np.array([[0.0], [10.0]], np.float32), np.array([[0.0], [1.0], [10.0], [11.0]], np.float32))
    made = Tree(2, centroids, (np.array([3, 3]), np.array([0, 3, 3, 0])), (1.0, 0.5))
    path = made.descend(np.zeros(1, np.float32))
    assert path.cluster == (0, 1) and path.distances == (0, 1) and path.depth == 1 and path.near == (0,)
    assert made.descend(np.full(1, 9.5, np.float32)).depth == 2
    far = made.descend(np.full(1, 5.5, np.float32))
    assert far.depth == 0 and far.near == () and len(far.cluster) == 2


def test_many_are_assigned_as_one_by_one() -> None:
    x, _ = points([40] * 6)
    made = tree(x, 2, 3)
    places, distances = made.assign(x)
    for row in range(0, len(x), 17):
        path = made.descend(x[row])
        assert path.cluster[0] * 3 + path.cluster[1] == places[row, 1]
        assert np.allclose(path.distances, distances[row], atol=1e-4)

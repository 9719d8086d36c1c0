"""The tree search over pages: what it finds, what it looks at, and what it must miss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memc.dialect.sparse_attention import visited
from memc.kernels.sparse_attention import tree
from tests.kernels.oracles import tree_search


def search(scores: torch.Tensor, start: int, end: int, count: int) -> list[int]:
    """Return the pages that one query finds by ``scores [P]``."""
    each = (torch.tensor(x).view(1, 1, 1, 1) for x in (start, end, count))
    rounds = (math.ceil((end - start) / max(1, count)) - 1).bit_length()
    found = tree.reached(scores.view(1, 1, 1, -1), *each, most=count + 2, rounds=rounds)
    return [int(page) for page in found[0, 0, 0].nonzero()[:, 0]]


@settings(max_examples=200, deadline=None)
@given(
    pages=st.integers(1, 70),
    start=st.integers(0, 5),
    count=st.integers(0, 12),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
def test_a_search_finds_what_the_oracle_finds(pages: int, start: int, count: int, seed: int, ties: bool) -> None:
    scores = torch.randn(pages, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        scores = scores.round()
    end = max(start, pages - 3)
    free = list(range(start, end))
    found = search(scores, start, end, count)
    assert found == sorted(tree_search(free, dict(enumerate(scores.tolist())), count))
    assert len(found) == min(count, len(free)) and set(found) <= set(free)


def test_scores_that_rise_towards_one_page_lead_to_it_and_its_neighbours() -> None:
    """Where neighbours resemble one another the search finds the best pages of all."""
    for peak in range(4, 60):
        scores = -(torch.arange(64.0) - peak).abs()
        assert peak in search(scores, 0, 64, 4)


def test_a_page_that_stands_alone_is_missed() -> None:
    """The planted weakness: a needle whose neighbours are no better than others is met by chance."""
    met = 0
    for where in range(64):
        scores = torch.linspace(0, 1, 64)
        scores[where] = 10.0
        met += where in search(scores, 0, 64, 4)
    assert 4 <= met <= 20, met


@pytest.mark.parametrize(("pages", "count"), [(100, 8), (64, 4), (65, 4), (9, 8), (8, 8), (300, 1)])
def test_the_cost_counts_the_rounds(pages: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = []
    right = tree._best_halves

    def counted(*a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rounds.append(2 * count)
        return right(*a)

    monkeypatch.setattr(tree, "_best_halves", counted)
    search(torch.randn(pages + 5), 2, pages + 2, count)
    # The last round is spared where the longest ranges were dropped.
    assert visited(pages + 5, count + 5, 5) - 2 * count <= sum(rounds) <= visited(pages + 5, count + 5, 5)
    assert sum(rounds) <= 2 * count * (1 + math.log2(pages / count))

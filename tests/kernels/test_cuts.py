"""Choices that rounding may turn are counted, whatever chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memc.dialect.cuts import watched
from memc.kernels.sparse_attention.choose import first, needed
from memc.kernels.sparse_attention.tree import reached
from tests.backends.attention_programs import sparse_attention

INF = torch.inf
RANK = torch.tensor(
    [
        [INF, 4.0, 3.0, 2.0, -INF],  # 3 against 2
        [INF, 3.0 * (1 + 5e-6), 3.0, 5.0, -INF],  # 3 against as much
        [INF, 3.0 * (1 + 5e-5), 3.0, 5.0, -INF],  # 3 against a bit more than that
        [-2.0, -2.0, -1.0, -1.0, -1.0],  # equal ones, on the same side of the cut and across it
        [INF, INF, INF, 1.0, 2.0],  # all that must be taken, and no more
        [INF, 1.0, 2.0, -INF, -INF],  # all that there is
    ]
)


def test_choices_near_the_cut_are_counted() -> None:
    with watched() as cuts:
        first(RANK, 3)
    assert (cuts.made, cuts.near) == (4, 1)
    assert cuts.text == "1 of 4 choices within 1e-05 of the cut"
    with watched() as cuts:
        first(RANK[3:4], 4)
        first(RANK, 5)  # everything: no choice
        first(torch.tensor([[3, 2, 2, 1]]), 2)  # places in a list, no scores
    assert (cuts.made, cuts.near) == (1, 1)


def test_nothing_is_counted_outside() -> None:
    with watched() as cuts, watched() as inner:
        first(RANK, 3)
    first(RANK, 3)
    assert (cuts.made, inner.made) == (0, 4)


@pytest.mark.parametrize(("last", "near"), [(2.0, 0), (1.0 + 1e-6, 1), (1.0 + 1e-4, 0)])
def test_choices_by_mass_are_counted(last: float, near: int) -> None:
    """Half of the mass is reached by the first of two that weigh alike."""
    rank = torch.tensor([[last, 1.0, -INF, INF]])
    with watched() as cuts:
        needed(rank, 0.5)
    assert (cuts.made, cuts.near) == (1, near)


@pytest.mark.parametrize("refresh", [1, 2])
def test_what_is_taken_by_mass_is_counted(refresh: int) -> None:
    """Pages of equal keys hold equal mass: half of it is in half of them, sinks and window beside."""
    program = sparse_attention(mass=0.5, budget=16, page=2, dense_below=20, refresh=refresh if refresh > 1 else 0)
    with torch.no_grad():
        program.module.key_weight.zero_()  # type: ignore[union-attr, operator]
    tokens, positions = torch.zeros(1, 24, dtype=torch.int64), torch.arange(24)[None]
    with watched() as cuts:
        program(tokens, positions, *program.new_state(1))
    # Two groups of four queries with eight pages each: the first, the last two at most, and half of nine or more.
    assert cuts.budget == 2 * 4 * 8
    assert 0.6 < cuts.taken / cuts.budget <= 1
    assert cuts.text.endswith(" % of the budget taken")


@pytest.mark.parametrize(("gap", "near"), [(1.0, 0), (1e-6, 2)])
def test_choices_of_a_search_are_counted(gap: float, near: int) -> None:
    """Of four ranges' halves three score alike in the row that is live; the dead row chooses nothing."""
    scores = (torch.arange(8.0) * gap + 1).expand(1, 1, 2, 8)

    def of(live: int, dead: int) -> Tensor:
        return torch.tensor([live, dead]).view(1, 1, 2, 1)

    with watched() as cuts:
        reached(scores, of(0, 0), of(8, 0), of(2, 2), 3, 2)
    assert (cuts.made, cuts.near) == (2, near)

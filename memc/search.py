"""Budgets over choices that are made block by block: the best choice for every amount that it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 512
"""Steps that a cost's whole range is told apart in."""

MOST = 20_000
"""Labels that are kept after a block; where there are more, costs are told apart half as finely."""


@dataclass(frozen=True)
class Choice:
    """What one block may become: what is lost by it, and what it costs. Both add up over blocks."""

    loss: float
    costs: tuple[float, ...]


@dataclass(frozen=True)
class Selection:
    """A choice for every block, by its index among the block's choices."""

    loss: float
    costs: tuple[float, ...]
    picks: tuple[int, ...]


@dataclass(frozen=True)
class _Label:
    loss: float
    costs: tuple[float, ...]
    pick: int
    before: _Label | None

    def picks(self) -> tuple[int, ...]:
        found: list[int] = []
        label: _Label | None = self
        while label is not None and label.before is not None:
            found.append(label.pick)
            label = label.before
        return tuple(reversed(found))


def frontier(blocks: Sequence[Sequence[Choice]], most: int | None = None) -> list[Selection]:
    """Return the selection of least loss for every amount of costs, told apart in ``STEPS`` of each cost's range.

    Dynamic programming over the blocks, a label for each (rounded) vector of costs reached so far; the sums themselves
    are exact. At most ``most`` labels are kept after a block, ``MOST`` unless said. Several costs
    may be given; a block of no choices is refused with ``ValueError``.
    """
    if not blocks or not all(blocks):
        raise ValueError("every block has a choice")
    count = len(blocks[0][0].costs)
    spans = [
        sum(max(c.costs[i] for c in block) - min(c.costs[i] for c in block) for block in blocks) for i in range(count)
    ]
    units = [span / STEPS if span > 0 else 1.0 for span in spans]
    labels = [_Label(0.0, (0.0,) * count, -1, None)]
    for block in blocks:
        reached = [
            _Label(label.loss + choice.loss, _sum(label.costs, choice.costs), index, label)
            for label in labels
            for index, choice in enumerate(block)
        ]
        labels = _least(reached, units)
        while len(labels) > (most or MOST):
            units = [2 * unit for unit in units]
            labels = _least(labels, units)
    return [Selection(label.loss, label.costs, label.picks()) for label in labels]


def _sum(left: tuple[float, ...], right: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _least(labels: Sequence[_Label], units: Sequence[float]) -> list[_Label]:
    """Return the label of least loss for each rounded vector of costs; of equal losses the cheaper one."""
    best: dict[tuple[int, ...], _Label] = {}
    for label in labels:
        key = tuple(round(cost / unit) for cost, unit in zip(label.costs, units, strict=True))
        held = best.get(key)
        if held is None or (label.loss, label.costs) < (held.loss, held.costs):
            best[key] = label
    return list(best.values())

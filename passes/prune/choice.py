"""How much of which group is removed: legal sizes, spread evenly over the layers to an exact share of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.passes.prune.groups import Group

KEY_CHANNELS = 8
"""Key channels of a head stay in multiples of this: as many float32 numbers as a register of AVX2 has."""


@dataclass(frozen=True)
class Task:
    """So many units of a group to remove; which ones is settled by scores, or evenly."""

    group: Group
    count: int

    @property
    def cost(self) -> int:
        """Parameters that go."""
        return self.count * unit_cost(self.group)


def unit_cost(group: Group) -> int:
    """Return the parameters of one unit: they are all of one size."""
    return int(group.cost[0])


def legal(group: Group, multiple: int) -> list[int]:
    """Return how many units may be removed, none included, in ascending order.

    Channels stay in multiples of ``multiple``, key channels of a head in multiples of ``KEY_CHANNELS`` where that is
    less; of the query heads of each key-value head as many go, and one stays; so does one key-value head, and every one
    that is fixed.
    """
    match group.kind:
        case "ffn_channels":
            return _in_multiples(group.units, multiple, len(group.fixed))
        case "key_channels":
            return _in_multiples(group.units, max(1, min(multiple, KEY_CHANNELS) // group.channels), len(group.fixed))
        case "kv_groups":
            return list(range(group.units - max(1, len(group.fixed)) + 1))
        case "query_heads":
            assert isinstance(group.block, AttentionBlock)
            heads = group.block.num_kv_heads
            return list(range(0, group.units - max(heads, len(group.fixed)) + 1, heads))


def _in_multiples(units: int, multiple: int, fixed: int) -> list[int]:
    most = (units - 1) // multiple * multiple
    return [0, *(units - kept for kept in range(most, max(1, fixed) - 1, -multiple))]


def spread(groups: Sequence[Group], parameters: float, multiple: int, *, alike: bool = False) -> list[Task]:
    """Remove about so many parameters from the groups, the same share of each but for rounding.

    What rounding leaves over goes on to the next group, so that the sum is as near as one step. Where that is more than
    can be removed, all that can be is. Groups ``alike`` lose alike: there it goes nowhere.
    """
    whole = sum(unit_cost(group) * group.units for group in groups)
    share, tasks, owed = parameters / max(whole, 1), list[Task](), 0.0
    for group in groups:
        cost = unit_cost(group)
        owed = share * cost * group.units + (0.0 if alike else owed)
        count = min(legal(group, multiple), key=lambda n: abs(n * cost - owed))
        owed -= count * cost
        tasks.append(Task(group, count))
    return tasks


def most(groups: Sequence[Group], multiple: int) -> int:
    """Return how many parameters can go at most."""
    return sum(legal(group, multiple)[-1] * unit_cost(group) for group in groups)


def lowest(task: Task, scores: Tensor) -> tuple[int, ...]:
    """Return the units of the lowest scores, the first of equal ones; as many query heads of each key-value head."""
    scores = scores.double().clone()
    scores[list(task.group.fixed)] = torch.inf
    rows = scores.reshape(parts(task.group), -1)
    per_row = task.count // len(rows)
    order = rows.argsort(dim=1, stable=True)[:, :per_row] + torch.arange(len(rows))[:, None] * rows.shape[1]
    return tuple(sorted(order.flatten().tolist()))


def evenly(task: Task) -> tuple[int, ...]:
    """Return units evenly spaced: what stands for the choice where nothing is known to choose by."""
    free = [unit for unit in range(task.group.units) if unit not in task.group.fixed]
    rows = parts(task.group)
    size, per_row = len(free) // rows, task.count // rows
    cuts = [size * index // per_row for index in range(per_row)] if per_row else []
    assert all(a < b for a, b in pairwise(cuts))
    return tuple(free[row * size + cut] for row in range(rows) for cut in cuts)


def parts(group: Group) -> int:
    """Return the parts of a group that lose as many units each."""
    if group.kind != "query_heads":
        return 1
    assert isinstance(group.block, AttentionBlock)
    return group.block.num_kv_heads

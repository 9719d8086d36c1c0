"""How much each block loses, searched: least is expected to be lost by all at the cost of a uniform spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memc.blocks import AttentionBlock
from memc.cost import demands
from memc.passes.prune.choice import Task, evenly, legal, unit_cost
from memc.passes.prune.curves import Curve, curves
from memc.passes.prune.groups import Group
from memc.passes.prune.rewrite import Cut, Pruner
from memc.pipeline import Calibration
from memc.program import Program
from memc.search import Choice, frontier

Cost = tuple[float, float, float]
"""Parameters, FLOPs and bytes read of a token."""


@dataclass(frozen=True)
class Allocation:
    """The tasks of least expected loss that cost no more than those of a ``uniform`` spread."""

    tasks: tuple[Task, ...]
    uniform: tuple[Task, ...]
    curves: tuple[Curve, ...]

    def expected(self, tasks: Sequence[Task]) -> float:
        """Return the KL to the original that tasks are expected to cost, in nats a token."""
        return sum(curve.nats(task.count) for curve, task in zip(self.curves, tasks, strict=True))


def allocate(
    program: Program,
    spreads: Sequence[Sequence[Task]],
    calibration: Calibration,
    score: str,
    multiple: int,
    context: int,
    *,
    most: float,
    biases: bool = True,
) -> list[Allocation]:
    """Search how much each group loses, of all the sizes that it can have, at the cost of a uniform spread at most.

    No group loses over ``most`` times the share that the uniform spread takes of its kind; 0 stands for no limit. For
    several uniform spreads over the same groups at once: the calibration sequences run once for all.
    """
    known = curves(program, spreads, calibration, score, multiple, most=most, biases=biases)
    units, costs = dict[str, Cost](), list[Cost]()
    for task in spreads[0]:
        key = _alike(task.group)
        if key not in units:
            units[key] = unit_costs(program, task.group, multiple, context)
        costs.append(units[key])
    return [search(found, costs, uniform) for found, uniform in zip(known, spreads, strict=True)]


def search(known: Sequence[Curve], costs: Sequence[Cost], uniform: Sequence[Task]) -> Allocation:
    """Choose by dynamic programming a size for each group; ``costs`` are those of one unit of each.

    Of all choices that leave no more parameters, ask for no more FLOPs and read no more bytes than the tasks of a
    uniform spread do, that of the least sum of expected losses. So its modelled time is at most theirs on every target:
    a roofline grows with each of the three.
    """
    # Like beside like: fewer sums of costs to keep apart.
    order = sorted(range(len(uniform)), key=lambda index: uniform[index].group.kind)
    found = frontier([[Choice(known[i].nats(n), _left(costs[i], n)) for n in known[i].counts] for i in order])
    spread = [_left(cost, task.count) for cost, task in zip(costs, uniform, strict=True)]
    most = [sum(column) for column in zip(*spread, strict=True)]
    held = [one for one in found if all(a <= b + 1e-9 * abs(b) for a, b in zip(one.costs, most, strict=True))]
    same = Allocation(tuple(uniform), tuple(uniform), tuple(known))
    best = min(held, key=lambda one: one.loss, default=None)
    if best is None or best.loss >= same.expected(uniform):  # what costs are rounded to may hide the uniform spread
        return same
    picked = dict(zip(order, best.picks, strict=True))
    tasks = tuple(Task(curve.group, curve.counts[picked[i]]) for i, curve in enumerate(known))
    return Allocation(tasks, tuple(uniform), tuple(known))


def unit_costs(program: Program, group: Group, multiple: int, context: int) -> Cost:
    """Return what goes with each unit of a group, counted on the program without some of them."""
    count = legal(group, multiple)[-1]
    if not count:
        return 0.0, 0.0, 0.0
    smaller = Pruner(program).run([Cut(group, evenly(Task(group, count)))])
    less = demands(program, [context])[context] - demands(smaller, [context])[context]
    return float(unit_cost(group)), less.flops / count, less.bytes_read / count


def _alike(group: Group) -> str:
    """Say what the cost of a unit depends on."""
    block = group.block
    seen = (block.mask, block.head_dim, block.value_dim) if isinstance(block, AttentionBlock) else ()
    return repr((group.kind, group.units, unit_cost(group), seen))


def _left(unit: Cost, count: int) -> Cost:
    parameters, flops, read = unit
    return -count * parameters, -count * flops, -count * read

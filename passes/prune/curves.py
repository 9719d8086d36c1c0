"""What a group of any size loses: the errors that its best fits leave, and what an error there does to the model.

The squared error of a block's refitted output says how much is missed, not how much it matters. So every block is tried
alone at one size and the model's predictions are looked at, which prices its errors: where they are small the KL
divergence grows with their square (its second-order term).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from memc.analysis.stream import Stream
from memc.passes.prune import measure, scores
from memc.passes.prune.choice import Task, legal, lowest
from memc.passes.prune.eliminate import Elimination
from memc.passes.prune.groups import Group
from memc.passes.prune.rewrite import Cut, Fit
from memc.pipeline import Calibration
from memc.program import Program
from memc.raising.feed_forward import linear_input
from memc.train.blocks import logits_node

ROWS = 4
"""Calibration sequences on which prices are measured."""

STRIDE = 4
"""One in so many of their tokens has its prediction compared."""


@dataclass(frozen=True)
class Curve:
    """What losing each of ``counts`` units of a group does: the squared error a token that its best fit leaves.

    ``price`` is by how many nats a token the predictions of the model move for each unit of error.
    """

    group: Group
    counts: tuple[int, ...]
    errors: tuple[float, ...]
    price: float

    def nats(self, count: int) -> float:
        """Return what losing ``count`` units is expected to cost."""
        return self.price * self.errors[self.counts.index(count)]

    def up_to(self, bound: float) -> Curve:
        """Return the curve of the counts that are within a bound."""
        some = sum(count <= bound for count in self.counts)
        return replace(self, counts=self.counts[:some], errors=self.errors[:some])


def limits(tasks: Sequence[Task], most: float) -> list[float]:
    """Return how many units each group of a uniform spread may lose: ``most`` times the share that its kind loses.

    Any number with ``most`` 0.
    """
    if not most:
        return [float(task.group.units) for task in tasks]
    taken, there = Counter[str](), Counter[str]()
    for task in tasks:
        taken[task.group.kind] += task.count
        there[task.group.kind] += task.group.units
    shares = {kind: taken[kind] / there[kind] for kind in there}
    return [max(task.count, most * shares[task.group.kind] * task.group.units) for task in tasks]


def curves(
    program: Program,
    spreads: Sequence[Sequence[Task]],
    calibration: Calibration,
    score: str,
    multiple: int,
    *,
    most: float,
    biases: bool = True,
) -> list[tuple[Curve, ...]]:
    """Measure the curve of each task's group on what calibration sequences show of the original.

    For several spreads over the same groups at once: their curves differ in the price, which is measured at the size
    that the task of each has, or at the smallest cut where it cuts nothing; and in their counts, which stay within
    :func:`limits`.
    """
    groups = [task.group for task in spreads[0]]
    assert all([task.group.exit for task in tasks] == [group.exit for group in groups] for tasks in spreads)
    gates = scores.taylor(program, groups, calibration) if score == "taylor" else []
    found: dict[int, list[Curve]] = {}
    bounded = [limits(tasks, most) for tasks in spreads]
    original = Stream(program, calibration)
    predictions = Predictions(program, original.fork(ROWS))
    for index in measure.in_order(spreads[0]):
        group, within = groups[index], [bounds[index] for bounds in bounded]
        counts = [count for count in legal(group, multiple) if count <= max(within)]
        if counts == [0]:
            found[index] = [Curve(group, (0,), (0.0,), 0.0) for _ in spreads]
            continue
        ahead = original.fork(ROWS)
        (moments,) = measure.moments_of(original, group, [], gram=True)
        weight, bias = measure.exit_weight(program, group.exit)
        elimination = Elimination(group, weight, measure.fit_moments(moments, bias, biases=biases))
        units = None
        if score != "obs":
            units = measure.unit_scores(group, weight, score, moments, gates[index] if gates else None)
        trials = [tasks[index].count or counts[1] for tasks in spreads]
        errors, prices = list[float](), dict.fromkeys(trials, 0.0)
        for count in counts:
            _go_to(elimination, group, count, units)
            errors.append(elimination.error)
            if count in prices and elimination.error > 0:
                changed = _changed(ahead.fork(), group, elimination, elimination.fit(bias))
                prices[count] = predictions.kl(changed) / elimination.error
        found[index] = [
            Curve(group, tuple(counts), tuple(errors), prices[trial]).up_to(bound)
            for trial, bound in zip(trials, within, strict=True)
        ]
    return [tuple(found[index][place] for index in range(len(groups))) for place in range(len(spreads))]


def _go_to(elimination: Elimination, group: Group, count: int, units: Tensor | None) -> None:
    """Take units out until ``count`` are gone: by their scores, or those that the fit misses least."""
    if units is None:
        elimination.least(count)
    else:
        gone = set(elimination.removed)
        more = [unit for unit in lowest(Task(group, count), units) if unit not in gone]
        if more:
            elimination.remove(more)


def _changed(stream: Stream, group: Group, elimination: Elimination, fit: Fit) -> Stream:
    cut = Cut(group, tuple(sorted(elimination.removed)), biased=True, fit=fit)
    stream.replace(group.exit, linear_input(group.exit), cut.exit_function())
    return stream


class Predictions:
    """The next-token distributions of a program on some sequences, which those of a changed one are held to."""

    def __init__(self, program: Program, stream: Stream) -> None:
        """Run a stream of the program to its end."""
        self._end = logits_node(program)
        self._expected = list(self._log_chances(stream))

    def kl(self, stream: Stream) -> float:
        """Run a stream of the same sequences to the end; returns KL(program || changed), the mean in nats a token."""
        total, count = 0.0, 0
        for expected, found in zip(self._expected, self._log_chances(stream), strict=True):
            total += float((expected.exp() * (expected - found)).sum())
            count += len(found)
        return total / count

    def _log_chances(self, stream: Stream) -> Iterator[Tensor]:
        for seen in stream.advance(self._end, [self._end]):
            yield seen[self._end][0, ::STRIDE].float().log_softmax(-1)

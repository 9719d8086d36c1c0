"""What rewriting one block alone does to a model's predictions: only what comes after the block is run again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from memc.program import Program, get_tensor
from memc.train.blocks import Teacher, cut, logits_node
from memc.verify.inputs import positions_of


@dataclass(frozen=True)
class Distance:
    """How far predictions are from the original's: KL summed over ``tokens``, and how much less likely the text is.

    ``excess`` is the negative log-likelihood of the ``predicted`` tokens over the original's, summed; both in nats.
    """

    tokens: int = 0
    kl: float = 0.0
    predicted: int = 0
    excess: float = 0.0

    @property
    def kl_mean(self) -> float:
        """KL in nats a token."""
        return self.kl / self.tokens

    @property
    def ratio(self) -> float:
        """Perplexity as a ratio to the original's."""
        return math.exp(min(self.excess / max(self.predicted, 1), 700.0))

    def __add__(self, other: Distance) -> Distance:
        """Return the distance over the tokens of both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Distance(*(mine + its for mine, its in pairs))


class Yardstick:
    """The original's predictions for ``tokens [N,T]`` from token ``first`` on, which rewritten programs are held to."""

    def __init__(self, original: Program, tokens: Tensor, first: int) -> None:
        """Run the original once."""
        self._original, self._tokens, self._first = original, tokens, first
        name = logits_node(original).name
        self._expected = [
            _log_chances(values[name], first) for values in map(partial(_values, Teacher(original, [(name,)])), tokens)
        ]

    @torch.no_grad()
    def distances(self, results: Sequence[Program]) -> list[Distance]:
        """Return how far each of ``results``, rewritten from the original, is from it.

        A row is run at a time, from an empty state; of a result only what does not have the original's values, and the
        original only so far: rewriting keeps the names of what it leaves alone.
        """
        parts = []
        for result in results:
            same = {node for node in unchanged(self._original, result) if node.op != "get_attr"}
            parts.append(cut(result, [logits_node(result)], same.__contains__))
        wanted = tuple(dict.fromkeys(name for _, inputs, _ in parts for name in inputs))
        teacher, sums = Teacher(self._original, [wanted]), [Distance() for _ in results]
        for row, expected in zip(self._tokens, self._expected, strict=True):
            values = _values(teacher, row)
            for index, (module, inputs, states) in enumerate(parts):
                (logits,) = module(*(values[name] for name in inputs), *(spec.empty(1) for spec in states))
                sums[index] += _distance(expected, _log_chances(logits, self._first), row[self._first :])
        return sums


def _values(teacher: Teacher, row: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    teacher.run(row[None], positions_of(row[None]), lambda _, values: found.update(values))
    return found


def unchanged(original: Program, result: Program) -> set[Node]:
    """Return the nodes of ``result`` whose values are those of the node of the same name in ``original``."""
    known = {node.name: node for node in original.module.graph.nodes}
    states = {spec.name: spec for spec in original.states}
    kept = {spec.name for spec in result.states if states.get(spec.name) == spec}
    kept |= {spec.name for spec in original.inputs}
    found: set[Node] = set()
    for node in result.module.graph.nodes:
        twin = known.get(node.name)
        if twin is None or twin.target != node.target:
            continue
        match node.op:
            case "placeholder":
                same = node.name in kept
            case "get_attr":
                name = str(node.target)
                same = get_tensor(result.module, name) is get_tensor(original.module, name)
            case "call_function":
                same = found.issuperset(node.all_input_nodes) and _arguments(node) == _arguments(twin)
            case _:
                same = False
        if same:
            found.add(node)
    return found


def _arguments(node: Node) -> Any:
    return map_arg((node.args, dict(node.kwargs)), lambda source: source.name)


def _log_chances(logits: Tensor, first: int) -> Tensor:
    return logits[0, first:].float().log_softmax(-1)


def _distance(expected: Tensor, found: Tensor, tokens: Tensor) -> Distance:
    """Compare log-probabilities ``[N,V]``; ``tokens [N]`` are those that they are computed at."""
    kl = (expected.exp() * (expected - found)).sum()
    excess = (expected[:-1] - found[:-1]).gather(1, tokens[1:, None]).sum()
    return Distance(len(tokens), float(kl), len(tokens) - 1, float(excess))

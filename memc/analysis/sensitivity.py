"""What rewriting one block alone does to a model's predictions: only what comes after the block is run again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from memc.analysis.stream import Stream
from memc.dialect import op_spec
from memc.evaluate.perplexity import perplexity_of
from memc.pipeline import Calibration
from memc.program import Program, StateSpec, get_tensor
from memc.raising.feed_forward import LINEAR, linear_input
from memc.train.blocks import cut, logits_node
from memc.verify.divergence import token_kl
from memc.verify.inputs import positions_of

SEGMENT = 32
"""Tokens whose KL is summed before it is asked how much it varies: neighbours are alike."""

PRECISE = 0.25
"""Standard error of a KL, as a share of it, that is near enough to choose by: settings are several times apart, and how
what is lost adds up is known no better."""

FINE = 1e-4
"""The same in nats a token: what many blocks may lose together is hundreds of times as much."""


@dataclass(frozen=True)
class Distance:
    """How far predictions are from the original's: KL summed over ``tokens``, and how much less likely the text is.

    ``excess`` is the negative log-likelihood of the ``predicted`` tokens over the original's, summed; both in nats.
    ``squares`` sums the square of the KL of each of the ``segments`` of the text.
    """

    tokens: int = 0
    kl: float = 0.0
    predicted: int = 0
    excess: float = 0.0
    segments: int = 0
    squares: float = 0.0

    @property
    def kl_mean(self) -> float:
        """KL in nats a token."""
        return self.kl / self.tokens

    @property
    def ratio(self) -> float:
        """Perplexity as a ratio to the original's."""
        return perplexity_of(self.excess / max(self.predicted, 1))

    @property
    def error(self) -> float:
        """Standard error of the KL as a share of it, by how it varies over the segments; infinite for one of them."""
        if self.segments < 2 or self.kl <= 0:
            return math.inf
        spread = max(self.squares - self.kl * self.kl / self.segments, 0.0) / (self.segments - 1)
        return math.sqrt(spread * self.segments) / self.kl

    def known(self, precise: float) -> bool:
        """Tell whether the standard error is no more than a share of the KL, or than ``FINE``."""
        return self.error <= precise or (self.tokens > 0 and self.error * self.kl_mean <= FINE)

    def __add__(self, other: Distance) -> Distance:
        """Return the distance over the tokens of both."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Distance(*(mine + its for mine, its in pairs))


class Yardstick:
    """The original's predictions for ``tokens [N,T]`` from token ``first`` on, which rewritten programs are held to.

    The original runs through the text once for its predictions, and once for all that is measured as long as one
    rewritten block comes after the other: see :class:`memc.analysis.stream.Stream`.
    """

    def __init__(self, original: Program, tokens: Tensor, first: int) -> None:
        """Run the original once."""
        self._original, self._tokens, self._first = original, tokens, first
        self._nodes = {node.name: node for node in original.module.graph.nodes}
        whole = _Part.of(original, original, first)
        self._expected = [whole(values) for values in self._fresh().advance(*self._watch(whole.inputs))]
        self._stream = self._fresh()

    @torch.no_grad()
    def distances(self, results: Sequence[Program], *, precise: float = 0.0) -> list[Distance]:
        """Return how far each of ``results``, rewritten from the original, is from it.

        A row is run at a time, from an empty state; of a result only what does not have the original's values, of which
        rewriting keeps the names, and logits of the tokens alone that count. Where ``precise`` is not 0, a result whose
        ``error`` is no more than that, or than ``FINE`` nats, is looked at on no further row.
        """
        parts = [_Part.of(self._original, result, self._first) for result in results]
        sums = [Distance() for _ in results]
        wanted = self._watch(dict.fromkeys(name for part in parts for name in part.inputs))
        for row, expected, values in zip(self._tokens, self._expected, self._advance(*wanted), strict=True):
            for index, part in enumerate(parts):
                if not precise or not sums[index].known(precise):
                    sums[index] += _distance(expected, part(values), row[self._first :])
        return sums

    def _fresh(self) -> Stream:
        return Stream(self._original, Calibration(self._tokens, positions_of(self._tokens), ""))

    def _watch(self, names: Iterable[str]) -> tuple[Node, list[Node]]:
        """Return up to which node the original has to run for some values, and their nodes."""
        watched = [self._nodes[name] for name in names]
        return max(watched), watched

    def _advance(self, last: Node, watched: Sequence[Node]) -> Iterable[dict[Node, Tensor]]:
        """Run the original on, from the start where it has passed what is wanted."""
        if not self._stream.reaches(watched):
            self._stream = self._fresh()
        return self._stream.advance(last, watched)


@dataclass(frozen=True)
class _Part:
    """What of a result has to be run again, from values of the original on: ``body``, and the logits after it.

    Only what mixes no tokens any more is left to ``head``, which is given those from ``first`` on alone.
    """

    body: GraphModule
    inputs: tuple[str, ...]
    states: tuple[StateSpec, ...]
    head: GraphModule | None
    nodes: tuple[Node, ...]
    first: int

    @classmethod
    def of(cls, original: Program, result: Program, first: int) -> _Part:
        """Cut it out of ``result``; all of it, where that is the original itself."""
        if result is original:
            given = {node for node in result.placeholders() if node.name not in {s.name for s in result.states}}
        else:
            given = {node for node in unchanged(original, result) if node.op != "get_attr"}
        logits = logits_node(result)
        source, head = _before_logits(logits), None
        if source is not None and source not in given:
            head, inputs, states = cut(result, [logits], lambda node: node is source)
            head = head if inputs == (source.name,) and not states else None
        body, inputs, states = cut(result, [logits if head is None or source is None else source], given.__contains__)
        known = {node.name: node for node in original.module.graph.nodes}
        return cls(body, inputs, states, head, tuple(known[name] for name in inputs), first)

    @torch.no_grad()
    def __call__(self, values: Mapping[Node, Tensor]) -> Tensor:
        """Return log-probabilities ``[N,V]`` of the tokens that count."""
        given = (values[node] for node in self.nodes)
        (found,) = self.body(*given, *(spec.empty(1) for spec in self.states))
        found = found[:, self.first :]
        (logits,) = (found,) if self.head is None else self.head(found)
        chances: Tensor = logits[0].float().log_softmax(-1)
        return chances


def _before_logits(logits: Node) -> Node | None:
    """Return what the last product, which nothing but functions of single tokens follow, takes; None for none."""
    node = logits
    while node.target not in LINEAR:
        if node.op != "call_function" or len(node.all_input_nodes) != 1 or op_spec(node.target) is not None:
            return None
        node = node.all_input_nodes[0]
    return linear_input(node)


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


def _distance(expected: Tensor, found: Tensor, tokens: Tensor) -> Distance:
    """Compare log-probabilities ``[N,V]``; ``tokens [N]`` are those that they are computed at."""
    kl = token_kl(expected, found)
    excess = (expected[:-1] - found[:-1]).gather(1, tokens[1:, None]).sum()
    parts = torch.stack([part.sum() for part in kl.split(SEGMENT)])
    squares = float(parts.square().sum())
    return Distance(len(tokens), float(kl.sum()), len(tokens) - 1, float(excess), len(parts), squares)

"""One rewritten block as a module of its own, and the original run as its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from memc.objective import BlockObjective, Values
from memc.plugins import load_kernels
from memc.program import Program, StateSpec, get_tensor
from memc.raising.feed_forward import LINEAR
from memc.train.products import Rounded


@dataclass(frozen=True)
class StudentBlock:
    """A rewritten block cut out of its program: ``module`` takes ``inputs`` (nodes of the original) then ``states``.

    Its parameters are those of the program, not copies.
    """

    objective: BlockObjective
    module: GraphModule
    inputs: tuple[str, ...]
    states: tuple[StateSpec, ...]

    def __call__(self, values: Values) -> tuple[Tensor, ...]:
        """Return the values of the objective's ``results`` on the original's ``values``, from an empty state."""
        results: tuple[Tensor, ...] = self.module(*self.arguments(values))
        return results

    def arguments(self, values: Values) -> tuple[Tensor, ...]:
        """Return what the module takes: the original's ``values`` and empty states."""
        feed = [values[name] for name in self.inputs]
        return (*feed, *(spec.empty(feed[0].shape[0], feed[0].device) for spec in self.states))

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The block's own new parameters by their short names."""
        named = dict(self.module.named_parameters())
        return {short: named[name] for short, name in self.objective.parameters.items()}


def logits_node(program: Program) -> Node:
    """Return the node of a program's first output."""
    results = program.module.graph.output_node().args[0]
    assert isinstance(results, tuple | list) and isinstance(results[0], Node)
    return results[0]


def leading_to(results: Iterable[Node], given: Callable[[Node], bool] = lambda node: False) -> set[Node]:
    """Return the nodes that ``results`` are computed from, themselves included, down to those that are ``given``."""
    needed: set[Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if not given(node):
                stack += node.all_input_nodes
    return needed


def cut_out(before: Program, after: Program, objective: BlockObjective) -> StudentBlock:
    """Cut a rewritten block out of ``after``, down to the nodes that it shares with ``before``.

    Rewriting keeps the names of what it leaves alone, so a node of the same name in both is the same value.
    """
    shared = {node.name for node in before.module.graph.nodes if node.op != "get_attr"}
    nodes = {node.name: node for node in after.module.graph.nodes}
    part = cut(after, [nodes[name] for name in objective.results], lambda node: node.name in shared)
    return StudentBlock(objective, *part)


def cut(
    program: Program, results: Sequence[Node], given: Callable[[Node], bool]
) -> tuple[GraphModule, tuple[str, ...], tuple[StateSpec, ...]]:
    """Cut what computes ``results`` out of a program, down to the nodes that are ``given`` and to its states.

    Returns a module over the program's own parameters that returns the results, and what it takes: the names of the
    given nodes that it reads, then the states.
    """
    specs = {spec.name: spec for spec in program.states}
    needed = leading_to(results, lambda node: given(node) and node.name not in specs)
    found = [node for node in program.module.graph.nodes if node in needed]
    inputs = [node for node in found if given(node) and node.name not in specs]
    states = [node for node in found if node.name in specs]
    graph, mapping = Graph(), dict[Node, Node]()
    for node in (*inputs, *states):
        mapping[node] = graph.placeholder(node.name)
    for node in found:
        if node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in results))
    module = GraphModule(program.module, graph)
    return module, tuple(node.name for node in inputs), tuple(specs[node.name] for node in states)


@dataclass
class Teacher:
    """The original, run once for each batch and only as far as the blocks that learn from it need.

    ``wanted`` has, for each block, the nodes whose values it is given. ``products`` is the type that matrix products
    with weights are computed in; everything between them stays as it is.
    """

    program: Program
    wanted: Sequence[Sequence[str]]
    products: torch.dtype | None = None
    rounded: Rounded | None = field(init=False)

    def __post_init__(self) -> None:
        """Find what has to be run."""
        load_kernels()
        self.rounded = Rounded(self.products) if self.products is not None else None
        nodes = {node.name: node for node in self.program.module.graph.nodes}
        needed = leading_to([nodes[name] for names in self.wanted for name in names])
        self._order = [node for node in self.program.module.graph.nodes if node in needed]
        self._last: dict[Node, Node] = {}
        for node in self._order:
            for source in (node, *node.all_input_nodes):
                self._last[source] = node

    @torch.no_grad()
    def run(self, tokens: Tensor, positions: Tensor, learn: Callable[[int, dict[str, Tensor]], None]) -> None:
        """Run ``tokens [B,T]`` at ``positions`` and call ``learn(block, values)`` as soon as a block's are there."""
        given = (tokens, positions, *self.program.nothing_fetched(len(tokens), tokens.device))
        feed = dict(zip((spec.name for spec in self.program.inputs), given, strict=True))
        states = {spec.name: spec for spec in self.program.states}
        values: dict[Node, Any] = {}
        missing = [set(names) for names in self.wanted]
        held: list[dict[str, Tensor]] = [{} for _ in self.wanted]
        takers: dict[str, list[int]] = {}
        for index, names in enumerate(self.wanted):
            for name in names:
                takers.setdefault(name, []).append(index)
        for node in self._order:
            if node.op == "placeholder":
                name = str(node.target)
                values[node] = feed[name] if name in feed else states[name].empty(tokens.shape[0], tokens.device)
            elif node.op == "get_attr":
                values[node] = get_tensor(self.program.module, str(node.target))
            else:
                values[node] = self._call(node, values)
            for index in takers.get(node.name, ()):
                held[index][node.name] = values[node]
                missing[index].discard(node.name)
                if not missing[index]:
                    with torch.enable_grad():
                        learn(index, held[index])
                    held[index] = {}
            for source in (node, *node.all_input_nodes):
                if self._last[source] is node:
                    values.pop(source, None)

    def _call(self, node: Node, values: Mapping[Node, Any]) -> Any:
        target: Any = node.target
        if self.products is not None and node.target in LINEAR:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: self._narrow(n, values))
            return target(*args, **kwargs).to(node.meta["val"].dtype)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        return target(*args, **kwargs)

    def _narrow(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """Return a product's factor in the type of products; weights are converted once."""
        assert self.rounded is not None
        return self.rounded(values[node]) if node.op == "get_attr" else values[node].to(self.rounded.kind)

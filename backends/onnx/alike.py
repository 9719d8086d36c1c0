"""Export of one node of each kind, repeated: an exporter's time grows with the nodes that it sees, layers are alike.

Two nodes are of a kind where op, constants and the types of the inputs agree (:class:`memc.infer.Propagation`), so that
the exporter writes the same for both. A *sample* holds the first node of every kind, fenced in by markers: ``Enter`` on
each tensor that it reads, ``Leave`` on what it makes, so that nothing is moved or merged across. What the exporter puts
between the markers becomes one ONNX function, the graph calls of them, and the calls are inlined.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from memc.backends.onnx.calls import DOMAIN
from memc.infer import Propagation
from memc.program import get_tensor

KINDS = "memc.kinds"
"""Domain of the functions; inlined, so that the file never holds it."""


def _enter(kind: int, position: int, x: Tensor) -> Tensor:
    numbers: dict[str, Any] = {"kind": kind, "position": position}
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Enter", [x], numbers, dtype=x.dtype, shape=x.shape, version=1)


def _leave(kind: int, *results: Tensor) -> Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::Leave", results, {"kind": kind}, dtype=torch.bool, shape=[1], version=1)


class Sample:
    """A module of one node of each kind of a graph, inputs and stored tensors too."""

    def __init__(self, module: GraphModule, run: Propagation) -> None:
        """Make the sample of ``module``, every node of which ``run`` has inferred."""
        self.source = module
        self._run = run
        self._kinds: dict[Hashable, int] = {}
        self._made: dict[int, list[Node]] = {}
        graph, left = Graph(), []
        for node in self.nodes():
            kind = self.kind(node)
            if kind in self._made:
                continue
            if node.op == "call_function":
                self._made[kind] = self._put(graph, node, kind)
                left.append(graph.call_function(_leave, (kind, *self._made[kind])))
            else:
                self._made[kind] = [graph.node_copy(node)]
        graph.output(tuple(left))
        self.module = GraphModule(module, graph)

    def nodes(self) -> Iterator[Node]:
        """Yield the nodes of the source that make tensors; sizes and single results belong to who reads them."""
        for node in self.source.graph.nodes:
            if node.op != "output" and self.results(node) and self.origin(node) == (node, 0):
                yield node

    def kind(self, node: Node) -> int:
        """Return the number of a node's kind, in which the sizes that it reads take part with how they are made."""
        return self._kinds.setdefault(self._key(node), len(self._kinds))

    def _key(self, node: Node) -> Hashable:
        sizes = [source for source in _occurrences(node) if not self.results(source)]
        return (self._run.kinds[node], *map(self._key, sizes))

    def results(self, node: Node) -> int:
        """Return how many tensors a node gives; 0 for one that gives sizes."""
        value = self._run.values[node]
        values = value if isinstance(value, tuple | list) else [value]
        return len(values) if all(isinstance(item, Tensor) for item in values) else 0

    def dtype(self, node: Node) -> torch.dtype:
        """Return the type of the one tensor that a node gives."""
        found: torch.dtype = self._run.values[node].dtype
        return found

    def reads(self, node: Node) -> Iterator[Node]:
        """Yield the tensors that a node reads, by way of sizes too, in order and as often as it names them."""
        for source in _occurrences(node):
            if self.results(source):
                yield source
            else:
                yield from self.reads(source)

    def _put(self, graph: Graph, node: Node, kind: int) -> list[Node]:
        position = iter(range(1 << 20))

        def enter(source: Node) -> Node:
            if self.results(source):
                return graph.call_function(_enter, (kind, next(position), self._representative(source)))
            return graph.node_copy(source, enter)

        made = graph.node_copy(node, enter)
        if isinstance(self._run.values[node], Tensor):
            return [made]
        return [graph.call_function(operator.getitem, (made, index)) for index in range(self.results(node))]

    def _representative(self, node: Node) -> Node:
        source, index = self.origin(node)
        return self._made[self.kind(source)][index]

    def origin(self, node: Node) -> tuple[Node, int]:
        """Return the node that makes a tensor, and which of its results it is."""
        if node.target is operator.getitem and self.results(node.all_input_nodes[0]):
            return node.all_input_nodes[0], int(str(node.args[1]))
        return node, 0


def _occurrences(node: Node) -> list[Node]:
    found: list[Node] = []

    def note(source: Node) -> Node:
        found.append(source)
        return source

    map_arg((node.args, node.kwargs), note)
    return found


@dataclass
class _Kind:
    """What the exporter made of one kind."""

    enters: dict[int, ir.Value] = field(default_factory=dict)
    body: list[ir.Node] = field(default_factory=list)
    results: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value] = field(default_factory=list)
    extras: list[ir.Value] = field(default_factory=list)
    """What the body reads of the graph beside its inputs: constants, and sizes of the graph's inputs."""


def repeat(model: ir.Model, sample: Sample) -> bool:
    """Turn the model of a sample into that of the graph that it was taken from; it gets all inputs and tensors.

    Returns False, and leaves a model that is of no use, where the exporter let one kind read what is made in another.
    """
    graph = model.graph
    kinds = _split(graph)
    if kinds is None:
        return False
    for number, kind in kinds.items():
        _make_function(model, number, kind)
    known = {value.name: value for value in graph.inputs}
    graph.inputs.clear()
    values: dict[Node, list[ir.Value]] = {}
    for node in sample.nodes():
        if node.op == "placeholder":
            values[node] = [known.get(node.name) or _input(node.name, sample.dtype(node))]
            graph.inputs.extend(values[node])
        elif node.op == "get_attr":
            values[node] = [_initializer(graph, sample.source, str(node.target))]
        else:
            read = [sample.origin(source) for source in sample.reads(node)]
            arguments = [values[source][index] for source, index in read]
            number = sample.kind(node)
            values[node] = _call(graph, number, kinds[number], arguments, node.name)
    results = [sample.origin(node) for node in _occurrences(sample.source.graph.output_node())]
    graph.outputs.extend(values[source][index] for source, index in results)
    for finish in (
        common.InlinePass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        finish(model)
    return True


def _input(name: str, dtype: torch.dtype) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.tensor(torch.empty(0, dtype=dtype)).dtype))


def _initializer(graph: ir.Graph, module: GraphModule, name: str) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(get_tensor(module, name).detach(), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _split(graph: ir.Graph) -> dict[int, _Kind] | None:
    """Take what belongs to a kind out of the graph; what depends on no ``Enter`` stays."""
    kinds: dict[int, _Kind] = {}
    owners: dict[ir.Value, int] = {}
    ends: list[ir.Node] = []
    for node in graph:
        marker = node.op_type if node.domain == DOMAIN else ""
        read = {owners[value] for value in _read(node) if value in owners}
        if marker == "Enter":
            owner = node.attributes["kind"].as_int()
            kinds.setdefault(owner, _Kind()).enters[node.attributes["position"].as_int()] = node.outputs[0]
            owners[node.outputs[0]] = owner
        elif marker == "Leave":
            owner = node.attributes["kind"].as_int()
            kinds.setdefault(owner, _Kind()).results = _present(node.inputs)
            if read - {owner}:
                return None
            ends.append(node)
        elif len(read) > 1:
            return None
        elif read:
            (owner,) = read
            kinds[owner].body.append(node)
            owners.update((value, owner) for value in node.outputs)
    graph.outputs.clear()
    graph.remove(ends, safe=True)
    graph.remove([node for kind in kinds.values() for node in kind.body])
    return kinds


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, the graphs in its attributes too."""
    yield from _present(node.inputs)
    for inner in _inner(node):
        yield from _present(inner.inputs)


def _inner(node: ir.Node) -> Iterator[ir.Node]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from ir.traversal.RecursiveGraphIterator(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from ir.traversal.RecursiveGraphIterator(graph)


def _present(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [value for value in values if value is not None]


def _make_function(model: ir.Model, number: int, kind: _Kind) -> None:
    """Add the function of a kind; its inputs are what the body reads, then the extras."""
    formal = {value: ir.Value(name=f"in{p}", type=value.type) for p, value in sorted(kind.enters.items())}
    for value, parameter in formal.items():
        ir.convenience.replace_all_uses_with(value, parameter)
        producer = value.producer()
        assert producer is not None
        model.graph.remove(producer, safe=True)
    extras: dict[ir.Value, ir.Value] = {}
    for node in (inner for outer in kind.body for inner in (outer, *_inner(outer))):
        for index, read in enumerate(node.inputs):
            if read is not None and read.graph is model.graph:
                parameter = extras.setdefault(read, ir.Value(name=f"extra{len(extras)}", type=read.type))
                node.replace_input_with(index, parameter)
    made = {value for node in kind.body for value in node.outputs}
    kind.extras = list(extras)
    kind.outputs = list(dict.fromkeys(value for value in kind.results if value in made))
    parameters = [*formal.values(), *extras.values()]
    graph = ir.Graph(parameters, kind.outputs, nodes=kind.body, opset_imports=dict(model.opset_imports))
    function = ir.Function(KINDS, f"k{number}", graph=graph, attributes=[])
    if kind.body:
        model.functions[function.identifier()] = function


def _call(graph: ir.Graph, number: int, kind: _Kind, arguments: list[ir.Value], name: str) -> list[ir.Value]:
    """Call the function of a kind and return the results of the node that it stands for."""
    results = {value: arguments[position] for position, value in kind.enters.items()}
    if kind.outputs:
        inputs = [*(arguments[position] for position in sorted(kind.enters)), *kind.extras]
        call = ir.Node(KINDS, f"k{number}", inputs, num_outputs=len(kind.outputs), name=name)
        graph.append(call)
        for index, (old, new) in enumerate(zip(kind.outputs, call.outputs, strict=True)):
            new.name, new.type = f"{name}.{index}" if index else name, old.type
            results[old] = new
    return [results.get(value, value) for value in kind.results]

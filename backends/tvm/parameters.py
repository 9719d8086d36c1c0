"""Makes every tensor that a graph reads an input, and the ops that read one the backend's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Graph, GraphModule, Node

from memc.backends.tvm import ops
from memc.backends.tvm.weights import Parameter, Parameters
from memc.prepare import match_linear, replace_node, shape
from memc.program import get_tensor

_aten = torch.ops.aten


def take_parameters(
    graph: Graph, module: GraphModule, parameters: Parameters, inputs: Mapping[Node, str]
) -> dict[str, int]:
    """Turn products and look-ups of stored tensors into the backend's own, and all stored tensors into inputs.

    ``parameters`` decides how each is stored. Returns, of the named ``inputs`` that are looked up whole, how many rows
    the smallest of their tables has.
    """
    _replace_products(graph, module, parameters)
    _replace_head_products(graph, module, parameters)
    limits = _replace_tables(graph, module, parameters, inputs)
    _pass_tensors(graph, module, parameters)
    return limits


def _input(graph: Graph, parameter: Parameter) -> Node:
    """Return the placeholder of a parameter, made behind the others where it is new."""
    known = graph.find_nodes(op="placeholder")
    for node in known:
        if node.target == parameter.name:
            found: Node = node
            return found
    with graph.inserting_after(known[-1]):
        return graph.placeholder(parameter.name)


def _replace_products(graph: Graph, module: GraphModule, parameters: Parameters) -> None:
    """Turn products with a stored matrix into the backend's own, the last one marked as what makes the logits."""
    products = [node for node in graph.nodes if match_linear(node) is not None]
    for node in products:
        found = match_linear(node)  # again: what it reads may have been replaced
        assert found is not None
        turned, x, weight, bias = found
        tensor = get_tensor(module, str(weight.target))
        out = int(tensor.shape[1 if turned else 0])
        stored = parameters.matrix(str(weight.target), tensor, turned, last=node is products[-1])
        with graph.inserting_before(node):
            made = graph.call_function(ops.linear, (x, [_input(graph, part) for part in stored], bias, out))
        replace_node(node, made)
        graph.erase_node(node)


def _replace_head_products(graph: Graph, module: GraphModule, parameters: Parameters) -> None:
    """Turn products with a stored matrix for each head, of ``[B,H,T,D]`` with ``[H,D,F]``, into the backend's own."""
    for node in graph.find_nodes(op="call_function", target=_aten.matmul.default):
        match node.args:
            case (Node() as x, Node(op="get_attr") as weight) if (
                len(shape(weight)) == 3 and len(shape(x)) == 4 and shape(x)[1] == shape(weight)[0]
            ):
                tensor = get_tensor(module, str(weight.target))
                with graph.inserting_before(node):
                    stored = _input(graph, parameters.heads(str(weight.target), tensor))
                    made = graph.call_function(ops.head_linear, (x, stored, int(tensor.shape[2])))
                replace_node(node, made)
                graph.erase_node(node)


def _replace_tables(
    graph: Graph, module: GraphModule, parameters: Parameters, inputs: Mapping[Node, str]
) -> dict[str, int]:
    """Turn look-ups into the backend's own; return the rows of the tables that whole inputs are looked up in."""
    limits: dict[str, int] = {}
    for node in graph.find_nodes(op="call_function", target=_aten.embedding.default):
        match node.args:
            case (Node(op="get_attr") as table, Node() as ids, *_):
                tensor = get_tensor(module, str(table.target))
                rows, width = map(int, tensor.shape)
                with graph.inserting_before(node):
                    stored = _input(graph, parameters.table(str(table.target), tensor))
                    made = graph.call_function(ops.embedding, (stored, ids, rows, width))
                replace_node(node, made)
                graph.erase_node(node)
                if ids in inputs:
                    limits[inputs[ids]] = min(rows, limits.get(inputs[ids], rows))
    return limits


def _pass_tensors(graph: Graph, module: GraphModule, parameters: Parameters) -> None:
    """Make every other stored tensor an input."""
    for node in list(graph.find_nodes(op="get_attr")):
        if node.users:
            tensor = get_tensor(module, str(node.target))
            passed = _input(graph, parameters.plain(str(node.target), tensor))
            passed.meta = dict(node.meta)
            node.replace_all_uses_with(passed)
        graph.erase_node(node)

"""What reads stored tensors: products with a matrix, and look-ups in a table."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from memc.backends.onnx import calls
from memc.prepare import match_linear, replace_node

_aten = torch.ops.aten

PAST = 1 << 40
"""Number of a row that no table has."""


def mark_linears(graph: Graph) -> None:
    """Turn products with a stored matrix into markers, so that the exporter neither folds nor copies weights."""
    for node in list(graph.nodes):
        if (found := match_linear(node)) is None:
            continue
        turned, x, weight, bias = found
        with graph.inserting_before(node):
            marker = graph.call_function(calls.linear, (turned, x, weight, *([] if bias is None else [bias])))
        replace_node(node, marker)
        graph.erase_node(node)


def refuse_negative_ids(graph: Graph) -> None:
    """Let ids below 0 be refused, as those past the end of a table are: Gather would count them from its end."""
    safe: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=_aten.embedding.default):
        table, ids, *rest = node.args
        if not isinstance(ids, Node) or ids.op != "placeholder":
            continue
        if ids not in safe:
            with graph.inserting_before(node):
                there = graph.call_function(_aten.ge.Scalar, (ids, 0))
                safe[ids] = graph.call_function(_aten.where.ScalarOther, (there, ids, PAST))
        node.args = (table, safe[ids], *rest)

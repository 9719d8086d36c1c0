"""Tidy a raw graph: one node for each value, one form for every projection."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from memc.raising.build import call
from memc.raising.evaluate import shape

aten = torch.ops.aten


def share_equal_nodes(module: GraphModule) -> None:
    """Let calls with the same op and arguments be one node; random ops and those that write are left alone."""
    first: dict[tuple[object, ...], Node] = {}
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.is_impure():
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)


def raise_linear(module: GraphModule) -> None:
    """Turn ``x @ weight.T`` (and ``+ bias`` behind it) into ``aten.linear``; ``weight`` must be a parameter."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in (aten.matmul.default, aten.mm.default):
            continue
        x, weight = node.args[0], _transposed_parameter(node.args[1])
        if weight is None or not isinstance(x, Node):
            continue
        end, bias = node, None
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is not None and user.target == aten.add.Tensor and user.args[0] is node:
            other = user.args[1]
            if isinstance(other, Node) and other.op == "get_attr" and shape(other) == shape(weight)[:1]:
                end, bias = user, other
        with graph.inserting_before(end):
            linear = call(graph, aten.linear.default, x, weight, bias, like=node)
        end.replace_all_uses_with(linear)
    graph.eliminate_dead_code()


def _transposed_parameter(node: object) -> Node | None:
    if not isinstance(node, Node) or node.op != "call_function" or len(shape(node)) != 2:
        return None
    if node.target not in (
        aten.t.default,
        aten.transpose.int,
        aten.numpy_T.default,
        aten.permute.default,
        aten.mT.default,
    ):
        return None
    source = node.all_input_nodes[0]
    return source if source.op == "get_attr" else None

"""Small edits of a graph that raising needs: new nodes with their shapes, source and path filled in."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from memc.infer import fill_in
from memc.raising.evaluate import shape

aten = torch.ops.aten


def call(graph: Graph, target: Any, *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
    """Insert a call at the graph's insertion point, with inferred value and the source of ``like``."""
    node = graph.call_function(target, args, kwargs)
    if like is not None and "memc" in like.meta:
        node.meta["memc"] = dict(like.meta["memc"])
    fill_in(node)
    return node


def transpose(graph: Graph, node: Node, first: int, second: int) -> Node:
    """Swap two axes; undoes a swap of the same axes instead of adding another."""
    rank = len(shape(node))
    axes = {first % rank, second % rank}
    if node.target == aten.transpose.int:
        source, left, right = node.args
        assert isinstance(left, int) and isinstance(right, int) and isinstance(source, Node)
        if {left % rank, right % rank} == axes:
            return source
    if node.target == aten.permute.default:
        source, order = node.args
        assert isinstance(source, Node) and isinstance(order, list | tuple)
        swapped = list(range(rank))
        swapped[first % rank], swapped[second % rank] = swapped[second % rank], swapped[first % rank]
        if [int(axis) % rank for axis in order] == swapped:  # type: ignore[arg-type]
            return source
    return call(graph, aten.transpose.int, node, first, second, like=node)

"""Tidy a raw graph: one node for each value, one form for every projection, parts joined instead of written."""

from __future__ import annotations

from typing import Any

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


def join_written_parts(module: GraphModule) -> None:
    """Turn a tensor that is written slice by slice, all of it, into the concatenation of what is written."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target != aten.slice_scatter.default:
            continue
        parts = _written_parts(node)
        if parts is None:
            continue
        with graph.inserting_before(node):
            joined = call(graph, aten.cat.default, parts, _slice(node)[0], like=node)
        node.replace_all_uses_with(joined)
    graph.eliminate_dead_code()


def _slice(node: Node) -> tuple[int, int, int, int]:
    """Return axis, start, end and step of a ``slice_scatter``; of a size that is no number the end is -1."""
    given: list[Any] = [*node.args[2:]]
    axis, start, end, step = given + [0, None, None, 1][len(given) :]
    axis %= len(shape(node))
    size = shape(node)[axis]
    if not isinstance(size, int) or not all(isinstance(number, int | None) for number in (start, end, step)):
        return axis, 0, -1, 1
    return (axis, *slice(start, end, step).indices(size))


def _written_parts(node: Node) -> list[Node] | None:
    """Return what a chain of ``slice_scatter`` writes, in order, where together it is the whole; None otherwise."""
    axis, found = _slice(node)[0], []
    size = shape(node)[axis]
    while node.target == aten.slice_scatter.default:
        base, part = node.args[:2]
        assert isinstance(base, Node) and isinstance(part, Node)
        of, start, end, step = _slice(node)
        if part.target == aten.copy.default:
            written, source = part.args[:2]
            assert isinstance(written, Node) and isinstance(source, Node)
            before, after = written.meta["val"], source.meta["val"]
            part = source if (before.dtype, str(before.shape)) == (after.dtype, str(after.shape)) else part
        if of != axis or step != 1:
            return None
        found.append((start, end, part))
        node = base
    found.sort(key=lambda written: written[:2])
    ends = [end for _, end, _ in found]
    return (
        [part for *_, part in found] if [start for start, *_ in found] == [0, *ends[:-1]] and ends[-1] == size else None
    )


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

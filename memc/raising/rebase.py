"""Rebase everything that was computed from the number of tokens on ``positions``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from memc.raising.build import call
from memc.raising.evaluate import UnknownValueError, ancestors, content_nodes, hints, is_symbolic, shape
from memc.raising.mixing import mixes_tokens
from memc.raising.probe import Probe

aten = torch.ops.aten

_INTEGERS = (torch.int64, torch.int32)


def rebase(probe: Probe) -> tuple[int | None, list[tuple[Node, str]]]:
    """Make the graph depend on ``positions`` alone.

    Returns the number of learned absolute positions (None when there are none) and the nodes that cannot be
    rebased, with the reason; those keep the program from running a sequence in pieces.
    """
    module, graph = probe.module, probe.module.graph
    positions = probe.node("positions")
    if positions is None:
        return None, []
    limit: int | None = None
    for node in list(graph.nodes):
        if node.op == "call_function" and not node._erased:
            limit = _rebase_node(probe, node, positions) or limit
    graph.eliminate_dead_code()
    content = content_nodes(module, [node for node, spec in probe.specs.items() if spec.role != "positions"])
    bad: list[tuple[Node, str]] = []
    for node in graph.nodes:
        if node.op != "call_function" or node not in content:
            continue
        bad += [
            (source, "computed from the number of tokens")
            for source in _static(node, content)
            if _from_length(probe, source)
        ]
        if reason := mixes_tokens(probe, node):
            bad.append((node, reason))
    return limit, bad


def _static(node: Node, content: set[Node]) -> Iterator[Node]:
    for source in node.all_input_nodes:
        if source not in content and source.op == "call_function" and isinstance(source.meta.get("val"), Tensor):
            yield source


def _rebase_node(probe: Probe, node: Node, positions: Node) -> int | None:
    """Rebase one table look-up or slice; returns the table's length when it holds positions."""
    if node.target in (aten.embedding.default, aten.index_select.default):
        table, index = node.args[0], node.args[-1 if node.target == aten.index_select.default else 1]
        assert isinstance(table, Node) and isinstance(index, Node)
        if node.target == aten.index_select.default and (node.args[1] != 0 or len(shape(table)) != 2):
            return None
        content = content_nodes(probe.module, [n for n, s in probe.specs.items() if s.role != "positions"])
        if index in content:
            return None
        offset = _position_offset(probe, index)
        if offset is None:
            return None
        _look_up(probe, node, table, positions, offset)
        return hints(table)[0] - offset
    if node.target == aten.slice.Tensor:
        return _rebase_slice(probe, node, positions)
    return None


def _rebase_slice(probe: Probe, node: Node, positions: Node) -> int | None:
    """``table[:T]`` and ``table[:, :T]`` of a parameter or buffer are look-ups at 0, 1, 2, ..."""
    source = node.args[0]
    assert isinstance(source, Node)
    axis = node.args[1] if len(node.args) > 1 else 0
    assert isinstance(axis, int)
    sizes = shape(source)
    table = source
    while table.target == aten.slice.Tensor:
        table = table.args[0]  # type: ignore[assignment]
    if table.op != "get_attr" or not probe.is_dim(shape(node)[axis], "T") or is_symbolic(sizes[axis]):
        return None
    if axis > 1 or any(size != 1 for size in sizes[:axis]) or len(sizes) - axis != 2:
        return None
    if any(user.target == aten.slice.Tensor and _cuts_at_length(probe, user) for user in node.users):
        return None  # a mask: columns are tokens too
    if not node.meta["val"].is_floating_point() or (len(node.args) > 2 and node.args[2] not in (0, None)):
        return None
    graph = probe.module.graph
    with graph.inserting_before(node):
        flat = call(graph, aten.reshape.default, table, [sizes[axis], sizes[axis + 1]], like=node) if axis else table
    _look_up(probe, node, flat, positions, 0)
    return int(sizes[axis])


def _look_up(probe: Probe, node: Node, table: Node, positions: Node, offset: int) -> None:
    """Replace ``node`` by the rows of ``table`` at ``positions + offset``; padding reads row ``offset`` harmlessly."""
    graph = probe.module.graph
    with graph.inserting_before(node):
        index = call(graph, aten.clamp_min.default, positions, 0, like=node)
        if offset:
            index = call(graph, aten.add.Tensor, index, offset, like=node)
        rows = call(graph, aten.embedding.default, table, index, like=node)
        if len(shape(node)) == 2 and not any(probe.is_dim(size, "T") for size in shape(node)):
            rows = call(graph, aten.flatten.using_ints, rows, 0, 1, like=node)  # the tokens of a batch in one row
    node.replace_all_uses_with(rows)
    graph.erase_node(node)


def _position_offset(probe: Probe, index: Node) -> int | None:
    """Return k when an integer node is 0, 1, 2, ... plus k along the tokens, at any length; None otherwise."""
    value = index.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype not in _INTEGERS:
        return None
    offset: int | None = None
    for tokens in (5, 9):
        try:
            seen = probe.run(index, {}, {"B": 2, "T": tokens})
        except (UnknownValueError, RuntimeError, IndexError):
            return None
        if seen.shape[-1] not in (tokens, 2 * tokens):
            return None
        seen = seen.reshape(-1, tokens)
        first = int(seen[0, 0])
        if not torch.equal(seen, (torch.arange(tokens) + first).expand_as(seen)) or offset not in (None, first):
            return None
        offset = first
    return offset


def _from_length(probe: Probe, node: Node) -> bool:
    """Tell whether a static node's values change with the number of tokens rather than with ``positions``."""
    if not any(probe.is_dim(size, "T") for size in shape(node)):
        return False
    reached = ancestors([node])
    return any(each.target == aten.arange.default for each in reached) or any(
        each.target == aten.slice.Tensor and _cuts_at_length(probe, each) for each in reached
    )


def _cuts_at_length(probe: Probe, node: Node) -> bool:
    source, axis = node.args[0], node.args[1] if len(node.args) > 1 else 0
    assert isinstance(source, Node) and isinstance(axis, int)
    return not is_symbolic(shape(source)[axis]) and is_symbolic(shape(node)[axis])

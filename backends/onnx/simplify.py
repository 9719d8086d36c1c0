"""Shorter forms of ATen idioms that the exporter would write as several nodes: each costs time at every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

_aten = torch.ops.aten


def softplus(x: Tensor) -> Tensor:
    """Softplus as one op; it is stable without the threshold from which ATen takes the identity."""
    return torch.onnx.ops.symbolic("Softplus", [x], dtype=torch.float32, shape=x.shape)


def append_ones(x: Tensor) -> Tensor:
    """``x [..., E]`` with a column of ones behind it."""
    pads = torch.tensor([0] * (2 * x.dim() - 1) + [1])
    shape = [*x.shape[:-1], x.shape[-1] + 1]
    return torch.onnx.ops.symbolic("Pad", [x, pads, torch.tensor(1.0)], dtype=torch.float32, shape=shape)


def simplify(graph: Graph) -> None:
    """Replace the idioms of a graph whose tensors are float32; the dead nodes are left for the caller."""
    for node in list(graph.nodes):
        found = _match(node)
        if found is None:
            continue
        form, arguments = found
        with graph.inserting_before(node):
            made = graph.call_function(form, tuple(arguments))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _match(node: Node) -> tuple[Callable[..., Any], Sequence[Node]] | None:
    match node.target, node.args:
        case _aten.softplus.default, (Node() as x,):
            return softplus, [x]
        case _aten.cat.default, ([Node() as x, Node(target=_aten.ones_like.default) as ones], dim) if dim in (
            -1,
            x.meta["val"].dim() - 1,
        ) and _is_column(ones.args[0], x):
            return append_ones, [x]
    return None


def _is_column(column: Any, x: Node) -> bool:
    """Whether ``column`` is ``x[..., :1]``."""
    match column:
        case Node(target=_aten.slice.Tensor, args=(source, dim, 0, 1)):
            return source is x and dim in (-1, x.meta["val"].dim() - 1)
    return False

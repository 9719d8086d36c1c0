"""Shorter forms of ATen idioms that the exporter would write as several nodes: each costs time at every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from memc.prepare import HALF, replace_node

_aten = torch.ops.aten


def softplus(x: Tensor) -> Tensor:
    """Softplus as one op; it is stable without the threshold from which ATen takes the identity."""
    return torch.onnx.ops.symbolic("Softplus", [x], dtype=torch.float32, shape=x.shape)


def append_ones(x: Tensor) -> Tensor:
    """``x [..., E]`` with a column of ones behind it."""
    pads = _constant([0] * (2 * x.dim() - 1) + [1])
    one = torch.onnx.ops.symbolic("Constant", [], {"value_float": 1.0}, dtype=torch.float32, shape=[])
    shape = [*x.shape[:-1], x.shape[-1] + 1]
    return torch.onnx.ops.symbolic("Pad", [x, pads, one], dtype=torch.float32, shape=shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``aten.to`` another type."""
    made: Tensor = _aten._to_copy.default(x, dtype=dtype)
    return made


def contiguous(x: Tensor) -> Tensor:
    """``aten.contiguous``, of which the file, that knows no strides, keeps nothing."""
    made: Tensor = _aten.clone.default(x, memory_format=torch.contiguous_format)
    return made


def unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """``aten.unflatten``; where every size behind the axis is constant, in one op that reads none."""
    dim %= x.dim()
    behind = x.shape[dim + 1 :]
    if not _known(behind):
        split: Tensor = x.unflatten(dim, sizes)
        return split
    return _reshape(x, [0] * dim + [*sizes, *behind], [*x.shape[:dim], *sizes, *behind])


def flatten(x: Tensor, start: int = 0, end: int = -1) -> Tensor:
    """``aten.flatten``; where every size behind the axes is constant, in one op that reads none."""
    start, end = start % x.dim(), end % x.dim()
    behind = x.shape[end + 1 :]
    if not _known(behind):
        return x.flatten(start, end)
    shape = [*x.shape[:start], math.prod(x.shape[start : end + 1]), *behind]
    return _reshape(x, [0] * start + [-1, *behind], shape)


def _known(sizes: Sequence[int | torch.SymInt]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _reshape(x: Tensor, sizes: Sequence[int], shape: Sequence[int | torch.SymInt]) -> Tensor:
    """``x`` as ``sizes``, in which 0 keeps the size of that axis and -1 takes what is left."""
    return torch.onnx.ops.symbolic("Reshape", [x, _constant(sizes)], dtype=x.dtype, shape=shape)


def _constant(values: Sequence[int]) -> Tensor:
    """Integers ``[n]``: ``torch.tensor`` would be traced as an op that changes its input."""
    return torch.onnx.ops.symbolic("Constant", [], {"value_ints": list(values)}, dtype=torch.int64, shape=[len(values)])


def simplify(graph: Graph) -> None:
    """Replace the idioms of a graph whose tensors are float32; the dead nodes are left for the caller."""
    for node in list(graph.nodes):
        if _gives_its_input(node):
            replace_node(node, node.all_input_nodes[0])
            continue
        found = _match(node)
        if found is None:
            continue
        form, arguments = found
        with graph.inserting_before(node):
            made = graph.call_function(form, tuple(arguments))
        replace_node(node, made)


def _gives_its_input(node: Node) -> bool:
    """Whether an op is a cast of a tensor to the type that it has."""
    if node.kwargs:
        return False
    match node.target, node.args:
        case _aten.type_as.default, (Node() as x, Node() as other):
            return _dtype(x) == _dtype(other)
        case _aten.to.dtype, (Node() as x, torch.dtype() as dtype):
            return _dtype(x) == dtype
    return False


def _dtype(node: Node) -> torch.dtype:
    """Return the type of a node's tensor: what was recorded, but for half precision, which is float32 by now."""
    dtype: torch.dtype = node.meta["val"].dtype
    return torch.float32 if dtype in HALF else dtype


def _match(node: Node) -> tuple[Callable[..., Any], Sequence[Any]] | None:
    if node.kwargs:
        return None
    match node.target, node.args:
        case _aten.softplus.default, (Node() as x,):
            return softplus, [x]
        case _aten.cat.default, ([Node() as x, Node(target=_aten.ones_like.default) as ones], dim) if dim in (
            -1,
            x.meta["val"].dim() - 1,
        ) and _is_column(ones.args[0], x):
            return append_ones, [x]
        case _aten.to.dtype, (Node(), torch.dtype()):
            return cast, node.args
        case _aten.contiguous.default, (Node(),):
            return contiguous, node.args
        case _aten.softmax.int, (Node() as x, int() as dim, *dtype) if dtype in ([], [None], [_dtype(x)]):
            return _aten._softmax.default, (x, dim, False)
        case _aten.unflatten.int, (Node(), int(), [*sizes]) if all(isinstance(s, int) and s > 0 for s in sizes):
            return unflatten, node.args
        case _aten.flatten.using_ints, (Node(), *axes) if axes:
            return flatten, node.args
    return None


def _is_column(column: Any, x: Node) -> bool:
    """Whether ``column`` is ``x[..., :1]``."""
    match column:
        case Node(target=_aten.slice.Tensor, args=(source, dim, 0, 1)):
            return source is x and dim in (-1, x.meta["val"].dim() - 1)
    return False

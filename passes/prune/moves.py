"""How labels on one axis of a tensor go through ops: which op keeps positions apart, and where each of them goes.

An op in none of these tables is unknown, and blocks whatever reaches it: it is never taken for element-wise.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from memc.raising.evaluate import hint, hints
from memc.raising.feed_forward import ELEMENTWISE as _ARITHMETIC

aten = torch.ops.aten

ELEMENTWISE = _ARITHMETIC | {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.lift_fresh_copy.default,
    aten.to.dtype,
    aten._to_copy.default,
}
"""Ops that give each position of their result from the same positions, broadcast, of their operands."""

SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
"""Moves whose second argument is the shape of the result."""

SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}
"""Moves with several results, which ``getitem`` takes."""

MOVES = SIZED | {
    aten.flatten.using_ints,
    aten.index.Tensor,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    operator.getitem,
}
"""Ops that give each position of their result from one position of their first operand."""


def moved_from(node: Node) -> Node | None:
    """Return the tensor that a move takes its positions from, seen through a split; None for any other op."""
    if node.target not in MOVES or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target is operator.getitem:
        first = source.args[0] if source.target in SPLITS else None
        return first if isinstance(first, Node) else None
    return source


def cuts_apart(node: Node, axis: int) -> bool:
    """Tell whether a move picks single positions on an axis of its source, which pruning would make others."""
    rank = len(hints(node.all_input_nodes[0]))
    args: tuple[Any, ...] = node.args
    match node.target:
        case aten.select.int:
            return bool(args[1] % rank == axis)
        case aten.index.Tensor:
            several = len([index for index in args[1] if index is not None]) > 1
            return several or (axis < len(args[1]) and args[1][axis] is not None)
        case aten.slice.Tensor:
            step = args[4] if len(args) > 4 else 1
            return bool((args[1] if len(args) > 1 else 0) % rank == axis and step != 1)
        case _:
            return False


def source_positions(node: Node, source: Node) -> Tensor:
    """Return, for each position of a move's result at the example sizes, the flat position in its source."""
    shape = hints(source)
    codes = torch.arange(torch.Size(shape).numel()).reshape(shape)
    if node.target is operator.getitem:
        split, index = node.args[0], node.args[1]
        assert isinstance(split, Node)
        pieces = _call(split, source, codes)
        assert isinstance(index, int)
        result: Tensor = pieces[index]
        return result
    if node.target == aten.index.Tensor:
        # Which entries an index takes does not matter along the other axes.
        indices: Any = node.args[1]
        taken = [None if index is None else torch.zeros(hints(index), dtype=torch.int64) for index in indices]
        return aten.index.Tensor(codes, taken)  # type: ignore[no-any-return]
    taken_from: Tensor = _call(node, source, codes)
    return taken_from


def _call(node: Node, source: Node, codes: Tensor) -> Any:
    target: Any = node.target

    def value(argument: Node) -> Any:
        return codes if argument is source else hint(argument.meta["val"])

    return target(*map_arg(node.args, value), **map_arg(dict(node.kwargs), value))


def forward(node: Node, source: Node, axis: int, labels: Tensor) -> tuple[int, Tensor] | None:
    """Carry the labels of an axis of a move's source over to its result; None where no one axis has them."""
    along = _coordinate(source_positions(node, source), hints(source), axis)
    return _one_axis(labels[along])


def backward(node: Node, source: Node, axis: int, labels: Tensor) -> tuple[int, Tensor] | None:
    """Carry the labels of an axis of a move's result back to its source; positions not taken get -1."""
    positions = source_positions(node, source)
    shape = [1] * positions.ndim
    shape[axis] = -1
    spread = labels.reshape(shape).expand(positions.shape).reshape(-1)
    sizes = hints(source)
    for candidate in range(len(sizes)):
        along = _coordinate(positions, sizes, candidate).reshape(-1)
        low, high = _extremes(along, spread, sizes[candidate])
        if torch.equal(low, high):
            return candidate, low
    return None


def _coordinate(positions: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    inner = torch.Size(shape[axis + 1 :]).numel()
    return positions // inner % shape[axis]


def _one_axis(labels: Tensor) -> tuple[int, Tensor] | None:
    """Find the axis that labels of a whole tensor depend on, if it is one alone."""
    for axis, size in enumerate(labels.shape):
        flat = labels.movedim(axis, 0).reshape(size, -1)
        if torch.equal(flat, flat[:, :1].expand_as(flat)):
            return axis, flat[:, 0]
    return None


def _extremes(index: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest label at each index, -1 where there is none."""
    none = torch.full((size,), -1, dtype=labels.dtype)
    low = none.scatter_reduce(0, index, labels, "amin", include_self=False)
    return low, none.scatter_reduce(0, index, labels, "amax", include_self=False)

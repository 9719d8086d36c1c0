"""Converters of ATen ops that the importer gets wrong, whatever they are compiled for."""

from __future__ import annotations

from torch.fx import Node
from tvm import relax
from tvm.ir import is_prim_expr

from memc.backends.tvm.emit import Converter, Importer, Var, reshape, size


def _amax(node: Node, importer: Importer) -> Var:
    """Convert ``aten.amax``, which ``logsumexp`` is taken apart into; over all axes where none is named."""
    given = [*importer.retrieve_args(node), *node.kwargs.values()]
    x, axes, keep = given + [[], False][len(given) - 1 :]
    return importer.block_builder.emit(relax.op.max(x, list(axes) or None, keep))


def _clamp(node: Node, importer: Importer) -> Var:
    """Convert ``aten.clamp`` with the bounds that are there."""
    x, *values = importer.retrieve_args(node)
    name = str(node.target).split(".")[1]
    given = dict(zip({"clamp_min": ["min"], "clamp_max": ["max"]}.get(name, ["min", "max"]), values, strict=False))
    bounds = {**given, **node.kwargs}
    for bound, form in (("min", relax.op.maximum), ("max", relax.op.minimum)):
        if bounds.get(bound) is not None:
            x = importer.block_builder.emit(form(x, relax.const(bounds[bound], x.ty.dtype)))
    return x


def _index_select(node: Node, importer: Importer) -> Var:
    x, axis, index = importer.retrieve_args(node)
    return importer.block_builder.emit(relax.op.take(x, index, axis, mode="clip"))


def _select(node: Node, importer: Importer) -> Var:
    x, axis, index = importer.retrieve_args(node)
    axis %= x.ty.ndim
    start = index if index >= 0 else size(x, axis) + index
    one = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [start], [start + 1]))
    return importer.block_builder.emit(relax.op.squeeze(one, [axis]))


def _slice(node: Node, importer: Importer) -> Var:
    given = list(importer.retrieve_args(node))
    x, axis, start, end, step = given + [0, None, None, 1][len(given) - 1 :]
    if is_prim_expr(end) and isinstance(size(x, axis), int) and (start or 0, step) == (0, 1):
        first = importer.block_builder.emit(relax.op.arange(0, end, 1, "int64"))
        return importer.block_builder.emit(relax.op.take(x, first, axis % x.ty.ndim, mode="clip"))
    return importer._slice(node)


def _power(node: Node, importer: Importer) -> Var:
    """Convert ``aten.pow`` by a small whole number into products, which are exact for what is negative too."""
    x, exponent = importer.retrieve_args(node)
    if exponent not in range(1, 9):
        return importer.block_builder.emit(relax.op.power(x, relax.const(exponent, x.ty.dtype)))
    power = x
    for _ in range(int(exponent) - 1):
        power = importer.block_builder.emit(relax.op.multiply(power, x))
    return power


def _view(node: Node, importer: Importer) -> Var:
    x, sizes = importer.retrieve_args(node)
    return reshape(importer, x, sizes)


ATEN: dict[str, Converter] = {
    "amax.default": _amax,
    **dict.fromkeys(("clamp.default", "clamp_min.default", "clamp_max.default"), _clamp),
    "_unsafe_view.default": _view,
    "index_select.default": _index_select,
    "select.int": _select,
    "slice.Tensor": _slice,
    "pow.Tensor_Scalar": _power,
}
"""The importer has no largest value along axes, bounds whole numbers by infinity, which they do not have, knows a view
by one name alone, lets an index out of range, and one that counts from the end, read other memory, and loses the size
of a table's first rows where their number is not fixed."""

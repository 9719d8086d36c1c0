"""Raise root-mean-square and layer norms, fused or written out."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from memc.raising.build import call
from memc.raising.evaluate import hints, shape

aten = torch.ops.aten

_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.other,
}


def raise_norms(module: GraphModule, content: set[Node]) -> int:
    """Replace every norm by ``memc::norm``; returns how many there were."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node not in content:
            continue
        if node.target in (aten.layer_norm.default, aten.rms_norm.default):
            count += _raise_fused(module, node)
        elif node.target in (aten.rsqrt.default, aten.pow.Tensor_Scalar, aten.sqrt.default):
            count += _raise_written_out(module, node, content)
    module.graph.eliminate_dead_code()
    return count


def _raise_fused(module: GraphModule, node: Node) -> bool:
    arguments = list(node.args) + [None] * 5
    x, sizes = arguments[0], arguments[1]
    assert isinstance(x, Node) and isinstance(sizes, list | tuple)
    if len(sizes) != 1:
        return False
    center = node.target == aten.layer_norm.default
    weight = node.kwargs.get("weight", arguments[2])
    bias = node.kwargs.get("bias", arguments[3] if center else None)
    eps = node.kwargs.get("eps", arguments[4 if center else 3])
    if eps is None:
        eps = 1e-5 if center else torch.finfo(x.meta["val"].dtype).eps
    _replace(module, node, x, weight, bias, float(eps), center)  # type: ignore[arg-type]
    return True


def _replace(
    module: GraphModule, old: Node, x: Node, weight: Node | None, bias: Node | None, eps: float, center: bool
) -> None:
    graph = module.graph
    with graph.inserting_before(old):
        new = call(graph, torch.ops.memc.norm.default, x, weight, bias, eps=eps, center=center, like=old)
        if new.meta["val"].dtype != old.meta["val"].dtype:
            new = call(graph, aten.to.dtype, new, old.meta["val"].dtype, like=old)
    old.replace_all_uses_with(new)


def _uncast(node: Node) -> Node:
    while node.target in _CASTS:
        node = node.all_input_nodes[0]
    return node


def _inverse_root(node: Node) -> tuple[Node, Node] | None:
    """Split 1 / sqrt(v): returns the node that is the inverse root, or the root to divide by, and v."""
    if node.target == aten.rsqrt.default or (node.target == aten.pow.Tensor_Scalar and node.args[1] == -0.5):
        return node, node.all_input_nodes[0]
    if node.target == aten.sqrt.default or (node.target == aten.pow.Tensor_Scalar and node.args[1] == 0.5):
        return node, node.all_input_nodes[0]
    return None


def _square_of(node: Node) -> Node | None:
    node = _uncast(node)
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        return node.all_input_nodes[0]
    if node.target == aten.mul.Tensor and node.args[0] is node.args[1]:
        return node.all_input_nodes[0]
    return None


def _last_axis_mean(node: Node) -> Node | None:
    if node.target != aten.mean.dim:
        return None
    source, dims = node.args[0], node.args[1]
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    assert isinstance(source, Node) and isinstance(dims, list | tuple)
    rank = len(shape(source))
    return source if keep and [int(dim) % rank for dim in dims] == [rank - 1] else None  # type: ignore[arg-type]


def _raise_written_out(module: GraphModule, root: Node, content: set[Node]) -> bool:
    found = _inverse_root(root)
    if found is None:
        return False
    inverse, variance = found
    if variance.target != aten.add.Tensor or not isinstance(variance.args[1], float | int):
        return False
    eps = float(variance.args[1])
    mean = _uncast(variance.args[0])  # type: ignore[arg-type]
    squared = _last_axis_mean(mean)
    x = _square_of(squared) if squared is not None else None
    if x is None:
        return False
    scaled = _times(inverse, x)
    if scaled is None:
        return False
    center, source = _centered(x)
    end, weight, bias = _affine(scaled, content, hints(x)[-1])
    _replace(module, end, _uncast(source), weight, bias, eps, center)
    return True


def _times(inverse: Node, x: Node) -> Node | None:
    """Return ``x * inverse`` (or ``x / root``), the only thing the inverse root may be used for."""
    divides = inverse.target == aten.sqrt.default or inverse.args[1:2] == (0.5,)
    if len(inverse.users) != 1:
        return None
    user = next(iter(inverse.users))
    if divides:
        return user if user.target == aten.div.Tensor and user.args == (x, inverse) else None
    if user.target == aten.mul.Tensor and {user.args[0], user.args[1]} == {x, inverse}:
        return user
    return None


def _centered(x: Node) -> tuple[bool, Node]:
    node = _uncast(x)
    if node.target == aten.sub.Tensor and isinstance(node.args[1], Node):
        mean = _last_axis_mean(_uncast(node.args[1]))
        if mean is not None and mean is node.args[0]:
            return True, mean
    return False, x


def _affine(scaled: Node, content: set[Node], width: int) -> tuple[Node, Node | None, Node | None]:
    """Follow casts, one static weight and one static bias behind the scaled value."""
    end, weight, bias = scaled, None, None
    while len(end.users) == 1:
        user = next(iter(end.users))
        if user.target in _CASTS:
            # A cast behind the last factor belongs to the caller; one before it, to the norm.
            after = next(iter(user.users)) if len(user.users) == 1 else None
            if after is None or _static_operand(after, user, content, width) is None:
                return end, weight, bias
            end = user
            continue
        operand = _static_operand(user, end, content, width)
        if operand is None:
            break
        if user.target == aten.mul.Tensor and weight is None and bias is None:
            weight = operand
        elif user.target == aten.add.Tensor and bias is None:
            bias = operand
        else:
            break
        end = user
    return end, weight, bias


def _static_operand(user: Node, node: Node, content: set[Node], width: int) -> Node | None:
    if user.target not in (aten.mul.Tensor, aten.add.Tensor):
        return None
    others = [argument for argument in user.args[:2] if argument is not node]
    if len(others) != 1 or not isinstance(others[0], Node) or others[0] in content:
        return None
    return others[0] if hints(others[0]) == (width,) else None

"""Find attention in a raw graph: scaled_dot_product_attention, and softmax between two matrix products."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from memc.raising.build import call
from memc.raising.evaluate import UnknownValueError, evaluate, hints, shape

aten = torch.ops.aten

BLOCKED = -1e9
"""Additive values at or below this are masked; -inf, the smallest float32 and the smallest float16 pad are."""

SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default}
_PRODUCT = {aten.matmul.default, aten.bmm.default}
_PASS_THROUGH = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.native_dropout.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.slice.Tensor,
}
_SCALINGS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
_MASKING = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther}
_FLOORS = {aten.max.other, aten.maximum.default, aten.clamp_min.default}


@dataclass(frozen=True)
class MismatchError(Exception):
    """A candidate is not the idiom after all: what differs, and at which node."""

    nearest: str
    reason: str
    node: Node

    def __str__(self) -> str:
        """Say what differs."""
        return self.reason


@dataclass(frozen=True)
class Addend:
    """What is added to the scores: a node, and the factor that scales the sum afterwards."""

    node: Node
    factor: float


@dataclass
class Site:
    """One attention of the raw graph, taken apart.

    ``output`` is the node to replace. ``query``, ``key``, ``value`` are 4-D, or 3-D with batch and heads merged.
    ``key_transposed`` tells that the key node is ``[..., D, S]``. ``logits`` is what softmax takes (None
    for scaled_dot_product_attention); between the raw product and it ``addends`` are added in order and
    ``maskings`` blank entries. ``mask`` is the mask argument of scaled_dot_product_attention. ``folded`` are the query
    or key that a factor was taken out of further up in the graph, with the factor.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    scale: float = 1.0
    key_transposed: bool = False
    softcap: float = 0.0
    is_causal: bool = False
    logits: Node | None = None
    mask: Node | None = None
    addends: list[Addend] = field(default_factory=list)
    maskings: list[Node] = field(default_factory=list)
    sink_logits: Node | None = None
    folded: list[tuple[Node, float]] = field(default_factory=list)


def find_sites(module: GraphModule, content: set[Node], of_tokens: set[Node]) -> Iterator[Site | MismatchError]:
    """Yield every attention in graph order; what begins like one and differs is yielded as a :class:`MismatchError`.

    ``content`` depends on any input but positions, ``of_tokens`` on the tokens: a mask may be an input of its own.
    """
    for node in module.graph.nodes:
        try:
            if node.target == SDPA:
                yield _from_sdpa(node, of_tokens)
            elif node.target in _SOFTMAX and node in content and _feeds_product(node) is not None:
                yield _from_softmax(node, content)
        except MismatchError as mismatch:
            yield mismatch


def _from_sdpa(node: Node, of_tokens: set[Node]) -> Site:
    bound = _bind(node)
    query, key, value = bound["query"], bound["key"], bound["value"]
    if bound.get("dropout_p"):
        raise MismatchError("sdpa", "dropout is on: put the model in eval mode", node)
    if bound.get("attn_mask") in of_tokens:
        raise MismatchError("sdpa", "the mask depends on the tokens", node)
    scale = bound.get("scale")
    if scale is None:
        scale = hints(query)[-1] ** -0.5
    return fold_scale(
        Site(
            output=node,
            query=query,
            key=key,
            value=value,
            scale=float(scale),
            is_causal=bool(bound.get("is_causal")),
            mask=bound.get("attn_mask"),
        )
    )


def _bind(node: Node) -> dict[str, Any]:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _feeds_product(softmax: Node) -> Node | None:
    """Return the product with the values that the probabilities go to, or None."""
    stack = list(softmax.users)
    while stack:
        user = stack.pop()
        if user.target in _PRODUCT or user.target == aten.einsum.default:
            return user
        if user.target in _PASS_THROUGH | _VIEWS | {operator.getitem}:
            stack += list(user.users)
    return None


def _from_softmax(softmax: Node, content: set[Node]) -> Site:
    dim = softmax.args[1]
    rank = len(shape(softmax))
    if dim not in (-1, rank - 1):
        raise MismatchError("softmax attention", f"softmax over axis {dim}, not over the keys", softmax)
    product = _feeds_product(softmax)
    assert product is not None
    if product.target not in _PRODUCT:
        raise MismatchError("softmax attention", "probabilities meet the values in an einsum", product)
    probabilities, value = product.args[0], product.args[1]
    assert isinstance(probabilities, Node) and isinstance(value, Node)
    if not _comes_from(probabilities, softmax):
        raise MismatchError("softmax attention", "the values come first in the product with the probabilities", product)
    logits, sinks = _without_sinks(softmax, content)
    site = Site(output=product, query=product, key=product, value=value, logits=logits, sink_logits=sinks)
    _walk_scores(site, logits, content)
    return fold_scale(site)


def _comes_from(node: Node, origin: Node) -> bool:
    while node is not origin:
        if node.target not in _PASS_THROUGH | _VIEWS | {operator.getitem}:
            return False
        node = node.all_input_nodes[0]
    return True


def _without_sinks(softmax: Node, content: set[Node]) -> tuple[Node, Node | None]:
    """See through learned sink logits: a column joined to the scores before softmax (and cut off after it).

    Returns the scores and the ``[heads]`` sink logits, None where there are none.
    """
    logits = softmax.all_input_nodes[0]
    node = _uncast(logits)
    if node.target == aten.sub.Tensor and _is_maximum(node.args[1], node.args[0]):
        node = _uncast(node.args[0])  # softmax(x - max(x)) is softmax(x)
    if node.target != aten.cat.default:
        return logits, None
    parts = node.args[0]
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or parts[1] in content or parts[0] not in content:
        raise MismatchError("softmax attention", "scores are joined with something else before softmax", node)
    scores, sinks = parts
    assert isinstance(scores, Node) and isinstance(sinks, Node)
    while len(shape(sinks)) > 1 and sinks.target in _VIEWS | _PASS_THROUGH:
        sinks = sinks.all_input_nodes[0]
    if len(shape(sinks)) != 1:
        raise MismatchError("softmax attention", "the column joined to the scores is not one number per head", node)
    return scores, sinks


def _uncast(node: Any) -> Node:
    while node.target in _PASS_THROUGH:
        node = node.all_input_nodes[0]
    assert isinstance(node, Node)
    return node


def _is_maximum(node: Any, of: Any) -> bool:
    """Tell whether a node is the maximum of another along some axis."""
    if not isinstance(node, Node):
        return False
    if node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node.target in (aten.max.dim, aten.amax.default) and node.all_input_nodes[0] is of


def _walk_scores(site: Site, logits: Node, content: set[Node]) -> None:
    """Go back from what softmax takes to the product of queries and keys, noting what happens in between."""
    node = logits
    while node.target not in _PRODUCT:
        if node.target == aten.baddbmm.default:
            # beta * bias + alpha * (query @ key): the bias is an addend like any other.
            bias, left, right = node.args[:3]
            if node.kwargs.get("beta", 1) not in (0, 1):
                raise MismatchError("softmax attention", "a scaled bias inside baddbmm", node)
            if node.kwargs.get("beta", 1):
                site.addends.append(Addend(bias, site.scale))  # type: ignore[arg-type]
            site.scale *= float(node.kwargs.get("alpha", 1.0))  # type: ignore[arg-type]
            site.query, site.key, site.key_transposed = left, right, True  # type: ignore[assignment]
            return
        if node.target in _PASS_THROUGH | _VIEWS:
            node = node.all_input_nodes[0]
        elif node.target == aten.add.Tensor:
            if site.softcap:
                raise MismatchError("softmax attention", "a bias is added before the soft-cap", node)
            node, addend = _content_side(node, content)
            site.addends += [Addend(addend, site.scale)] if addend is not None else []
        elif node.target in _FLOORS:
            node = _above_floor(node)
        elif node.target in _MASKING:
            site.maskings.append(node)
            node = _masked_operand(node, content)
        elif node.target in _SCALINGS:
            node = _scaling_or_cap(site, node, content)
        else:
            raise MismatchError("softmax attention", f"{_name(node)} between the scores and softmax", node)
    site.query, site.key, site.key_transposed = node.args[0], node.args[1], True  # type: ignore[assignment]


def _scaling_or_cap(site: Site, node: Node, content: set[Node]) -> Node:
    """Note ``x * c``, or ``tanh(x / c) * c``, and return x."""
    operand, factor = _scalar_factor(node, content)
    tanh = _uncast(operand)
    if tanh.target != aten.tanh.default:
        site.scale *= factor
        return operand
    inner, inner_factor = _scalar_factor(tanh.all_input_nodes[0], content)
    if site.softcap or site.scale != 1.0 or abs(inner_factor * factor - 1.0) > 1e-4:
        raise MismatchError("softmax attention", "soft-cap divides and multiplies by different numbers", node)
    site.softcap = factor
    return inner


def _name(node: Node) -> str:
    return str(node.target).removesuffix(".default")


def _content_side(node: Node, content: set[Node]) -> tuple[Node, Node | None]:
    first: Any = node.args[0]
    second: Any = node.args[1]
    if isinstance(first, Node) and first in content:
        if isinstance(second, Node) and second in content:
            raise MismatchError("softmax attention", "a bias that depends on the tokens is added to the scores", node)
        return first, second if isinstance(second, Node) else None
    assert isinstance(second, Node)
    return second, first if isinstance(first, Node) else None


def _above_floor(node: Node) -> Node:
    """Return what is kept from going under a number that no score reaches, so that masked scores stay finite."""
    floor = node.args[1] if isinstance(node.args[1], int | float) else _constant(node.args[1])
    if floor is None or floor > BLOCKED:
        raise MismatchError("softmax attention", f"{_name(node)} between the scores and softmax", node)
    return node.all_input_nodes[0]


def _masked_operand(node: Node, content: set[Node]) -> Node:
    inside = [source for source in node.all_input_nodes if source in content]
    if len(inside) != 1:
        raise MismatchError("softmax attention", "the mask depends on the tokens", node)
    return inside[0]


def _scalar_factor(node: Node, content: set[Node]) -> tuple[Node, float]:
    """Split ``x * c`` or ``x / c`` into x and the factor.

    Raises :class:`MismatchError` when the other operand is no number.
    """
    if node.target not in _SCALINGS:
        raise MismatchError("softmax attention", f"{_name(node)} where a scaling is expected", node)
    first, second = node.args[0], node.args[1]
    if not isinstance(first, Node):
        first, second = second, first
    if isinstance(second, Node):
        if first not in content and second in content:
            first, second = second, first
        constant = _constant(second)
        if constant is None:
            raise MismatchError("softmax attention", "scores are scaled by a tensor", node)
        second = constant
    assert isinstance(first, Node) and isinstance(second, int | float)
    return first, float(1.0 / second if node.target in (aten.div.Tensor, aten.div.Scalar) else second)


def _constant(node: Any) -> float | None:
    """Return the number behind a scalar tensor made in the graph (``full``, ``scalar_tensor``, a 0-d constant)."""
    if not isinstance(node, Node) or shape(node) not in ((), (1,)):
        return None
    module = node.graph.owning_module
    try:
        assert module is not None
        return float(evaluate(module, [node], {})[0])
    except (UnknownValueError, ValueError, RuntimeError):
        return None


def fold_scale(site: Site) -> Site:
    """Move number factors of query and key into the scale, also from before their heads were split."""
    for name in ("query", "key"):
        node: Node = getattr(site, name)
        trail, shared, taken = node, False, 1.0
        while trail.op == "call_function" and trail.all_input_nodes:
            if trail.target in _SCALINGS:
                source, factor = trail.args[0], _number(trail)
                if factor is None or not isinstance(source, Node) or (shared and trail is not node):
                    break
                site.scale *= factor
                if trail is node:
                    node = source
                else:
                    trail.replace_all_uses_with(source)
                    taken *= factor
                trail = source
                continue
            if trail.target not in _PASS_THROUGH | _VIEWS | {aten.transpose.int, aten.permute.default}:
                break
            # A factor that somebody else reads too must stay where it is.
            trail = trail.all_input_nodes[0]
            shared |= len(trail.users) > 1
        setattr(site, name, node)
        site.folded += [(node, taken)] if taken != 1.0 else []
    return site


def unfold_scale(site: Site) -> None:
    """Put back the factors that were taken out of the graph, of which the site alone reads what they multiply."""
    for node, factor in site.folded:
        readers = list(node.users)
        with node.graph.inserting_after(node):
            scaled = call(node.graph, aten.mul.Tensor, node, factor, like=node)
        for reader in readers:
            reader.replace_input_with(node, scaled)


def _number(node: Node) -> float | None:
    """Return the factor of ``x * c`` or ``x / c`` when c is a number; None otherwise."""
    second = node.args[1]
    factor = float(second) if isinstance(second, int | float) else _constant(second)
    if factor is None or node.target not in (aten.div.Tensor, aten.div.Scalar):
        return factor
    return 1.0 / factor

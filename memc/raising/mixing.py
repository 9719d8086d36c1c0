"""Which raw ops make one token's result depend on another token: what no attention explains keeps a model whole.

A token's axis is one whose size has the number of tokens in it and not that of sequences: of what lies flat, all tokens
of a batch in one row as mixtures of experts have them, nothing is said. What an op that is not known does is tried out,
and where it cannot be tried it is not guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from memc.raising.evaluate import shape
from memc.raising.probe import Probe

aten = torch.ops.aten

_NEW_AXES = {"unsqueeze", "stack", "flatten", "unflatten", "squeeze", "slice"}
"""Ops whose ``dim`` is no axis that they go along; a slice that is not the whole shows in its size."""

_KEEPS = _NEW_AXES | {
    "alias", "clone", "contiguous", "detach", "dropout", "native_dropout", "lift_fresh", "lift_fresh_copy", "to",
    "_to_copy", "type_as", "view", "reshape", "_unsafe_view", "view_as", "reshape_as", "expand", "expand_as",
    "broadcast_to", "ravel", "transpose", "permute", "t", "mT", "mH", "numpy_T", "movedim", "swapaxes", "swapdims",
    "repeat", "linear", "embedding", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "layer_norm",
    "native_layer_norm", "rms_norm", "batch_norm", "one_hot", "index", "index_put", "view_as_real", "view_as_complex",
    "real", "imag", "complex", "copy", "fill", "pad", "constant_pad_nd",
}  # fmt: skip
"""Ops without an axis of their own, beside those on each element, that keep tokens apart but for what is looked at."""

_PRODUCTS = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Where the first factor stands whose last axis is summed over."""

_AXES = ("dim", "dims", "dimension", "axis")


def mixes_tokens(probe: Probe, node: Node) -> str | None:
    """Say why a raw op makes one token's result depend on another token; None when it does not."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    inputs = [source for source in node.all_input_nodes if _axes(probe, shape(source))]
    made = [tuple(value.shape) for value in _tensors(node.meta.get("val"))]
    if not inputs or not made:
        return None
    name = node.target._schema.name.removeprefix("aten::")
    if not any(_depends(probe, size, "T") for sizes in made for size in sizes):
        return f"{name} over the tokens"
    if any(_is_cut(probe, sizes) for sizes in made) and not any(_is_cut(probe, shape(source)) for source in inputs):
        return f"{name} joins tokens with others, or leaves some out"
    most = max(len(_axes(probe, shape(source))) for source in inputs)
    if most < 2 <= max(len(_axes(probe, sizes)) for sizes in made):
        return f"{name} compares tokens with one another"
    if torch.Tag.pointwise in node.target.tags:
        return None
    return _along(probe, node, name, _bound(node))


def _along(probe: Probe, node: Node, name: str, bound: dict[str, Any]) -> str | None:
    """Look at the axes that an op goes along."""
    if name in _PRODUCTS:
        left = node.args[_PRODUCTS[name]]
        assert isinstance(left, Node)
        return f"{name} sums over tokens" if len(shape(left)) - 1 in _axes(probe, shape(left)) else None
    if name == "einsum":
        inputs, _, output = bound["equation"].replace(" ", "").partition("->")
        pairs = zip(inputs.split(","), bound["tensors"], strict=True)
        summed = any(letters[axis] not in output for letters, x in pairs for axis in _axes(probe, shape(x)))
        return "einsum sums over tokens" if summed or "." in inputs else None
    first = node.all_input_nodes[0]
    tokens, rank = _axes(probe, shape(first)), len(shape(first))
    if name in ("index", "index_put"):
        taken = {axis for axis, index in enumerate(bound["indices"]) if index is not None}
        return f"{name} picks tokens" if taken & tokens else None
    if name in ("pad", "constant_pad_nd"):
        amounts = bound["pad"]
        moved = {rank - 1 - index // 2 for index, amount in enumerate(amounts) if amount != 0}
        return f"{name} moves tokens" if moved & tokens else None
    named = [bound[key] for key in _AXES if key in bound]
    if named and name not in _NEW_AXES | _KEEPS:
        given = named[0]
        axes = range(rank) if given is None or given == [] else given if isinstance(given, list | tuple) else [given]
        along = {int(axis) % rank for axis in axes} & tokens
        return f"{name} over the tokens" if along else None
    return None if name in _KEEPS or _keeps_apart(probe, node) else f"{name} is not known to keep tokens apart"


def _keeps_apart(probe: Probe, node: Node) -> bool:
    """Tell by running it whether an op gives every token the same whatever another one of its inputs is."""
    sizes, changed = {"B": 2, "T": 5, "U": 4}, 2
    generator = torch.Generator().manual_seed(0)

    def example(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return probe.size_at(value, sizes)
        shape = [probe.size_at(size, sizes) for size in value.shape]
        return torch.randn(shape, generator=generator).to(value.dtype)

    def without(source: Node, value: Any) -> Any:
        for axis in _axes(probe, shape(source)):
            value = value.index_fill(axis, torch.tensor([changed]), 3)
        return value

    given = {source: example(source.meta["val"]) for source in node.all_input_nodes}
    other = {source: without(source, value) for source, value in given.items()}
    try:
        before, after = (_tensors(_run(node, values)) for values in (given, other))
        pairs = list(zip(before, after, _tensors(node.meta["val"]), strict=True))
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False
    left = torch.tensor([token for token in range(sizes["T"]) if token != changed])
    return all(
        torch.equal(*(x.index_select(axis, left) for x in (first, second)))
        for first, second, value in pairs
        for axis in _axes(probe, tuple(value.shape))
        if first.shape[axis] == sizes["T"]
    )


def _run(node: Node, values: Mapping[Node, Any]) -> Any:
    target: Any = node.target
    with torch.no_grad():
        return target(*map_arg(node.args, values.__getitem__), **map_arg(dict(node.kwargs), values.__getitem__))


def _bound(node: Node) -> dict[str, Any]:
    """Return the arguments of an op by name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}
    given = zip((argument.name for argument in arguments), node.args, strict=False)
    return {**defaults, **dict(given), **node.kwargs}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        yield from (item for item in value if isinstance(item, Tensor))


def _depends(probe: Probe, size: Any, dim: str) -> bool:
    """Tell whether a size has a named symbol in it."""
    symbol = probe.symbol(dim)
    return not isinstance(size, int) and symbol is not None and symbol in size.node.expr.free_symbols


def _axes(probe: Probe, sizes: tuple[Any, ...]) -> set[int]:
    """Return the axes of tokens."""
    return {i for i, size in enumerate(sizes) if _depends(probe, size, "T") and not _depends(probe, size, "B")}


def _is_cut(probe: Probe, sizes: tuple[Any, ...]) -> bool:
    """Tell whether any size is that of more or fewer tokens than there are: no product of numbers and symbols."""
    expressions = [sizes[axis].node.expr for axis in _axes(probe, sizes)]
    return any(not all(part.is_Symbol or part.is_Number for part in each.as_ordered_factors()) for each in expressions)

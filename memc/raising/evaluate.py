"""Evaluate parts of a graph on concrete values: what a subgraph means is settled by what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from memc.prepare import HALF
from memc.program import get_tensor

aten = torch.ops.aten


class UnknownValueError(Exception):
    """A subgraph depends on a value that nobody fed, such as a parameter without its weights."""


# Ops that look at the shape or type of their first argument, not at its values.
_SHAPE_ONLY = {
    aten.sym_size.int,
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
}


def value_inputs(node: Node) -> list[Node]:
    """Return the nodes whose values (not only shapes) this node reads."""
    if node.target in _SHAPE_ONLY:
        return []
    return node.all_input_nodes


def content_nodes(module: GraphModule, roots: Iterable[Node]) -> set[Node]:
    """Return every node whose value depends on the values of ``roots``."""
    found = set(roots)
    for node in module.graph.nodes:
        if node.op == "call_function" and any(source in found for source in value_inputs(node)):
            found.add(node)
    return found


def ancestors(targets: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
    """Return the targets and everything they depend on, not looking behind ``stop``."""
    seen = set(stop)
    found: set[Node] = set()
    stack = [node for node in targets if node not in seen]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack += [source for source in node.all_input_nodes if source not in found and source not in seen]
    return found


def evaluate(
    module: GraphModule,
    targets: Iterable[Node],
    feeds: Mapping[Node, Any],
    replace: Mapping[Any, Any] | None = None,
) -> list[Any]:
    """Compute the values of ``targets`` given the values of ``feeds``, in float32 where the graph has half precision.

    What a subgraph means does not depend on how it rounds, and half precision rounds by more than probes tell apart.
    ``replace`` maps integer constants to others, wherever they stand as a positional argument.
    Raises :class:`UnknownValueError` when a value is needed that is neither fed nor held by the module.
    """
    wanted = list(targets)
    needed = ancestors(wanted, feeds)
    values: dict[Node, Any] = dict(feeds)

    def constant(item: Any) -> Any:
        if replace and isinstance(item, int) and not isinstance(item, bool) and item in replace:
            return replace[item]
        return torch.float32 if item in HALF else item

    with torch.no_grad():
        for node in module.graph.nodes:
            if node not in needed or node in values:
                continue
            if node.op == "get_attr":
                tensor = get_tensor(module, str(node.target))
                if isinstance(tensor, FakeTensor) or tensor.is_meta:
                    raise UnknownValueError(str(node.target))
                values[node] = tensor.detach().float() if tensor.dtype in HALF else tensor.detach()
            elif node.op == "call_function":
                args = map_arg(torch.fx.node.map_aggregate(node.args, constant), values.__getitem__)
                kwargs = {name: torch.float32 if item in HALF else item for name, item in node.kwargs.items()}
                values[node] = node.target(*args, **map_arg(kwargs, values.__getitem__))
            else:
                raise UnknownValueError(node.name)
    return [values[node] for node in wanted]


def shape(node: Node) -> tuple[Any, ...]:
    """Return the recorded shape of a node's value; sizes may be symbolic."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def hint(size: Any) -> int:
    """Return a size, or the example value of a symbolic one."""
    if isinstance(size, int):
        return size
    return int(size.node.hint)


def hints(node: Node) -> tuple[int, ...]:
    """Return a node's shape at the example sizes."""
    return tuple(hint(size) for size in shape(node))


def is_symbolic(size: Any) -> bool:
    """Tell whether a size stands for a symbol rather than a number."""
    return not isinstance(size, int)

"""Turn in-place ops into their functional forms, so that a node's value never changes after it was made."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from memc.errors import MemcError


class InPlaceError(MemcError):
    """An in-place op without a functional form where it stands alone."""


def functionalize(module: GraphModule, where: str) -> None:
    """Replace ``op_`` by ``op`` where what it writes is a fresh value that no earlier view shows to a later reader.

    Raises ``InPlaceError`` E305 that names the line of any other in-place op.
    """
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    roots: dict[Node, Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable:
                node = _replace(module, node, roots, order, where)
            elif _returns_alias(node.target):
                source = node.args[0] if isinstance(node.args[0], Node) else node
                roots[node] = roots.get(source, source)
                continue
        roots[node] = node


def _replace(module: GraphModule, node: Node, roots: dict[Node, Node], order: dict[Node, int], where: str) -> Node:
    written, place = node.args[0], node.meta["memc"]["source"] or where
    schema = node.target._schema  # type: ignore[union-attr]
    name = schema.name.removeprefix("aten::").removesuffix("_")
    packet = getattr(torch.ops.aten, name, None) if schema.name.startswith("aten::") else None
    overload = getattr(packet, schema.overload_name or "default", None)
    hint = f"write it without {schema.name}"
    if overload is None or not isinstance(written, Node):
        raise InPlaceError("E305", f"in-place op {schema.name} has no functional form", place, hint)
    if roots.get(written) is not written or written.op != "call_function":
        raise InPlaceError(
            "E305", f"in-place op {schema.name} writes into a view, an input or a parameter", place, hint
        )
    for other, root in roots.items():
        if root is written and other is not written and any(order[user] > order[node] for user in other.users):
            raise InPlaceError("E305", f"in-place op {schema.name} changes a value that is read later", place, hint)
    with module.graph.inserting_before(node):
        made = module.graph.call_function(overload, node.args, node.kwargs)
    made.meta = dict(node.meta)
    order[made] = order[node]
    node.replace_all_uses_with(made)
    written.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and order[user] > order[node])
    module.graph.erase_node(node)
    return made


def _returns_alias(target: torch._ops.OpOverload) -> bool:
    return any(value.alias_info is not None for value in target._schema.returns)

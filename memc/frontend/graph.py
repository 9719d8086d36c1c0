"""From an exported graph to a plain graph module with named parameters, without guards, asserts or no-ops."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind
from torch.fx import Graph, GraphModule, Node

from memc.errors import MemcError
from memc.frontend.functional import functionalize
from memc.frontend.source import user_line
from memc.program import named_tensors

aten = torch.ops.aten
PREFIX = "inner."
_LAST = 2**63 - 1
_REGIONS = {"wrap_with_set_grad_enabled": (1, None), "wrap_with_autocast": (4, 2)}
"""Higher-order op -> (index of its submodule, index of its ``enabled`` flag if that has to be off)."""
_ASSERTS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "_check", "_guards_fn")


def unlift(
    traced: GraphModule, signature: ExportGraphSignature, constants: Mapping[str, Any], inner: nn.Module, where: str
) -> GraphModule:
    """Make a plain graph module of an exported one; ``inner`` is the user's module, exported below ``PREFIX`` or bare.

    Parameters and buffers are ``get_attr`` nodes under their names in ``inner``; tied parameters stay one object.
    Regions of disabled gradients are inlined, asserts dropped, no-ops removed. Every node keeps ``meta['val']`` and
    gets ``meta['memc']``: ``path`` of the innermost module, ``source`` as ``file.py:line`` and ``line``, its text.

    Raises ``MemcError`` E305 for control flow, enabled autocast, and models that change their own buffers.
    """
    _refuse_mutation(signature, where)
    root = nn.Module()
    tensors = dict(named_tensors(inner))
    first = first_names(inner)
    lifted: dict[str, str] = {}
    for spec in signature.input_specs:
        own = str(spec.target).removeprefix(PREFIX)
        match spec.kind:
            case InputKind.USER_INPUT:
                continue
            case InputKind.PARAMETER | InputKind.BUFFER:
                own = first[own]
                attach(root, own, tensors[own])
            case InputKind.CONSTANT_TENSOR:
                own = own.replace(".", "_")
                attach(root, own, constants[str(spec.target)])
            case _:
                raise MemcError("E305", f"model has a hidden input of kind {spec.kind.name.lower()}", where)
        lifted[spec.arg.name] = own
    graph = Graph()
    values: dict[Node, Any] = {}
    placeholders = traced.graph.find_nodes(op="placeholder")
    made: dict[str, Node] = {}
    for node in sorted(placeholders, key=lambda n: n.name in lifted):
        name = lifted.get(node.name)
        if name is None or name not in made:
            copied = graph.placeholder(node.name) if name is None else graph.get_attr(name)
            copied.meta = _metadata(node, {})
            made[name or node.name] = copied
        values[node] = made[name or node.name]
    graph.output(tuple(_copy(traced, graph, values, {}, where)))
    module = GraphModule(root, graph)
    functionalize(module, where)
    clean(module)
    return module


def checkpoint_names(module: nn.Module, inner: nn.Module) -> list[str]:
    """Return the tensors of an unlifted module that a checkpoint has to hold: parameters and persistent buffers."""
    known = first_names(inner)
    return [name for name in module.state_dict() if name in known and _is_persistent(inner, name)]


def first_names(module: nn.Module) -> dict[str, str]:
    """Map the name of every parameter and buffer to the first name of the tensor that it is."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named_tensors(module)}


def attach(root: nn.Module, name: str, value: Tensor) -> None:
    """Register a parameter or buffer under its dotted name, the very object, making the modules on its way."""
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(leaf, value)
    else:
        owner.register_buffer(leaf, value)


def clean(module: GraphModule) -> None:
    """Drop asserts, whatever no one reads, and nodes that provably return their input; recompile."""
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _op_name(node).startswith(_ASSERTS):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    _drop_unused(module)
    graph.lint()
    module.recompile()


def is_identity(node: Node) -> bool:
    """Tell whether a node returns its first argument as it is, judged by the recorded fake values."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    match _op_name(node):
        case "to":
            same = before.dtype == after.dtype and before.device == after.device and before.layout == after.layout
            return same and not node.kwargs.get("copy", False) and not any(a is True for a in node.args[2:])
        case "slice":
            given: list[Any] = list(node.args[2:])
            start, end, step = given + [None, None, 1][len(given) :]
            return isinstance(start, int | None) and not start and (end is None or end == _LAST) and step == 1
        case "dropout" | "alpha_dropout" | "feature_dropout":
            return node.args[2] is False
        case "alias":
            return True
        case "contiguous":
            return all(isinstance(s, int) for s in before.shape) and before.is_contiguous()
        case _:
            return False


def _op_name(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    return getattr(target, "__name__", str(target))


def _copy(
    source: GraphModule, graph: Graph, values: dict[Node, Any], context: dict[str, Any], where: str
) -> Iterator[Any]:
    """Copy a graph's nodes behind ``graph``, inlining regions, and return what its output lists."""
    for node in source.graph.nodes:
        match node.op:
            case "placeholder":
                continue
            case "get_attr":
                values[node] = _attribute(source, node)
            case "output":
                return iter(torch.fx.map_arg(node.args[0], lambda n: values[n]))
            case "call_function":
                values[node] = _call(node, graph, values, context, where)
            case _:
                raise MemcError("E305", f"capture left a {node.op} node", where)
    raise MemcError("E305", "captured graph has no output", where)


def _call(node: Node, graph: Graph, values: dict[Node, Any], context: dict[str, Any], where: str) -> Any:
    source: Any = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(values.get(source), tuple):
        return values[source][node.args[1]]
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _inline(node, graph, values, where)
    copied = graph.node_copy(node, lambda n: values[n])
    copied.meta = _metadata(node, context)
    return copied


def _inline(node: Node, graph: Graph, values: dict[Node, Any], where: str) -> tuple[Any, ...]:
    name = _op_name(node)
    found, text = user_line(node.meta.get("stack_trace") or "")
    place = f"{found}: {text}" if found else where
    if name not in _REGIONS:
        raise MemcError("E305", f"model's control flow ({name}) cannot be compiled", place)
    index, off = _REGIONS[name]
    if off is not None and node.args[off]:
        raise MemcError("E305", "model computes under autocast", place, "remove the autocast from forward()")
    body = values[cast(Node, node.args[index])]
    inner = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[index + 1 :], strict=True))
    mapped = {k: torch.fx.map_arg(v, lambda n: values[n]) for k, v in inner.items()}
    return tuple(_copy(body, graph, mapped, node.meta, where))


def _attribute(source: GraphModule, node: Node) -> GraphModule:
    body = source.get_submodule(str(node.target))
    assert isinstance(body, GraphModule)
    return body


def _metadata(node: Node, context: dict[str, Any]) -> dict[str, Any]:
    stack = node.meta.get("nn_module_stack") or context.get("nn_module_stack") or {}
    path = next((entry[0] for entry in reversed(stack.values()) if entry[0] and "_metadata_hook" not in entry[0]), "")
    trace = node.meta.get("stack_trace") or context.get("stack_trace") or ""
    found, text = user_line(trace)
    path = "" if path == PREFIX[:-1] else path.removeprefix(PREFIX)
    kept = {"val": node.meta["val"]} if "val" in node.meta else {}
    return {**kept, "memc": {"path": path, "source": found, "line": text}}


def _is_persistent(module: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in module.get_submodule(path)._non_persistent_buffers_set


def _refuse_mutation(signature: ExportGraphSignature, where: str) -> None:
    for spec in signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise MemcError("E305", f"model changes {spec.target!r} while it runs", where, "make forward() functional")


def _drop_unused(module: GraphModule) -> None:
    """Remove the tensors that no node reads, so that parameters are counted and loaded once each."""
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for path, owner in list(module.named_modules()):
        for table in (owner._parameters, owner._buffers):
            for leaf in list(table):
                if f"{path}.{leaf}".lstrip(".") not in used:
                    del table[leaf]

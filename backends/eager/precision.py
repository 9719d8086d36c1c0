"""Store a program's weights in another type than it computes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from memc.infer import infer
from memc.program import Program, get_tensor, retie

WEIGHT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CAST = torch.ops.aten._to_copy.default


def store_weights(program: Program, dtype: torch.dtype) -> Program:
    """Return a program whose source weights are stored in ``dtype``; the one given stays as it was.

    A program that has them in ``dtype`` already is left as it is and computes in it. Any other computes in float32 and
    widens what is stored. Parameters that memc made, buffers and float32 states keep their type.
    """
    names = source_weights(program)
    halves = {get_tensor(program.module, name).dtype for name in names} - {torch.float32, torch.float64}
    if halves <= {dtype} and (halves or dtype == torch.float32):
        return program
    result = _compute_in_float32(program, halves) if halves else program.copy()
    if dtype != torch.float32:
        _cast(result, names, dtype)
        for node in result.module.graph.find_nodes(op="get_attr"):
            if node.target in names:
                _widen(node)
        result.module.graph.lint()
    result.module.recompile()
    infer(result)
    return result


def source_weights(program: Program) -> set[str]:
    """Name the floating parameters that the graph reads and that come from the source checkpoint."""
    read = {str(node.target) for node in program.module.graph.find_nodes(op="get_attr")}
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    made = {name for name, origin in program.provenance.items() if not origin.source}
    return {name for name in read - made if name in parameters and parameters[name].is_floating_point()}


def fold_casts(program: Program) -> None:
    """Widen stored weights once, in place, so that no call has to."""
    graph, widened = program.module.graph, dict[str, Tensor]()
    made: dict[int, Tensor] = {}
    for node in graph.find_nodes(op="call_function", target=_CAST):
        source = node.args[0]
        if not isinstance(source, Node) or source.op != "get_attr" or set(node.kwargs) != {"dtype"}:
            continue
        if len(source.users) > 1:
            continue
        stored, kind = get_tensor(program.module, str(source.target)), node.kwargs["dtype"]
        if id(stored) not in made:
            made[id(stored)] = stored.detach().to(kind)
        widened[str(source.target)] = made[id(stored)]
        node.replace_all_uses_with(source)
        graph.erase_node(node)
    retie(program.module, widened)
    program.module.recompile()


def _cast(program: Program, names: set[str], dtype: torch.dtype) -> None:
    """Set the named parameters to ``dtype``; those that were one tensor stay one."""
    made: dict[int, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name in sorted(names):
        value = get_tensor(program.module, name)
        if id(value) not in made:
            made[id(value)] = value.detach().to(dtype)
        values[name] = made[id(value)]
    retie(program.module, values)


def _widen(node: Node) -> None:
    users = list(node.users)
    with node.graph.inserting_after(node):
        cast = node.graph.call_function(_CAST, (node,), {"dtype": torch.float32})
    for user in users:
        user.replace_input_with(node, cast)


def _compute_in_float32(program: Program, halves: set[torch.dtype]) -> Program:
    """Return a copy that computes in float32 wherever the given one computes in one of ``halves``."""
    result = program.copy()
    halved = {name for name, value in result.module.named_parameters(remove_duplicate=False) if value.dtype in halves}
    _cast(result, halved, torch.float32)
    for name, value in list(result.module.named_buffers(remove_duplicate=False)):
        if value.dtype in halves:
            retie(result.module, {name: value.to(torch.float32)})

    def change(item: Any) -> Any:
        return torch.float32 if isinstance(item, torch.dtype) and item in halves else item

    for node in result.module.graph.nodes:
        node.args = map_aggregate(node.args, change)
        node.kwargs = map_aggregate(node.kwargs, change)
    return replace(
        result,
        inputs=tuple(replace(spec, dtype=change(spec.dtype)) for spec in result.inputs),
        outputs=tuple(replace(spec, dtype=change(spec.dtype)) for spec in result.outputs),
        states=tuple(replace(spec, dtype=change(spec.dtype)) for spec in result.states),
    )

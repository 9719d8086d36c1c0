"""Low-rank adapters (LoRA, Hu et al. 2022) as nodes of a program's graph, folded into the weights when trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import AttentionBlock, FeedForwardBlock
from memc.infer import fill_in, mode_of
from memc.program import Program, get_tensor, readers, set_tensor
from memc.raising import find_blocks
from memc.raising.feed_forward import linear_input, linear_weight

aten = torch.ops.aten
ROOT = "memc.adapters"


@dataclass(frozen=True)
class Adapter:
    """One adapted projection: ``weight`` of the linear ``node`` gets ``scale`` up @ down added.

    ``down [rank, in]`` and ``up [out, rank]`` are qualified parameter names; ``transposed`` tells that the weight is
    stored ``[in, out]``.
    """

    node: str
    weight: str
    transposed: bool
    down: str
    up: str
    scale: float


def attention_projections(program: Program) -> dict[str, tuple[str, bool]]:
    """Return the projections of every attention block: node name -> weight's name, and whether it is ``[in, out]``.

    A weight that several nodes read is left out, since each would need another change of it.
    """
    found: dict[str, tuple[str, bool]] = {}
    for block in find_blocks(program):
        if isinstance(block, AttentionBlock):
            for projection in block.projections.values():
                if projection.weight:
                    found[projection.node.name] = projection.weight, projection.transposed
    return _read_once(program, found)


def block_projections(program: Program) -> dict[str, tuple[str, bool]]:
    """Return the projections of every attention and feed-forward block, as :func:`attention_projections` does."""
    found = attention_projections(program)
    for block in find_blocks(program):
        if isinstance(block, FeedForwardBlock):
            for node in (block.up, block.gate, block.down):
                weight = linear_weight(node) if node is not None else None
                if node is not None and weight is not None and weight.op == "get_attr":
                    found[node.name] = str(weight.target), node.target != aten.linear.default
    return _read_once(program, found)


def _read_once(program: Program, found: dict[str, tuple[str, bool]]) -> dict[str, tuple[str, bool]]:
    count = readers(program.module)
    return {
        name: (weight, turned)
        for name, (weight, turned) in found.items()
        if count[id(get_tensor(program.module, weight))] == 1
    }


def add_adapters(
    program: Program, projections: dict[str, tuple[str, bool]], rank: int, scale: float, seed: int
) -> tuple[Program, list[Adapter]]:
    """Return the program with an adapter at each projection; it is the same function until one is trained.

    ``down`` starts as LoRA has it, uniform by the width, ``up`` as zeros. Parameters are float32.
    """
    adapted = program.copy()
    nodes = {node.name: node for node in adapted.module.graph.nodes}
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index, (name, (weight, transposed)) in enumerate(projections.items()):
        shape = get_tensor(program.module, weight).shape
        width, out = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        down = (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
        adapter = Adapter(name, weight, transposed, f"{ROOT}.{index}.down", f"{ROOT}.{index}.up", scale)
        set_tensor(adapted.module, adapter.down, down, trainable=True)
        set_tensor(adapted.module, adapter.up, torch.zeros(out, rank), trainable=True)
        _insert(adapted, nodes[name], adapter)
        made.append(adapter)
    adapted.module.graph.lint()
    adapted.module.recompile()
    return adapted, made


def _insert(program: Program, node: Node, adapter: Adapter) -> None:
    graph, source = program.module.graph, linear_input(node)
    mode = mode_of(node.meta["val"])
    assert mode is not None
    with graph.inserting_before(node.next):
        down, up = graph.get_attr(adapter.down), graph.get_attr(adapter.up)
        wide = graph.call_function(aten.to.dtype, (source, torch.float32))
        low = graph.call_function(aten.linear.default, (wide, down))
        high = graph.call_function(aten.linear.default, (low, up))
        scaled = graph.call_function(aten.mul.Tensor, (high, adapter.scale))
        total = graph.call_function(aten.add.Tensor, (node, scaled))
        result = graph.call_function(aten.to.dtype, (total, node.meta["val"].dtype))
    for read in (down, up):
        with mode:
            read.meta["val"] = torch.empty(get_tensor(program.module, str(read.target)).shape)
    fill_in(wide, low, high, scaled, total, result)
    node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not total)


@torch.no_grad()
def fold_adapters(program: Program, adapted: Program, adapters: Sequence[Adapter]) -> Program:
    """Return ``program`` with what the adapters of ``adapted`` have learned added to its weights, in their own type."""
    folded = program.copy()
    for adapter in adapters:
        down, up = get_tensor(adapted.module, adapter.down), get_tensor(adapted.module, adapter.up)
        fold_change(folded, adapter, adapter.scale * (up @ down))
    return folded


def fold_change(program: Program, adapter: Adapter, change: Tensor) -> None:
    """Give a program, in place, a weight of its own that is ``change [out, in]`` from what it was."""
    weight = get_tensor(program.module, adapter.weight)
    new = weight.detach().float() + (change.T if adapter.transposed else change)
    set_tensor(program.module, adapter.weight, new.to(weight.dtype))
    if adapter.weight in program.provenance:
        old = program.provenance[adapter.weight]
        transform = "adapted" if old.transform == "identity" else f"{old.transform},adapted"
        program.provenance[adapter.weight] = replace(old, transform=transform, invertible=False)

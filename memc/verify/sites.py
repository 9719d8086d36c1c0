"""Where two programs begin to differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from memc.program import Program
from memc.verify.execute import layer_of, run_nodes
from memc.verify.inputs import inputs_of


@dataclass(frozen=True)
class BadSite:
    """The first value that differs: its node, the layer and module path it belongs to, and by how much."""

    node: str
    layer: int | None
    path: str
    difference: float

    def __str__(self) -> str:
        """Say it in one phrase."""
        where = f"layer {self.layer}" if self.layer is not None else self.path or "outside any layer"
        return f"first differs at {where}, node {self.node}, by {self.difference:.3g}"


@torch.no_grad()
def first_bad_site(original: Program, result: Program, tokens: Tensor, tolerance: float = 1e-4) -> BadSite | None:
    """Return the first node of ``original`` whose value ``result`` does not reproduce, or None.

    Nodes are matched by name, which rewriting keeps for what it leaves alone; values of another shape do not match.
    ``tolerance`` is relative to the largest magnitude of the value, plus one. Keep ``tokens [B, T]`` short: every value
    of the original is held.
    """
    common = {node.name for node in result.module.graph.nodes if node.op == "call_function"}
    expected: dict[str, Tensor] = {}
    order: list[Node] = []

    def record(node: Node, value: Any) -> None:
        if node.op == "call_function" and node.name in common and isinstance(value, Tensor):
            expected[node.name] = value
            order.append(node)

    differences: dict[str, float] = {}

    def compare(node: Node, value: Any) -> None:
        before = expected.pop(node.name, None)
        if before is None or not isinstance(value, Tensor) or before.shape != value.shape or not before.numel():
            return
        if before.is_floating_point():
            difference = float((before - value).abs().max()) / (1.0 + float(before.abs().max()))
        else:
            difference = float((before != value).any())
        if not difference <= tolerance:
            differences[node.name] = difference

    for program, visit in ((original, record), (result, compare)):
        inputs = (*inputs_of(program, tokens), *program.new_state(tokens.shape[0]))
        run_nodes(program, inputs, precision=torch.float32, visit=visit)
    for node in order:
        if node.name in differences:
            layer, path = layer_of(node)
            return BadSite(node.name, layer, path, differences[node.name])
    return None

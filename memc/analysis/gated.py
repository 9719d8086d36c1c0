"""A program run with gates on some of its values: what a unit is worth shows where its gate closes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.plugins import load_kernels
from memc.program import Program


def gated_logits(program: Program, tokens: Tensor, positions: Tensor, gates: Mapping[Node, Tensor]) -> Tensor:
    """Run ``tokens [B,T]`` from an empty state and return the logits ``[B,T,V]``, differentiable in the gates.

    The value of each node in ``gates`` is multiplied by its gate, which has to broadcast to it. Parameters take no part
    in the gradient.
    """
    load_kernels()
    batch, device = len(tokens), tokens.device
    given = (*program.nothing_fetched(batch, device), *program.new_state(batch, device))
    logits: Tensor = _Gated(program, gates).run(tokens, positions, *given)[0]
    return logits


class _Gated(Interpreter):
    """Multiplies the values of some nodes by gates."""

    def __init__(self, program: Program, gates: Mapping[Node, Tensor]) -> None:
        super().__init__(program.module)
        self._gates = gates

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            return value.detach()
        return value * self._gates[n].to(value.device, value.dtype) if n in self._gates else value


def closed(count: int, gone: Tensor) -> Tensor:
    """Return gates ``[count]`` that are 0 at the indices in ``gone`` and 1 elsewhere."""
    gates = torch.ones(count)
    gates[gone] = 0.0
    return gates

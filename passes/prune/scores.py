"""What a channel or head is worth: the lowest scores go first.

Scores are of the input channels x_j of the projection W that a group ends in, over the tokens of the calibration
sequences; a head's score is the sum over its channels. Only the order within a block matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.nn import functional

from memc.passes.prune.groups import Group
from memc.passes.prune.moments import Moments
from memc.pipeline import Calibration
from memc.plugins import load_kernels
from memc.program import Program, get_tensor
from memc.raising.feed_forward import linear_input


def activation(moments: Moments, weight: Tensor) -> Tensor:
    """Root of the sum over sequences of (mean |x_j| over tokens)^2 (Minitron, arXiv 2407.14679, section 2.2)."""
    return moments.means_squared.sqrt()


def wanda(moments: Moments, weight: Tensor) -> Tensor:
    """Sum over rows of |W_ij| times the root of the mean x_j^2 (Wanda, Sun et al. 2024, summed over columns)."""
    return weight.abs().sum(0) * (moments.squares / moments.count).sqrt()


def flap(moments: Moments, weight: Tensor) -> Tensor:
    """Variance of x_j times the sum over rows of W_ij^2 (FLAP, An et al. 2024, eq. 5, the WIFV metric)."""
    return moments.variance * weight.square().sum(0)


def two_stage(moments: Moments, weight: Tensor) -> Tensor:
    """Mean over sequences of the norm of x_j over tokens (2SSP, Sandri et al., arXiv 2501.17771, stage 1)."""
    return moments.norms


BY_MOMENTS: dict[str, Callable[[Moments, Tensor], Tensor]] = {
    "activation": activation,
    "wanda": wanda,
    "flap": flap,
    "2ssp": two_stage,
}


def by_unit(group: Group, channels: Tensor) -> Tensor:
    """Sum channels' scores ``[C]`` over each unit."""
    columns = group.columns
    taken = columns >= 0
    return torch.zeros(group.units, dtype=torch.float64).index_add_(0, columns[taken], channels[taken].double())


def magnitude(group: Group) -> Tensor:
    """Root of the sum of squares of every parameter that goes with a unit (DepGraph, Fang et al. 2023, eq. 5)."""
    total, known = torch.zeros(group.units, dtype=torch.float64), set[int]()
    for name, labels in group.parameters.items():
        value = get_tensor(group.module, name)
        if id(value) not in known and isinstance(value, torch.nn.Parameter):
            known.add(id(value))
            squares = (
                value.detach().double().cpu().square().movedim(labels.axis, 0).reshape(len(labels.units), -1).sum(1)
            )
            taken = labels.units >= 0
            total.index_add_(0, labels.units[taken], squares[taken])
    return total.sqrt()


def taylor(program: Program, groups: Sequence[Group], calibration: Calibration) -> list[Tensor]:
    """Score each group's channels by |sum over tokens of x_j dL/dx_j|, summed over sequences.

    L is the cross-entropy of the next tokens. To first order this is how much L changes when x_j becomes 0 (Molchanov
    et al. 2019, eq. 8 with a gate on each channel), which equals |sum_i W_ij dL/dW_ij|. One sequence's activations are
    held at a time.
    """
    load_kernels()
    scores = [torch.zeros(len(group.columns), dtype=torch.float64) for group in groups]
    for row in range(len(calibration.tokens)):
        tokens, positions = (part[row : row + 1] for part in (calibration.tokens, calibration.positions))
        run = _Gated(program, [linear_input(group.exit) for group in groups])
        logits = run.run(tokens, positions, *program.nothing_fetched(1), *program.new_state(1))[0]
        goes_on = positions[0, 1:] > 0
        loss = functional.cross_entropy(logits[0, :-1][goes_on].float(), tokens[0, 1:][goes_on])
        gates = [run.gates[linear_input(group.exit)] for group in groups]
        for score, gradient in zip(scores, torch.autograd.grad(loss, gates), strict=True):
            score += gradient.double().abs()
    return scores


class _Gated(Interpreter):
    """Runs a program with a gate of ones on the channels of some nodes; parameters take no part in the gradient."""

    def __init__(self, program: Program, nodes: Sequence[Node]) -> None:
        super().__init__(program.module)
        self.gates: dict[Node, Tensor] = {}
        self._gated = set(nodes)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            return value.detach()
        if n in self._gated:
            self.gates[n] = torch.ones(value.shape[-1], dtype=value.dtype, requires_grad=True)
            value = value * self.gates[n]
        return value

"""Pruning tiny programs: calibration text, groups, and what a run shows of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.conversion.pipeline import plan_pass
from memc.passes.prune import Prune
from memc.passes.prune.groups import Group, Groups
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import ridge
from memc.passes.prune.rewrite import Fit
from memc.pipeline import Calibration, PassReport
from memc.program import Program, get_tensor, retie
from memc.raising.feed_forward import linear_input, linear_parts
from tests.passes.tiny_program import TARGET

SMALL: dict[str, Any] = {"round": 4, "protect": "none", "protect_heads": "none"}


def text(count: int = 12, length: int = 16, seed: int = 1, vocabulary: int = 37) -> Calibration:
    tokens = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Calibration(tokens, torch.arange(length).expand(count, length).contiguous(), "random tokens")


def prune(program: Program, calibration: Calibration | None = None, **options: Any) -> tuple[Program, PassReport]:
    pass_ = Prune(**{**SMALL, **options})
    plan = replace(plan_pass(pass_, program, TARGET), calibration=calibration)
    return pass_.apply(program, plan)


def fake(program: Program) -> Program:
    """Return the program with parameters that have no values."""
    planned, made = program.copy(), dict[int, Tensor]()
    named = dict(planned.module.named_parameters(remove_duplicate=False))
    retie(planned.module, {n: made.setdefault(id(p), p.detach().to("meta")) for n, p in named.items()})
    return planned


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in program.module.named_parameters()}


class Recorded(Interpreter):
    """Runs a program and keeps what some nodes were."""

    def __init__(self, program: Program, nodes: set[Node]) -> None:
        super().__init__(program.module)
        self.nodes, self.seen = nodes, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.seen[n] = value.detach()
        return value


def entries(program: Program, group: Group, calibration: Calibration) -> Tensor:
    """Inputs ``[N, T, C]`` of a group's exit projection, from one run of the whole batch."""
    node = linear_input(group.exit)
    run = Recorded(program, {node})
    run.run(calibration.tokens, calibration.positions, *program.new_state(len(calibration.tokens)))
    return run.seen[node].reshape(len(calibration.tokens), -1, len(group.columns)).double()


def feed_forward(program: Program, layer: int = 0) -> Group:
    groups = Groups(program)
    block = next(block for block in groups.blocks if block.kind == "feed_forward" and block.layer == layer)
    return groups.of(block, "ffn_channels")


def heads(program: Program, layer: int = 0) -> Group:
    groups = Groups(program)
    block = next(block for block in groups.blocks if block.kind == "attention" and block.layer == layer)
    return groups.of(block, "kv_groups")


def values(program: Program, node: Node, calibration: Calibration) -> Tensor:
    """Values ``[tokens, C]`` of a node, from one run of the whole batch."""
    run = Recorded(program, {node})
    run.run(calibration.tokens, calibration.positions, *program.new_state(len(calibration.tokens)))
    return run.seen[node].flatten(0, -2).double()


def exit_weight(program: Program, group: Group) -> Tensor:
    return get_tensor(program.module, str(linear_parts(group.exit)[0].target)).detach().double()


def fit_of(program: Program, group: Group) -> Fit:
    """Weight and bias that a pruned program's projection behind a group has."""
    exit_ = next(n for n in program.module.graph.nodes if n.name == group.exit.name)
    weight, bias, _, _ = linear_parts(exit_)
    assert bias is not None
    return Fit(*(get_tensor(program.module, str(node.target)).detach() for node in (weight, bias)))


def least_error(moments: Moments, weight: Tensor, kept: Tensor) -> float:
    """Squared error that the best fit on the kept channels leaves, with the ridge in the covariance."""
    covariance = moments.covariance + ridge(moments) * torch.eye(len(kept), dtype=torch.float64)
    inner, outer = covariance[kept][:, kept], covariance[kept][:, ~kept]
    rest = covariance[~kept][:, ~kept] - outer.T @ torch.linalg.solve(inner, outer)
    return float(torch.einsum("oi,ij,oj->", weight[:, ~kept], rest, weight[:, ~kept]))

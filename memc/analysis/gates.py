"""What linear memories forget: the half-lives of their gates, of every token and head of a text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memc.dialect import arguments
from memc.program import Program
from memc.report.facts import GateFacts
from memc.train.blocks import Teacher
from memc.verify.inputs import positions_of

LONGEST = 16
"""Power of two of the longest half-life in tokens that is told from one that is longer."""


@torch.no_grad()
def half_lives(program: Program, tokens: Tensor) -> list[GateFacts]:
    """Run ``tokens [1,T]`` and count, for each linear memory, half-lives from one power of two to the next.

    The half-life of a gate of decay exp(g) is -ln 2 / g tokens; there is one for each token and head, or key channel.
    """
    nodes = program.module.graph.find_nodes(op="call_function", target=torch.ops.memc.linear_memory.default)
    gates = [arguments(node)["log_decay"] for node in nodes]
    found: list[GateFacts | None] = [None] * len(nodes)

    def learn(index: int, values: dict[str, Tensor]) -> None:
        place = nodes[index].meta.get("memc", {}).get("path", "")
        found[index] = GateFacts(path=place, shares=_shares(values[gates[index].name]))

    Teacher(program, [(gate.name,) for gate in gates]).run(tokens, positions_of(tokens), learn)
    return [facts for facts in found if facts is not None]


def _shares(log_decay: Tensor) -> dict[int, float]:
    """Return the share of gates whose half-life is from 2^n tokens on, by n; the last has all that are longer."""
    lives = math.log(2) / (-log_decay.double()).clamp_min(math.log(2) / 2 ** (LONGEST + 1))
    powers = lives.log2().floor().clamp(0, LONGEST).flatten().long()
    counts = torch.bincount(powers, minlength=LONGEST + 1)
    return {power: int(count) / len(powers) for power, count in enumerate(counts) if count}

"""Passes for tests of the pipeline: each inserts one op in front of the logits, or misbehaves in one way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.fx import Node

from memc.infer import infer
from memc.pipeline import Pass, PassReport, Plan, Rejection, Site, option
from memc.program import Program
from memc.relation import Bounded, Close, Exact, Relation
from memc.target import Target

aten = torch.ops.aten
TARGET = Target(name="toy", description="toy", kind="cpu", backend="eager", instruction_set="any")


@dataclass(frozen=True)
class Toy(Pass):
    """Change the logits by ``op``, and claim ``relation``."""

    name: ClassVar[str] = "toy"

    op: str = option("clone", "what to do", choices=("clone", "shift", "scale", "nan", "shape", "nothing"))
    by: float = option(0.0, "how much")
    relation: str = option("exact", "what to claim", choices=("exact", "close", "kl", "ratio", "window"))
    budget: float = option(1e-3, "tolerance or budget")
    kill: str = option("", "file whose existence kills the process")

    def plan(self, program: Program, target: Target) -> Plan:
        if self.op == "nothing":
            rejected = tuple(Rejection(layer, "", "attention", "toy", "not to my taste") for layer in range(2))
            return Plan(self.spec, (), rejected, ())
        return Plan(self.spec, (Site(0, "model.layers.0", "attention"),), (), (self.claimed,))

    @property
    def claimed(self) -> Relation:
        relations: dict[str, Relation] = {
            "exact": Exact(),
            "close": Close(self.budget),
            "kl": Bounded("kl_mean", self.budget),
            "ratio": Bounded("perplexity_ratio", self.budget),
            "window": Bounded("perplexity_ratio_to_window", self.budget),
        }
        return relations[self.relation]

    def apply(self, program: Program, plan: Plan) -> tuple[Program, PassReport]:
        if self.kill and Path(self.kill).exists() and not program.is_fake:
            signal.raise_signal(signal.SIGKILL)
        result = program.copy()
        output = result.module.graph.output_node()
        logits, *states = output.args[0]  # type: ignore[misc,union-attr]
        assert isinstance(logits, Node)
        with result.module.graph.inserting_before(output):
            calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
                "clone": (aten.clone.default, ()),
                "shift": (aten.add.Tensor, (self.by,)),
                "scale": (aten.mul.Tensor, (self.by,)),
                "nan": (aten.mul.Tensor, (float("nan"),)),
                "shape": (aten.unsqueeze.default, (0,)),
            }
            target, extra = calls[self.op]
            changed = result.module.graph.call_function(target, (logits, *extra))
        output.args = ((changed, *states),)
        result.module.recompile()
        infer(result)
        return result, PassReport(
            plan.spec, plan.sites, plan.rejections, plan.relations, details={"0": {"by": self.by}}
        )

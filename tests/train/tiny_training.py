"""What the tests of training share: tiny linearized programs, packed batches, and an interpreter as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.passes.linearize import Linearize
from memc.pipeline import PassReport
from memc.program import Program, get_tensor, named_tensors, set_tensor
from memc.progress import Silent
from memc.train.loop import Checkpoints, Schedule
from memc.train.parallel import whole
from memc.train.transfer import Transfer
from tests.passes.tiny_program import TARGET, tokens_of

SMALL: dict[str, Any] = {"window": 4, "sinks": 2, "feature_size": 8}
LENGTH = 24
SINKS = (0.5, -1.0, 2.0, 0.0)
TEACHERS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0, "sink_logits": SINKS},
    {"window": 9},
    {"heads": 3, "kv_heads": 1, "head_dim": 14},
]
"""Grouped heads, soft-capped with sink logits, a sliding window, one key for three heads of an odd size."""


_REWRITTEN: dict[Any, tuple[Program, Program, PassReport]] = {}


def linearized(program: Program, **options: Any) -> tuple[Program, PassReport]:
    """Rewrite a program's attention; small sizes unless told. Equal rewrites are done once, parameters are copied."""
    pass_ = Linearize(**{**SMALL, **options})
    key = (pass_, *(id(value) for _, value in named_tensors(program.module)))
    if key not in _REWRITTEN:
        _REWRITTEN[key] = (program.copy(), *pass_.apply(program, pass_.plan(program, TARGET)))
    _, after, report = _REWRITTEN[key]
    after = after.copy()
    for name in (name for objective in report.objectives for name in objective.parameters.values()):
        set_tensor(after.module, name, get_tensor(after.module, name).detach().clone())
    return after, report


def packed(batch: int, seed: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Make random sequences of which every second one is two documents in a row."""
    positions = torch.arange(length).repeat(batch, 1)
    for row in range(1, batch, 2):
        positions[row, 9:] = torch.arange(length - 9)
    return tokens_of(batch, length, seed), positions


def batches(step: int) -> tuple[Tensor, Tensor]:
    """Batch of a step."""
    return packed(2, 100 + step)


def values_of(program: Program, tokens: Tensor, positions: Tensor) -> dict[str, Any]:
    """Run a whole program and return the value of every node by name."""
    interpreter = Interpreter(program.module, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(tokens, positions, *program.new_state(len(tokens)))
    return {node.name: value for node, value in interpreter.env.items() if isinstance(node, Node)}


def tensors_of(program: Program) -> dict[str, Tensor]:
    """Copy every parameter and buffer of a program."""
    return {name: value.detach().clone() for name, value in named_tensors(program.module)}


def changed(before: dict[str, Tensor], after: dict[str, Tensor], names: Iterable[str] | None = None) -> set[str]:
    """Return the names whose tensors are not the same to the bit."""
    return {name for name in (before if names is None else names) if not torch.equal(before[name], after[name])}


def transfer(
    program: Program, after: Program, report: PassReport, steps: int, rate: float = 1e-2, checkpoints: Any = None
) -> Transfer:
    """Initialise every block and train it for some steps."""
    made = Transfer(program, after, report.objectives)
    made.initialise(*packed(4, 7))
    made.train(batches, Schedule(steps), rate, 0, checkpoints or Checkpoints(None, {}), Silent())
    return made


def slopes(learns: Mapping[str, torch.nn.Parameter], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the gradients of a loss of the logits."""
    for value in learns.values():
        value.grad = None
    run().square().mean().backward()
    return {name: whole(value.grad) for name, value in learns.items() if value.grad is not None}

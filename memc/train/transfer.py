"""Stage 0 and 1: every rewritten block learns from the block it replaces, on the original's own activations.

No block sees another's error, so the blocks are independent: one backward graph is alive at a time, and the original
runs once for all of them (attention transfer, LoLCATs, Zhang et al. 2024, section 3.1; block-wise there in 3.3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memc.objective import BlockObjective, relative_error
from memc.program import Program
from memc.progress import Progress
from memc.report.facts import PositionError
from memc.train.blocks import StudentBlock, Teacher, cut_out
from memc.train.loop import (
    Batches,
    Checkpoints,
    Curve,
    Schedule,
    only,
    optimiser,
    optimiser_tensors,
    require_finite,
    restore_optimiser,
    step_optimiser,
)
from memc.train.parallel import ALONE, Processes

POINTS = 100
"""Points of a loss curve."""


class Transfer:
    """The transfer of some blocks of a program; ``products`` is the type of the teacher's matrix products.

    Every one of ``processes`` trains on its share of each batch.
    """

    def __init__(
        self,
        before: Program,
        after: Program,
        objectives: Sequence[BlockObjective],
        products: torch.dtype | None = None,
        processes: Processes = ALONE,
    ) -> None:
        """Cut the blocks out of ``after``, whose parameters are what is trained."""
        self.processes = processes
        self._named = dict(after.module.named_parameters())
        self.blocks = [cut_out(before, after, objective) for objective in objectives]
        wanted = [tuple(dict.fromkeys((*b.inputs, b.objective.target, *b.objective.reads))) for b in self.blocks]
        self.teacher = Teacher(before, wanted, products)

    def initialise(self, tokens: Tensor, positions: Tensor) -> None:
        """Set first values in closed form from ``tokens [N,T]``, a few sequences."""

        def learn(index: int, values: dict[str, Tensor]) -> None:
            block = self.blocks[index]
            with torch.no_grad():
                block.objective.initialise(values, block.parameters, lambda: block(values))

        self.teacher.run(tokens, positions, learn)
        self.processes.align(value.data for block in self.blocks for value in block.parameters.values())

    def train(
        self,
        batches: Batches,
        schedule: Schedule,
        rate: float,
        seed: int,
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> Curve:
        """Train for the schedule's steps, going on from the newest checkpoint, and return the mean of the losses.

        ``rate`` is the learning rate at its peak.
        Raises ``MemcError``: E403 naming layer and step when a loss is not finite, E502 when the disk is full.
        """
        made = [self._optimiser(block, rate) for block in self.blocks]
        curves = [Curve() for _ in self.blocks]
        first = self._restore(checkpoints, made, curves)
        self.processes.wait()  # nobody reads a checkpoint any more that the leader may remove
        tokens, began = 0, time.perf_counter()
        new = {name for block in self.blocks for name in block.objective.parameters.values()}
        with only(self._named, new), progress.step("transfer", schedule.steps) as advance:
            modules = [self.processes.wrap(block.module) for block in self.blocks]
            advance(first)
            for step in range(first, schedule.steps):
                tokens = self._step(step, batches, schedule, seed, modules, made, curves)
                advance(1, _summary(curves, tokens, step + 1 - first, began))
                if checkpoints.due:
                    checkpoints.save(step + 1, *self._state(made, curves))
        checkpoints.save(schedule.steps, *self._state(made, curves))
        return _mean(curves)

    def _step(
        self,
        step: int,
        batches: Batches,
        schedule: Schedule,
        seed: int,
        modules: Sequence[nn.Module],
        made: Sequence[torch.optim.AdamW],
        curves: Sequence[Curve],
    ) -> int:
        tokens, positions = batches(step)
        found: list[dict[str, float]] = [{} for _ in self.blocks]

        def learn(index: int, values: dict[str, Tensor]) -> None:
            block, objective = self.blocks[index], self.blocks[index].objective
            where = f"layer {objective.layer} {objective.path}"
            # Of the layer's number, not its place among those that are trained, so that it learns alike without them.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 1009 + objective.layer)
            losses = objective.losses(
                modules[index](*block.arguments(values)), values, step / schedule.steps, generator
            )
            total = torch.stack(list(losses.values())).sum()
            require_finite("loss", total, where, step)
            total.backward()
            step_optimiser(made[index], schedule.share(step), where, step)
            found[index] = {name: float(value.detach()) for name, value in losses.items()}

        self.teacher.run(*self.processes.share(tokens, positions), learn)
        means = iter(self.processes.mean([value for losses in found for value in losses.values()]))
        for curve, losses in zip(curves, found, strict=True):
            curve.add(step, {name: next(means) for name in losses}, max(1, schedule.steps // POINTS))
        return tokens.numel()

    @torch.no_grad()
    def errors(self, tokens: Tensor, positions: Tensor) -> dict[int, float]:
        """Return each layer's relative squared error on ``tokens [N,T]``, past what is exact by construction."""
        found = dict.fromkeys((block.objective.layer for block in self.blocks), 0.0)

        def measure(index: int, values: dict[str, Tensor]) -> None:
            block = self.blocks[index]
            with torch.no_grad():
                output, target = block(values)[0], block.objective.wanted(values)
                error = relative_error(output, target, block.objective.exact)
                found[block.objective.layer] += float(error) / len(tokens)

        for row in range(len(tokens)):
            self.teacher.run(tokens[row : row + 1], positions[row : row + 1], measure)
        return found

    @torch.no_grad()
    def errors_by_position(self, tokens: Tensor, positions: Tensor) -> dict[int, list[PositionError]]:
        """Return each layer's relative squared error on ``tokens [N,T]`` from one power of two to the next."""
        starts = [1 << power for power in range(max(tokens.shape[1] - 1, 1).bit_length())]
        bounds = list(zip([0, *starts[1:]], [*starts[1:], tokens.shape[1]], strict=True))
        sums = {block.objective.layer: torch.zeros(2, len(bounds)) for block in self.blocks}

        def measure(index: int, values: dict[str, Tensor]) -> None:
            objective = self.blocks[index].objective
            with torch.no_grad():
                target = objective.wanted(values).float()
                pair = (self.blocks[index](values)[0].float() - target, target)
            for row, part in enumerate(pair):
                squares = part.square().sum((0, 1, 3)).cpu()
                sums[objective.layer][row] += torch.stack([squares[start:end].sum() for start, end in bounds])

        for row in range(len(tokens)):
            self.teacher.run(tokens[row : row + 1], positions[row : row + 1], measure)
        return {
            layer: [
                PositionError(start=start, end=end, error=float(error / square))
                for (start, end), error, square in zip(bounds, *found, strict=True)
                if square > 0
            ]
            for layer, found in sums.items()
        }

    def start(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and facts of a checkpoint before the first step."""
        return self._state([self._optimiser(block, 1.0) for block in self.blocks], [Curve() for _ in self.blocks])

    def _state(
        self, made: Sequence[torch.optim.AdamW], curves: Sequence[Curve]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for index, block in enumerate(self.blocks):
            tensors |= {f"block.{index}.{name}": value.detach() for name, value in block.parameters.items()}
            tensors |= optimiser_tensors(f"optimiser.{index}", made[index])
        return tensors, {"curves": [curve.to_json() for curve in curves]}

    def _optimiser(self, block: StudentBlock, peak: float) -> torch.optim.AdamW:
        return optimiser([{"params": list(block.parameters.values()), "peak": peak}])

    def _restore(self, checkpoints: Checkpoints, made: Sequence[torch.optim.AdamW], curves: list[Curve]) -> int:
        found = checkpoints.load()
        if found is None:
            return 0
        step, tensors, facts = found
        for index, block in enumerate(self.blocks):
            for name, parameter in block.parameters.items():
                parameter.data.copy_(tensors[f"block.{index}.{name}"])
            restore_optimiser(f"optimiser.{index}", made[index], tensors)
        curves[:] = [Curve.of(data) for data in facts["curves"]]
        return step


def _summary(curves: Sequence[Curve], tokens: int, steps: int, began: float) -> str:
    speed = tokens * steps / (time.perf_counter() - began)
    last = [next(iter(curve.last().values())) for curve in curves if curve.last()]
    error = f"error {sum(last) / len(last):.4f}, " if last else ""
    return f"{error}{speed:.0f} tokens/s"


def _mean(curves: Sequence[Curve]) -> Curve:
    names = sorted({name for curve in curves for name in curve.losses})
    return Curve(
        steps=list(curves[0].steps),
        losses={
            name: [
                sum(point) / len(point)
                for point in zip(*(c.losses[name] for c in curves if name in c.losses), strict=True)
            ]
            for name in names
        },
    )

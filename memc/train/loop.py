"""What every stage of training shares: the batches it sees, its learning rate, its checkpoints and its curve."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memc.errors import MemcError
from memc.tensor_file import read_tensors, write_tensors
from memc.train.parallel import is_shared_out, laid_out_as, whole, write_shared

Batches = Callable[[int], tuple[Tensor, Tensor]]
"""Batch of a step, the same whenever it is asked for: tokens and positions ``[B,T]`` int64."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises to its peak."""

FLOOR = 0.1
"""Share of the peak that the learning rate ends at."""

BETAS = (0.9, 0.99)
CLIP = 1.0
"""Largest norm of the gradient of what one optimiser steps."""

STEP = "step"
"""What AdamW calls the number of its steps, a single number without a dimension that it keeps on the CPU. Of such ones
``torch.distributed.checkpoint`` writes zeros where it puts shares together (tried with torch 2.13)."""

SAVE_SECONDS = 60.0
"""Time between two checkpoints."""


@dataclass(frozen=True)
class Schedule:
    """A number of steps, over which learning rates rise linearly and then fall as a cosine."""

    steps: int

    def share(self, step: int) -> float:
        """Return the share of its peak that a learning rate has at one step, the first being 0."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        over = (step - warm) / max(1, self.steps - warm)
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * over))


def optimiser(groups: Sequence[Mapping[str, Any]]) -> torch.optim.AdamW:
    """Make AdamW without weight decay: new parameters are no weights that could grow too large."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=BETAS, eps=1e-8, weight_decay=0.0)


def step_optimiser(made: torch.optim.AdamW, share: float, where: str, step: int) -> None:
    """Clip the gradient and take one step at ``share`` of every group's own peak rate.

    Raises ``MemcError`` E403 when the gradient is not finite, or the parameters are not after the step: so no
    checkpoint ever holds such values.
    """
    parameters = [parameter for group in made.param_groups for parameter in group["params"]]
    require_finite("gradient", torch.nn.utils.clip_grad_norm_(parameters, CLIP), where, step)
    for group in made.param_groups:
        group["lr"] = group["peak"] * share
    made.step()
    made.zero_grad(set_to_none=True)
    require_finite("a parameter", torch.nn.utils.get_total_norm(parameters), where, step)


def optimiser_tensors(name: str, made: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return everything that an optimiser holds beside its parameters, by name; nothing of it without a dimension."""
    found: dict[str, Tensor] = {}
    for index, (_, state) in enumerate(_states(made)):
        for key, value in state.items():
            found[f"{name}.{index}.{key}"] = value.reshape(1) if key == STEP else value
    return found


def restore_optimiser(name: str, made: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser back what :func:`optimiser_tensors` took."""
    for index, (parameter, _) in enumerate(_states(made)):
        prefix = f"{name}.{index}."
        held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if held:
            made.state[parameter] = {
                key: value.reshape(()).clone() if key == STEP else laid_out_as(parameter, value)
                for key, value in held.items()
            }


def _states(made: torch.optim.AdamW) -> Iterable[tuple[torch.nn.Parameter, dict[str, Any]]]:
    for group in made.param_groups:
        for parameter in group["params"]:
            yield parameter, made.state.get(parameter, {})


@dataclass
class Curve:
    """Losses by name over the steps, each the mean since the point before."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[float]] = field(default_factory=dict)
    _sums: dict[str, float] = field(default_factory=dict)
    _count: int = 0

    def add(self, step: int, losses: Mapping[str, float], every: int) -> None:
        """Add the losses of one step; a point is made every ``every`` steps."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if (step + 1) % every == 0:
            self.steps.append(step + 1)
            for name, total in self._sums.items():
                self.losses.setdefault(name, []).append(total / self._count)
            self._sums, self._count = {}, 0

    def last(self) -> dict[str, float]:
        """Return the last point."""
        return {name: values[-1] for name, values in self.losses.items() if values}

    def to_json(self) -> dict[str, Any]:
        """Return the curve, and what is summed up for its next point, as JSON values."""
        return {"steps": self.steps, "losses": self.losses, "sums": self._sums, "count": self._count}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Curve:
        """Read what :meth:`to_json` gave."""
        return cls(list(data["steps"]), data["losses"], data.get("sums", {}), data.get("count", 0))


class Checkpoints:
    """Checkpoints of one stage in one folder: each whole or not there, the newest alone is kept.

    ``key`` tells what the training is of; a checkpoint of another key is refused with both names. Of several processes
    one ``writes`` and all read.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any], *, writes: bool = True) -> None:
        """Note the folder (None keeps nothing) and what is trained."""
        self.folder = folder
        self.writes = writes
        self.key = dict(key)
        self._saved = time.monotonic()
        self._last: int | None = None

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for another."""
        return time.monotonic() - self._saved > SAVE_SECONDS

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a checkpoint of the state after ``step`` steps. Raises ``MemcError`` E502 when the disk is full.

        One that is there already is left alone: the same training comes to the same state. Tensors that are shared out
        all processes write together, so that all have to call this; the file is as if one had written it.
        """
        self._saved = time.monotonic()
        shared = any(is_shared_out(value) for value in tensors.values())
        if self.folder is None or not (self.writes or shared):
            return
        final, partial = self.folder / f"step-{step:08d}", self.folder / "writing"
        # Processes that write together have to agree, and one may look before the leader has renamed the folder.
        if step == self._last or final.is_dir():
            return
        self._last = step
        try:
            if self.writes:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            (write_shared if shared else write_tensors)(partial / "state.safetensors", tensors)
            if not self.writes:
                return
            (partial / "facts.json").write_text(json.dumps({"key": self.key, "step": step, **facts}) + "\n")
            partial.rename(final)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = f"checkpoint cannot be written: {error.strerror or error}"
            raise MemcError("E502", reason, str(self.folder), "free some space; the same command goes on") from error
        for old in self._all()[:-1]:
            shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest checkpoint: its step, tensors and facts; None when there is none.

        Raises ``MemcError`` E204 for one of another training.
        """
        if not (found := self._all()):
            return None
        newest = found[-1]
        facts = json.loads((newest / "facts.json").read_text())
        old, new = facts["key"], self.key
        if old != new:
            differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            both = ", ".join(f"{name} {old.get(name)!r}, wanted {new.get(name)!r}" for name in differ)
            raise MemcError("E204", f"checkpoint is of another training: {both}", str(newest), "add --fresh")
        return facts["step"], read_tensors(newest / "state.safetensors"), facts

    def _all(self) -> list[Path]:
        """List the checkpoints, oldest first; a kill while old ones are removed leaves more than one."""
        return sorted(self.folder.glob("step-*")) if self.folder is not None else []


def require_finite(what: str, value: Tensor, where: str, step: int) -> None:
    """Raise ``MemcError`` E403 naming what was trained and the step when a value of it is not finite."""
    if not math.isfinite(float(whole(value.detach()))):
        hint = "give a lower learning rate (train: in a recipe) and --fresh; the last good checkpoint is kept"
        raise MemcError("E403", f"{what} is not finite at step {step}", where, hint)


@contextmanager
def only(named: Mapping[str, torch.nn.Parameter], chosen: Collection[str]) -> Iterator[None]:
    """Let only the chosen of these parameters have gradients, which are gone at the end."""
    had = {name: parameter.requires_grad for name, parameter in named.items()}
    try:
        for name, parameter in named.items():
            parameter.requires_grad_(name in chosen)
        yield
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(had[name])
            parameter.grad = None

"""Stage 2: the whole rewritten program learns the original's next-token distribution, through low-rank adapters.

The loss is KL(original || rewritten) over the whole vocabulary; cross-entropy on the text is an option, off by default,
since a model that adapts to a text gets better at it without getting closer to the original.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from memc.program import Program, get_tensor, named_tensors, retie
from memc.progress import Progress
from memc.train.blocks import Teacher, logits_node
from memc.train.guard import Guard, Look, best_of
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
from memc.train.parallel import ALONE, Processes, laid_out_as, whole
from memc.train.products import narrowed
from memc.verify.divergence import token_kl

POINTS = 100
GUARDS = 8
"""How often the guard text is looked at over a whole training."""

PATIENCE = 4
"""Looks in a row after which training stops when none of them is better than the best before: one in which any of the
texts is worse than at the start is not.

The first ones are of little use: while the learning rate is near its peak a linearized model can be worse than where it
started, and end better (SmolLM2-135M, no layer kept).
"""


@dataclass(frozen=True)
class Recovery:
    """What recovery trains and how. ``rates`` maps parameters (qualified name) to their peak learning rate.

    ``text`` weighs cross-entropy on the text against the KL. Without ``imitates`` it learns the text alone, and its
    guard is the cross-entropy too; ``before`` is not run then. ``accumulate`` batches make one step. Products with
    pretrained weights are of type ``products``, both programs'. Every one of ``processes`` trains on its share of each
    batch, with all parameters, or where ``shares_on`` says on what device with a share of each (the programs are
    anywhere then, and what is trained takes no place there).
    """

    before: Program
    after: Program
    rates: Mapping[str, float]
    accumulate: int = 1
    text: float = 0.0
    products: torch.dtype | None = None
    processes: Processes = ALONE
    imitates: bool = True
    shares_on: torch.device | None = None

    def loss(self, kl: Tensor, text: Tensor) -> Tensor:
        """Return what is to fall."""
        return kl + self.text * text if self.imitates else text


def own_parameters(program: Program, names: Iterable[str], *, copied: bool) -> None:
    """Give a program parameters of its own for ``names``, so that training it changes no other; tied ones stay so.

    Those that are not ``copied`` are over the same values, and not to be changed in place.
    """
    values = {id(value): value.detach() for value in (get_tensor(program.module, name) for name in names)}
    own = {key: value.clone() if copied else value for key, value in values.items()}
    retie(program.module, {n: own[id(value)] for n, value in named_tensors(program.module) if id(value) in own})


@dataclass
class RecoveryResult:
    """How it went: losses over the steps, the looks at the guard's ``texts``, the best step and the last."""

    curve: Curve
    texts: tuple[str, ...]
    looks: list[Look]
    best: int
    steps: int

    @property
    def guard(self) -> list[tuple[int, float]]:
        """The mean loss of the guard's texts at each look: step, nats a token."""
        return [(look.step, look.mean) for look in self.looks]


class _Pair(Protocol):
    """The two programs as they are run."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that an optimiser steps, by name."""

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the logits ``[B,T,V]`` of the original, None where nothing imitates it, and of the rewritten one."""

    def gathering(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients only add up, unless this is the last backward of a step."""

    def settle(self, best: Mapping[str, Tensor]) -> None:
        """Give the rewritten program the values that are to stay."""


class _Whole:
    """Programs that every process has all of."""

    def __init__(self, recovery: Recovery) -> None:
        named = dict(recovery.after.module.named_parameters())
        self.trained: Mapping[str, nn.Parameter] = {name: named[name] for name in recovery.rates}
        self._recovery = recovery
        self._teacher = Teacher(recovery.before, [(logits_node(recovery.before).name,)], recovery.products)
        narrow = narrowed(recovery.after, self._teacher.rounded, recovery.rates)
        self._student = recovery.processes.wrap(narrow)

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor]:
        after, batch, device = self._recovery.after, tokens.shape[0], tokens.device
        expected: dict[str, Tensor] = {}
        if self._recovery.imitates:
            self._teacher.run(tokens, positions, lambda _, values: expected.update(values))
        rest = (*after.nothing_fetched(batch, device), *after.new_state(batch, device))
        return next(iter(expected.values()), None), self._student(tokens, positions, *rest)[0]

    def gathering(self, last: bool) -> AbstractContextManager[None]:
        return self._recovery.processes.gathering(self._student, last)

    @torch.no_grad()
    def settle(self, best: Mapping[str, Tensor]) -> None:
        for name, value in best.items():
            self.trained[name].copy_(value)


class _Shared:
    """Programs of which every process has a share."""

    def __init__(self, recovery: Recovery, device: torch.device) -> None:
        from memc.train.sharding import Sharded

        before = recovery.before if recovery.imitates else None
        count, kind = recovery.processes.count, recovery.products
        self._recovery = recovery
        self._module = Sharded(before, recovery.after, recovery.rates, kind, device, count)
        self.trained: Mapping[str, nn.Parameter] = self._module.trained

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor | None, Tensor]:
        *expected, found = self._module(tokens, positions)
        return next(iter(expected), None), found

    def gathering(self, last: bool) -> AbstractContextManager[None]:
        """Gradients add up in the shares, since whole ones of everything would not fit."""
        return nullcontext()

    def settle(self, best: Mapping[str, Tensor]) -> None:
        named = dict(self._recovery.after.module.named_parameters())
        for name, value in best.items():
            named[name].data = whole(value).to(named[name].device)


@dataclass
class _Run:
    """The moving parts of one recovery."""

    recovery: Recovery
    pair: _Pair
    made: torch.optim.AdamW
    curve: Curve = field(default_factory=Curve)
    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def divergence(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean KL over the tokens that are no padding, and the mean cross-entropy of the next token."""
        real = positions >= 0
        expected, logits = self.pair(tokens, positions)
        found = logits.float().log_softmax(-1)
        text = _next_token(found, tokens, positions)
        if expected is None:
            return found.new_zeros(()), text
        given = expected.float().log_softmax(-1)
        return token_kl(given, found)[real].mean(), text

    @torch.no_grad()
    def look(self, step: int, guard: Guard) -> None:
        """Measure the guard's texts, and keep the parameters if they are the best so far."""
        processes, sums = self.recovery.processes, [0.0] * len(guard.texts)
        rows = list(zip(guard.text_of, *guard.rows, strict=True))
        # Processes that share parameters run equally often, be it for nothing.
        for first in range(0, len(rows), processes.count):
            own = first + processes.rank
            if own < len(rows) or self.recovery.shares_on is not None:
                index, tokens, positions = rows[min(own, len(rows) - 1)]
                kl, text = self.divergence(tokens[None], positions[None])
                sums[index] += float(kl if self.recovery.imitates else text) if own < len(rows) else 0.0
        totals = zip(processes.mean(sums), guard.texts, strict=True)
        look = Look(step, tuple(mean * processes.count / len(text.tokens) for mean, text in totals))
        require_finite("loss of the guard text", torch.tensor(look.mean), "recovery", step)
        self.looks.append(look)
        if not self.since_best:
            self.best = {name: parameter.detach().clone() for name, parameter in self.pair.trained.items()}

    @property
    def since_best(self) -> int:
        """Looks at the guard's texts since the best one."""
        return len(self.looks) - 1 - best_of(self.looks)


def _next_token(found: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the mean cross-entropy of the tokens that follow another of their document; 0 where there is none."""
    follows = _followed(positions)
    if not follows.any():
        return found.exp().sum() * 0.0  # whatever is infinite among the logarithms
    return functional.nll_loss(found[:, :-1][follows], tokens[:, 1:][follows])


def _followed(positions: Tensor) -> Tensor:
    """Mark the tokens ``[B,T-1]`` at ``positions [B,T]`` that another of their document follows."""
    return (positions[:, :-1] >= 0) & (positions[:, 1:] == positions[:, :-1] + 1)


def weights(positions: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the two means over a process's rows are weighed by, for the mean of all processes to be the batch's.

    Rows do not hold equally many tokens that are no padding, or that another one follows. ``own`` are the process's of
    the batch's ``positions [B,T]``.
    """
    count = len(positions) / len(own)
    read, followed = ([counted(part).sum() for part in (own, positions)] for counted in (lambda p: p >= 0, _followed))
    return count * read[0] / read[1].clamp_min(1), count * followed[0] / followed[1].clamp_min(1)


def recover(
    recovery: Recovery,
    batches: Batches,
    guard: Guard,
    schedule: Schedule,
    checkpoints: Checkpoints,
    progress: Progress,
) -> RecoveryResult:
    """Train in place for the schedule's steps or until the guard stops it; the best look's values stay.

    What stays is worse than the start on none of the guard's texts. Goes on from the newest checkpoint. Raises
    ``MemcError``: E403 when a loss is not finite, E502 when the disk is full.
    """
    named = dict(recovery.after.module.named_parameters())
    every = max(1, schedule.steps // GUARDS)
    with only(named, recovery.rates), progress.step("recover", schedule.steps) as advance:
        on = recovery.shares_on
        pair: _Pair = _Whole(recovery) if on is None else _Shared(recovery, on)
        groups = [{"params": [pair.trained[name]], "peak": rate} for name, rate in recovery.rates.items()]
        run = _Run(recovery, pair, optimiser(groups))
        step = _restore(run, checkpoints)
        recovery.processes.wait()  # nobody reads a checkpoint any more that the leader may remove
        advance(step)
        if not run.looks:
            run.look(step, guard)
        first, began = step, time.perf_counter()
        while run.since_best < PATIENCE and step < schedule.steps:
            tokens = _step(run, step, batches, schedule)
            step += 1
            advance(1, _summary(run, tokens * (step - first), began))
            if step % every == 0 or step == schedule.steps:
                run.look(step, guard)
            # What is shared out all write at once.
            if checkpoints.due if on is None else recovery.processes.from_leader(lambda: checkpoints.due):
                _save(run, checkpoints, step)
        _save(run, checkpoints, step)
        pair.settle(run.best)
    return RecoveryResult(run.curve, guard.names, run.looks, run.looks[best_of(run.looks)].step, step)


def _step(run: _Run, step: int, batches: Batches, schedule: Schedule) -> int:
    recovery, tokens = run.recovery, 0
    sums = {"kl": 0.0, "text": 0.0}
    for part in range(recovery.accumulate):
        batch = batches(step * recovery.accumulate + part)
        with run.pair.gathering(part + 1 == recovery.accumulate):
            own = recovery.processes.share(*batch)
            losses = run.divergence(*own)
            kl, text = (loss * weight for loss, weight in zip(losses, weights(batch[1], own[1]), strict=True))
            loss = recovery.loss(kl, text)
            require_finite("loss", loss, "recovery", step)
            (loss / recovery.accumulate).backward()
        sums["kl"] += float(kl.detach()) / recovery.accumulate
        sums["text"] += float(text.detach()) / recovery.accumulate
        tokens += batch[0].numel()
    step_optimiser(run.made, schedule.share(step), "recovery", step)
    sums = dict(zip(sums, recovery.processes.mean(list(sums.values())), strict=True))
    run.curve.add(step, sums, max(1, schedule.steps // POINTS))
    return tokens


def _summary(run: _Run, tokens: int, began: float) -> str:
    last = run.curve.last()
    name = "kl" if run.recovery.imitates else "text"
    loss = f"{name} {last[name]:.4f}, " if last else ""
    return f"{loss}guard {run.looks[-1].mean:.4f}, {tokens / (time.perf_counter() - began):.0f} tokens/s"


def _save(run: _Run, checkpoints: Checkpoints, step: int) -> None:
    tensors = {f"now.{name}": parameter.detach() for name, parameter in run.pair.trained.items()}
    tensors |= {f"best.{name}": value for name, value in run.best.items()}
    tensors |= optimiser_tensors("optimiser", run.made)
    checkpoints.save(
        step, tensors, {"curve": run.curve.to_json(), "looks": [[look.step, look.values] for look in run.looks]}
    )


def _restore(run: _Run, checkpoints: Checkpoints) -> int:
    found = checkpoints.load()
    if found is None:
        return 0
    step, tensors, facts = found
    trained = run.pair.trained
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(laid_out_as(parameter, tensors[f"now.{name}"]))
    run.best = {name: laid_out_as(parameter, tensors[f"best.{name}"]) for name, parameter in trained.items()}
    restore_optimiser("optimiser", run.made, tensors)
    run.curve = Curve.of(facts["curve"])
    run.looks = [Look(int(at), tuple(values)) for at, values in facts["looks"]]
    return step

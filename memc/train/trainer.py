"""From what a pass added, untrained, to a trained program: initialise, transfer, choose layers, recover."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memc.analysis import branches
from memc.analysis import layers as analysis
from memc.errors import MemcError
from memc.partial import write_whole
from memc.pipeline import Pass, PassReport, Plan
from memc.program import Program, get_tensor, set_tensor
from memc.progress import Progress
from memc.recipe import Train
from memc.report.files import (
    ChoiceFacts,
    CurveFacts,
    GuardFacts,
    RecoveryFacts,
    TrainedOnto,
    TrainingFacts,
    TransferFacts,
)
from memc.train.adapters import Adapter, add_adapters, attention_projections, block_projections, fold_adapters
from memc.train.device import CPU, lent, name_of, too_large
from memc.train.guard import Guard
from memc.train.loop import Batches, Checkpoints, Curve, Schedule
from memc.train.merge import merge_adapters
from memc.train.parallel import ALONE, Processes
from memc.train.recovery import Recovery, RecoveryResult, own_parameters, recover
from memc.train.transfer import Transfer

INITIAL = 4096
"""Tokens that first values are computed from."""

RANKED = 1024
"""Tokens that layers are ranked on."""

SILENCED = 4
"""Held-out sequences that branches are left out on: four runs of each."""

ADAPTER_SCALE = 2.0

Applied = tuple[Plan, Program, PassReport]

Apply = Callable[[Pass], Applied]
"""Plans and applies a pass to the program before, as the pipeline does."""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten program, the pass as it was resolved with what it reports, and what training was like, if any was.

    ``transferred`` is the program before recovery, whose own weights are still the original's.
    """

    pass_: Pass
    plan: Plan
    program: Program
    report: PassReport
    transferred: Program
    facts: TrainingFacts | None


@dataclass(frozen=True)
class Trainer:
    """Trains what passes add, and recovers what they took away, on given batches.

    ``tokens`` are shared between transfer and recovery as ``settings`` say; recovery has all of them where a pass added
    nothing, or what learns the text itself. ``batches`` of ``settings.batch`` sequences; ``guard`` is held out of them.
    ``key`` tells what the data and the model are. What trains computes on ``device``; programs come from the CPU and go
    back there. Of several ``processes`` all call :meth:`train` alike, and the one that leads writes.
    """

    settings: Train
    tokens: int
    batches: Batches
    guard: Guard
    seed: int
    key: Mapping[str, Any]
    products: torch.dtype | None
    progress: Progress
    processes: Processes = ALONE
    device: torch.device = CPU

    def train(self, pass_: Pass, before: Program, applied: Applied, apply: Apply, folder: Path | None) -> Rewritten:
        """Train what ``pass_`` added to ``before`` when it was ``applied``, or recover what it took away.

        With a ``folder`` a killed training goes on where it was. A pass that leaves open which blocks stay is settled
        by what restoring each one alone does. Raises ``MemcError``: E203 when the sequences are too short to teach
        anything, E403 when a loss is not finite, E502 when the disk is full, E204 for a checkpoint of another training.
        """
        if applied[2].learns:
            return self._taught(pass_, applied, folder)
        plan, after, report = applied
        if report.adapts:
            self._require_longer(pass_, report.exact)
        if not report.objectives:
            return self._recovered(pass_, before, applied, folder)
        self._require_longer(pass_, min(objective.exact for objective in report.objectives))
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        transfer = self._transfer(before, after, report, folder)
        facts = TrainingFacts(tokens=self.tokens, device=name_of(self.device), transfer=transfer)
        if (share := pass_.open_share()) is not None:
            facts.choice = self._choose(before, after, report, share, folder)
            pass_ = pass_.settle(facts.choice.kept)
            plan, small, report = apply(pass_)
            _copy_parameters(after, small, report)
            after = small
        transferred = after
        if self.recovery_steps:
            after, facts.recovery = self._recover(before, after, report, folder)
        if self.processes.leads:
            tokens, positions = (part[:SILENCED] for part in self.guard.to(self.device).rows)
            with self._lent(before, after):
                facts.branches = branches.measure_branches(
                    before, after, report.objectives, tokens, positions, self.progress
                )
        settled = replace(report, untrained=False, relations=pass_.trained_relations(plan))
        return Rewritten(pass_, plan, after, settled, transferred, facts)

    def _require_longer(self, pass_: Pass, exact: int) -> None:
        """Raise ``MemcError`` E203 where sequences have nothing to teach behind their first ``exact`` tokens."""
        if exact >= self.settings.length:
            reason = f"sequences of {self.settings.length} tokens teach nothing, the first {exact} are exact as it is"
            raise MemcError("E203", reason, pass_.spec, f"train: {{length: {4 * exact}}} in a recipe")

    def _recovered(self, pass_: Pass, before: Program, applied: Applied, folder: Path | None) -> Rewritten:
        """Win back through recovery alone what a pass took away or changed, or merge what was learned without it."""
        plan, after, report = applied
        done = Rewritten(pass_, plan, after, report, after, None)
        if not self.only_recovery_steps:
            return done
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        # Each process has fitted it for itself: machines that differ in the last bit would drift apart.
        shared = {id(value) for value in before.module.parameters()}
        self.processes.align(value.data for value in after.module.parameters() if id(value) not in shared)
        program, recovery = self._recover(before, after, report, folder)
        facts = TrainingFacts(tokens=self.tokens, device=name_of(self.device), recovery=recovery)
        settled = replace(report, untrained=report.untrained and not recovery.best_step)
        return replace(done, program=program, report=settled, facts=facts)

    def _taught(self, pass_: Pass, applied: Applied, folder: Path | None) -> Rewritten:
        """Teach what a pass added the text, everything else frozen. What was transferred is the program as it was.

        The texts that were given guard it, not what the original wrote.
        """
        plan, after, report = applied
        done = Rewritten(pass_, plan, after, report, after, None)
        if not self.only_recovery_steps:
            return done
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        began, settings, trained = time.perf_counter(), self.settings, after.copy()
        rates = dict.fromkeys(report.learns, settings.memory_rate)
        recovery = Recovery(
            after, trained, rates, settings.accumulate, 1.0, self.products, self.processes, imitates=False
        )
        given = replace(self, guard=self.guard.given)
        result = given._run(recovery, 0, self.only_recovery_steps, folder)
        facts = TrainingFacts(tokens=self.tokens, device=name_of(self.device))
        facts.recovery = _recovery_facts(result, settings, 0, "memory", time.perf_counter() - began)
        settled = replace(report, untrained=False, relations=pass_.trained_relations(plan))
        return replace(done, program=trained, report=settled, facts=facts)

    def _run(self, recovery: Recovery, first: int, steps: int, folder: Path | None) -> RecoveryResult:
        """Recover for some steps, whose first batch is ``first``, where training computes.

        What learns is the rewritten program's own from then on.
        """

        def later(step: int) -> tuple[Tensor, Tensor]:
            return self._batch(first + step)

        checkpoints = self._checkpoints(folder, "recovery")
        shared = self._shares_out(recovery)
        own_parameters(recovery.after, recovery.rates, copied=not shared)
        if shared:
            self.progress.note(f"{self.processes.count} processes hold a share of the parameters each")
            recovery = replace(recovery, shares_on=self.device)
        with lent(self.device, *(() if shared else (recovery.before, recovery.after))):
            guard = self.guard.to(self.device)
            return recover(recovery, later, guard, Schedule(steps), checkpoints, self.progress)

    def _shares_out(self, recovery: Recovery) -> bool:
        """Tell whether each process is to hold a share of the parameters; all processes come to the same answer."""
        learns = [get_tensor(recovery.after.module, name) for name in recovery.rates]
        found = partial(self._too_large, recovery.before, recovery.after, learns)
        return self.processes.count > 1 and self.processes.from_leader(found)

    def _too_large(self, before: Program, after: Program, learns: Sequence[Tensor] = ()) -> bool:
        return too_large(self.settings.shard, self.device, (before, after), self.products, learns)

    def _lent(self, before: Program, after: Program) -> AbstractContextManager[None]:
        """Lend programs to where training computes, weight by weight where they do not fit."""
        return lent(self.device, before, after, streams=self._too_large(before, after))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's batch where training computes."""
        tokens, positions = self.batches(step)
        return tokens.to(self.device), positions.to(self.device)

    @property
    def transfer_steps(self) -> int:
        """Steps of the transfer."""
        return round(self.tokens * self.settings.transfer) // (self.settings.batch * self.settings.length)

    @property
    def recovery_steps(self) -> int:
        """Steps of the recovery that follows transfer."""
        return self._recovery_steps(self.tokens * (1 - self.settings.transfer))

    @property
    def only_recovery_steps(self) -> int:
        """Steps of a recovery that has all of the tokens."""
        return self._recovery_steps(self.tokens)

    def _recovery_steps(self, tokens: float) -> int:
        return round(tokens) // (self.settings.batch * self.settings.length * self.settings.accumulate)

    def _transfer(self, before: Program, after: Program, report: PassReport, folder: Path | None) -> TransferFacts:
        with self._lent(before, after):
            return self._transfer_there(before, after, report, folder)

    def _transfer_there(
        self, before: Program, after: Program, report: PassReport, folder: Path | None
    ) -> TransferFacts:
        began, guard = time.perf_counter(), self.guard.to(self.device).rows
        transfer = Transfer(before, after, report.objectives, self.products, self.processes)
        checkpoints = self._checkpoints(folder, "transfer")
        path = folder / "transfer.json" if folder is not None else None
        begun = self.processes.from_leader(lambda: path is not None and path.is_file())
        if path is not None and begun:
            facts = TransferFacts.model_validate_json(path.read_text())
        else:
            facts = TransferFacts(steps=self.transfer_steps, tokens=0)
            facts.errors["untrained"] = transfer.errors(*guard)
            sequences = math.ceil(INITIAL / self.settings.length)
            with self.progress.step("first values in closed form"):
                transfer.initialise(*_sequences(self._batch, sequences))
            facts.errors["initial"] = transfer.errors(*guard)
        if path is not None and not begun and self.processes.leads:
            checkpoints.save(0, *transfer.start())
            write_whole(path, facts.model_dump_json() + "\n")
        self.processes.wait()
        schedule = Schedule(self.transfer_steps)
        facts.curve = _curve(
            transfer.train(self._batch, schedule, self.settings.rate, self.seed, checkpoints, self.progress)
        )
        facts.errors["trained"] = transfer.errors(*guard)
        facts.by_position = transfer.errors_by_position(*guard)
        facts.tokens = self.transfer_steps * self.settings.batch * self.settings.length
        facts.seconds = time.perf_counter() - began
        return facts

    def _choose(
        self, before: Program, after: Program, report: PassReport, share: float, folder: Path | None
    ) -> ChoiceFacts:
        """Choose the layers that stay; kept in ``folder`` so that it is done once, and by the leader alone."""
        return self.processes.from_leader(lambda: self._ranked(before, after, report, share, folder))

    def _ranked(
        self, before: Program, after: Program, report: PassReport, share: float, folder: Path | None
    ) -> ChoiceFacts:
        path = folder / "choice.json" if folder is not None else None
        if path is not None and path.is_file():
            return ChoiceFacts.model_validate_json(path.read_text())
        began = time.perf_counter()
        tokens, positions = _sequences(self._batch, math.ceil(RANKED / self.settings.length))
        with self._lent(before, after):
            ranking = analysis.rank_blocks(
                before, after, report.objectives, tokens, positions, self.products, self.progress
            )
        layers = [objective.layer for objective in report.objectives]
        facts = ChoiceFacts(
            kept=sorted(layers[index] for index in ranking.blocks[: round(share * len(layers))]),
            share=share,
            kl_nothing_restored=ranking.nothing,
            kl_restored_alone=dict(zip(layers, ranking.alone, strict=True)),
            seconds=time.perf_counter() - began,
        )
        if path is not None:
            write_whole(path, facts.model_dump_json() + "\n")
        return facts

    def _recover(
        self, before: Program, after: Program, report: PassReport, folder: Path | None
    ) -> tuple[Program, RecoveryFacts]:
        began, settings = time.perf_counter(), self.settings
        new = [name for objective in report.objectives for name in objective.parameters.values()]
        adapters: list[Adapter] = []
        trained = after.copy()
        if settings.adapters:
            # Blocks are found in the program before: what was rewritten is no block any more, its projections are.
            # What was only made smaller is still one, and feed-forward blocks too have something to win back.
            rewritten = bool(report.objectives) or report.adapts
            projections = attention_projections(before) if rewritten else block_projections(after)
            trained, adapters = add_adapters(after, projections, settings.adapters, ADAPTER_SCALE, self.seed)
            others = [name for adapter in adapters for name in (adapter.down, adapter.up)]
        else:
            floats = [n for n, p in trained.module.named_parameters() if p.is_floating_point()]
            others = [name for name in floats if name not in set(new)]
            for name, source in trained.provenance.items():
                if source.source:
                    trained.provenance[name] = replace(source, transform="trained", invertible=False)
        rates = dict.fromkeys(others, settings.adapter_rate) | dict.fromkeys(new, settings.memory_rate)
        merges = settings.onto == "original"
        recovery = Recovery(
            before,
            trained,
            rates,
            settings.accumulate,
            settings.text,
            self.products,
            self.processes,
            imitates=not merges,
        )
        first, steps = (
            (self.transfer_steps, self.recovery_steps) if report.objectives else (0, self.only_recovery_steps)
        )
        result = self._run(recovery, first, steps, folder)
        facts = _recovery_facts(result, settings, settings.adapters, settings.onto, time.perf_counter() - began)
        if merges:
            return merge_adapters(before, after, trained, adapters), facts
        folded = fold_adapters(after, trained, adapters) if adapters else trained
        for name in new:
            set_tensor(folded.module, name, get_tensor(trained.module, name).detach())
        return folded, facts

    def _checkpoints(self, folder: Path | None, stage: str) -> Checkpoints:
        key = {**self.key, "stage": stage, "tokens": self.tokens, "seed": self.seed, **self.settings.model_dump()}
        return Checkpoints(folder / stage if folder is not None else None, key, writes=self.processes.leads)


def _recovery_facts(
    result: RecoveryResult, settings: Train, rank: int, onto: TrainedOnto, seconds: float
) -> RecoveryFacts:
    return RecoveryFacts(
        steps=result.steps,
        tokens=result.steps * settings.accumulate * settings.batch * settings.length,
        adapter_rank=rank,
        onto=onto,
        curve=_curve(result.curve),
        guard_kl=result.guard,
        guard_texts=[
            GuardFacts(name=name, kl=[(look.step, look.values[index]) for look in result.looks])
            for index, name in enumerate(result.texts)
        ],
        best_step=result.best,
        seconds=seconds,
    )


def _curve(curve: Curve) -> CurveFacts:
    return CurveFacts(steps=curve.steps, losses=curve.losses)


def _sequences(batches: Batches, count: int) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` sequences of the training."""
    tokens, positions = batches(0)
    step = 1
    while len(tokens) < count:
        more = batches(step)
        tokens, positions = torch.cat([tokens, more[0]]), torch.cat([positions, more[1]])
        step += 1
    return tokens[:count], positions[:count]


@torch.no_grad()
def _copy_parameters(source: Program, result: Program, report: PassReport) -> None:
    """Give the blocks of ``result`` what those of the same name learned in ``source``."""
    for objective in report.objectives:
        for name in objective.parameters.values():
            set_tensor(result.module, name, get_tensor(source.module, name).detach())

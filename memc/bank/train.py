"""``memc bank train``: blocks learn the passages of their own cluster beside the frozen model (arXiv 2510.02375).

Every subtree below the root is a job of its own, and so is the generic block, which learns all passages. Jobs depend on
nothing that another one learns, so that they can be trained one after the other, in several processes, or on several
machines; what they learned is put into the bank in the end.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from memc.bank.bank import Bank
from memc.bank.layout import BankShape, Cluster, name
from memc.bank.learner import Learner, next_tokens
from memc.bank.manifest import RECORDS, TREE
from memc.bank.records import RecordFile, write_records
from memc.bank.sequences import PackedSequence, held_out, pack
from memc.conversion.folder import require_space
from memc.errors import MemcError
from memc.partial import write_whole
from memc.progress import Progress
from memc.report.models.banks import BankJob
from memc.train.device import CPU
from memc.train.loop import (
    Checkpoints,
    Curve,
    Schedule,
    optimiser,
    optimiser_tensors,
    require_finite,
    restore_optimiser,
    step_optimiser,
)
from memc.train.parallel import ALONE, Processes

FOLDER = "training"
"""Where a bank keeps checkpoints, and of each job that is done its records and what it was like."""

POINTS = 20

Start = Literal["random", "generic"]


@dataclass(frozen=True)
class TrainOptions:
    """How blocks are trained.

    Each passage comes ``epochs`` times, in sequences of ``length`` tokens; ``rate`` is the peak learning rate;
    ``held_out`` the share of each source's passages that nothing learns. ``start`` says what a cluster's blocks are at
    first: random, or what the generic block has learned, which then has to be trained before.
    """

    epochs: int = 1
    length: int = 256
    rate: float = 1e-2
    held_out: float = 0.05
    seed: int = 0
    start: Start = "random"


@dataclass
class _Blocks:
    """The blocks of one job, made when their first sequence comes, each with an optimiser of its own."""

    learner: Learner
    options: TrainOptions
    scale: Tensor
    generic: Tensor | None = None
    parameters: dict[Cluster, torch.nn.Parameter] = field(default_factory=dict)
    optimisers: dict[Cluster, torch.optim.AdamW] = field(default_factory=dict)

    def path(self, cluster: Cluster, generic: bool) -> list[Cluster]:
        """Return the clusters whose blocks a sequence of ``cluster`` trains; new ones get their first values."""
        storing = self.learner.shape.storing()
        wanted: list[Cluster] = [()] if generic else [cluster[: level + 1] for level in storing]
        for each in wanted:
            if each not in self.parameters:
                self._add(each, self._first(each))
        return wanted

    def _first(self, cluster: Cluster) -> Tensor:
        """Return a block before it is trained: random, or its level's units of the generic one."""
        if cluster == () or self.generic is None:
            return self.learner.first_values(cluster, self.options.seed, self.scale)
        ranks, level = self.learner.shape.ranks, len(cluster) - 1
        return self.generic[:, :, sum(ranks[:level]) : sum(ranks[: level + 1])].clone()

    def _add(self, cluster: Cluster, value: Tensor) -> None:
        parameter = torch.nn.Parameter(value.to(self.learner.device))
        self.parameters[cluster] = parameter
        self.optimisers[cluster] = optimiser([{"params": [parameter], "peak": self.options.rate}])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that a checkpoint has to hold, by name."""
        found: dict[str, Tensor] = {}
        for cluster, parameter in self.parameters.items():
            found[f"block.{name(cluster)}"] = parameter.detach()
            found |= optimiser_tensors(f"optimiser.{name(cluster)}", self.optimisers[cluster])
        return found

    def restore(self, tensors: dict[str, Tensor], clusters: Sequence[Sequence[int]]) -> None:
        """Take back what :meth:`tensors` gave."""
        for cluster in map(tuple, clusters):
            self._add(cluster, tensors[f"block.{name(cluster)}"].clone())
            restore_optimiser(f"optimiser.{name(cluster)}", self.optimisers[cluster], tensors)


def train_bank(
    bank: Bank,
    learner: Learner,
    options: TrainOptions,
    progress: Progress,
    *,
    only: Sequence[Cluster] | None = None,
    fresh: bool = False,
    processes: Processes = ALONE,
    device: torch.device = CPU,
    products: torch.dtype | None = None,
) -> list[BankJob]:
    """Train the jobs of a bank, ``only`` some of them, and put what they learned into it.

    The model computes on ``device``, and its own products in the type of ``products``, None for that of its weights.

    A job is a cluster of the first level, or ``()`` for the generic block; a cluster all of whose passages are held out
    is left untrained where it is not asked for. What is done already is not done again;
    what was interrupted goes on. Of several ``processes`` each takes every so many-th job; the leader writes the bank
    and returns what all of them did. Where clusters start from the generic block it goes first, by the leader. Raises
    ``MemcError``: E200 where there is none to start from, E204 for checkpoints of another training without ``fresh``,
    E206 for sequences longer than the model takes, E207 for a job without passages, E403 for values that are not
    finite, E502 for too little disk.
    """
    limit = learner.program.model.longest
    if limit is not None and options.length > limit:
        reason = f"sequences of {options.length} tokens are past the model's {limit} positions"
        raise MemcError("E206", reason, "--length", f"--length {limit}")
    training = _Training(bank, learner, options, progress, fresh, device, products)
    jobs = [job for job in all_jobs(bank) if training.members(job).any()] if only is None else list(only)
    _require_disk(bank, jobs)
    first = [()] if options.start == "generic" and () in jobs else []
    if processes.leads:
        for job in first:
            training.job(job)
    processes.wait()
    shared = [job for job in jobs if job not in first]
    done = [training.job(job) for job in shared[processes.rank :: processes.count]]
    processes.wait()
    if not processes.leads:
        return done
    merge_jobs(bank)
    found = map(training.done, jobs)
    return [facts for facts in found if facts is not None]


def all_jobs(bank: Bank) -> list[Cluster]:
    """Return the jobs of a bank: the clusters of the first level that have passages, and the generic block."""
    return [*((int(number),) for number in np.flatnonzero(bank.tree.counts[0])), ()]


def parse_job(text: str, bank: Bank) -> Cluster:
    """Read a job as it is written: the number of a cluster of the first level, or ``generic``.

    Raises ``MemcError`` E200 for anything else.
    """
    text = text.strip()
    if text == name(()):
        return ()
    if text.isdecimal() and int(text) < bank.shape.branch and bank.tree.counts[0][int(text)]:
        return (int(text),)
    known = ", ".join(map(name, all_jobs(bank)))
    raise MemcError("E200", f"the bank has no job {text!r}", "--only", f"give some of {known}")


def merge_jobs(bank: Bank) -> None:
    """Put the records that jobs have written into the bank's file, in one rename.

    Those of other machines too, where somebody has put their files into the folder. Raises ``MemcError`` E310 for
    records of another bank.
    """
    files = [RecordFile(path) for path in sorted((bank.folder / FOLDER).glob("*.bank"))]
    for file in files:
        if file.shape != bank.shape:
            raise MemcError("E310", "trained blocks are of another bank", str(file.path), "remove them")
    if files:
        write_records(bank.folder / RECORDS, bank.shape, _merged(bank.shape, [*files, bank.records]))
        bank.reopen()
    for file in files:
        file.close()


def _merged(shape: BankShape, files: Sequence[RecordFile]) -> Iterator[tuple[Cluster, Any]]:
    """Yield each cluster's record of the first file that has it, in the order of the bank."""
    for level in (-1, *shape.storing()):
        for cluster in shape.all_clusters(level):
            file = next((file for file in files if file.trained(cluster)), None)
            if file is not None:
                yield cluster, file.read(cluster)


def _require_disk(bank: Bank, jobs: Sequence[Cluster]) -> None:
    """Raise ``MemcError`` E502 where the blocks that are to be trained cannot be written twice, beside checkpoints."""
    shape = bank.shape
    below = sum(shape.level_bytes(level) // shape.branch for level in shape.storing()) * 4 // shape.itemsize
    require_space(bank.folder, 5 * below * len(jobs))


class _Training:
    """What the jobs of one training share."""

    def __init__(
        self,
        bank: Bank,
        learner: Learner,
        options: TrainOptions,
        progress: Progress,
        fresh: bool,
        device: torch.device,
        products: torch.dtype | None,
    ) -> None:
        self.bank, self.learner, self.options, self.progress, self.fresh = bank, learner, options, progress, fresh
        self.device, self.products = device, products
        self.folder = bank.folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.chosen = ~held_out(bank.passages, options.held_out)
        facts = {"tree": bank.manifest.files[TREE], "model": learner.program.model.digest}
        self._shared = {**facts, "passages": len(bank.passages), **asdict(options)}

    def job(self, job: Cluster) -> BankJob:
        """Train a job, unless that is done, and write its records and what it was like."""
        place = self.folder / name(job)
        if self.fresh:
            shutil.rmtree(place, ignore_errors=True)
            self._facts(job).unlink(missing_ok=True)
        if (found := self.done(job)) is not None:
            return found
        generic, key = self._start(job)[0], self._key(job)
        mine, sequences = self._sequences(job)
        scale, began = self.learner.input_scale(sequences), time.perf_counter()
        with self.learner.learning(self.device, self.products) as learner:
            blocks = _Blocks(learner, self.options, scale, generic)
            curve = _run(blocks, sequences, job, Checkpoints(place, {**key, "job": name(job)}), self.progress)
        records = {
            cluster: parameter.detach().cpu().numpy() for cluster, parameter in sorted(blocks.parameters.items())
        }
        write_records(self.folder / f"{name(job)}.bank", self.bank.shape, records.items())
        losses = curve.losses.get("text", [])
        facts = BankJob(
            job=name(job),
            passages=mine,
            blocks=len(records),
            steps=self.options.epochs * len(sequences),
            tokens=self.options.epochs * sum(map(next_tokens, sequences)),
            loss_first=losses[0] if losses else None,
            loss_last=losses[-1] if losses else None,
            seconds=time.perf_counter() - began,
        )
        write_whole(self._facts(job), json.dumps({"key": key, "facts": facts.model_dump()}) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        return facts

    def done(self, job: Cluster) -> BankJob | None:
        """Return what a job was like that is done. Raises ``MemcError`` E204 for one of another training."""
        path = self._facts(job)
        if not path.is_file():
            return None
        kept, key = json.loads(path.read_text()), self._key(job)
        if kept["key"] != key:
            differ = [each for each in key if kept["key"].get(each) != key[each]]
            reason = f"{name(job)} is trained already, with another {', '.join(differ)}"
            raise MemcError("E204", reason, str(path), "add --fresh to train it again")
        return BankJob.model_validate(kept["facts"])

    def _facts(self, job: Cluster) -> Path:
        return self.folder / f"{name(job)}.json"

    def _start(self, job: Cluster) -> tuple[Tensor | None, str]:
        """Return the block that a job's own ones start from, None for random ones, and what tells it from others."""
        return (None, "random") if job == () or self.options.start == "random" else self._generic

    @cached_property
    def _generic(self) -> tuple[Tensor, str]:
        """The generic block, which is trained before anything asks for it, and its digest.

        Raises ``MemcError`` E200 where it is not trained.
        """
        path = self.folder / f"{name(())}.bank"
        file = RecordFile(path) if path.is_file() else self.bank.records
        if not file.trained(()):
            reason = "the generic block, which the others start from, is not trained"
            raise MemcError("E200", reason, "--start generic", "add generic to --only, or give --start random")
        block = torch.from_numpy(file.read(()).copy())
        if file is not self.bank.records:
            file.close()
        return block, xxhash.xxh3_128_hexdigest(block.numpy().tobytes())

    def _key(self, job: Cluster) -> dict[str, Any]:
        """Return what a job's result depends on; what it starts from by its digest."""
        return {**self._shared, "start": self._start(job)[1]}

    def members(self, job: Cluster) -> npt.NDArray[np.bool_]:
        """Tell of each passage whether a job learns it."""
        return self.chosen if job == () else self.chosen & (self.bank.passages.clusters[:, 0] == job[0])

    def _sequences(self, job: Cluster) -> tuple[int, list[PackedSequence]]:
        """Return how many passages a job has, and their sequences."""
        passages, options, mine = self.bank.passages, self.options, self.members(job)
        encode = self.learner.text.encode
        found = list(pack(passages, self.bank.shape, mine, encode, options.length, options.seed))
        if not found:
            where = str(self.bank.folder)
            raise MemcError("E207", f"cluster {name(job)} has no passages to train on", where, "give another job")
        return int(mine.sum()), found


def _run(
    blocks: _Blocks, sequences: Sequence[PackedSequence], job: Cluster, checkpoints: Checkpoints, progress: Progress
) -> Curve:
    """Train in the order that the seed gives, a sequence a step; go on from the newest checkpoint."""
    options, steps = blocks.options, blocks.options.epochs * len(sequences)
    rngs = [np.random.default_rng([options.seed, job[0] + 1 if job else 0, epoch]) for epoch in range(options.epochs)]
    order = np.concatenate([rng.permutation(len(sequences)) for rng in rngs])
    schedule, curve, step = Schedule(steps), Curve(), 0
    if (found := checkpoints.load()) is not None:
        step, tensors, facts = found
        blocks.restore(tensors, facts["clusters"])
        curve = Curve.of(facts["curve"])
    with progress.step(f"train {name(job)}", steps) as advance:
        advance(step)
        while step < steps:
            sequence = sequences[int(order[step])]
            loss = _step(blocks, sequence, job, schedule.share(step), step)
            curve.add(step, {"text": loss}, max(1, steps // POINTS))
            step += 1
            advance(1, f"loss {loss:.3f}")
            if checkpoints.due:
                clusters = list(map(list, blocks.parameters))
                checkpoints.save(step, blocks.tensors(), {"clusters": clusters, "curve": curve.to_json()})
    return curve


def _step(blocks: _Blocks, sequence: PackedSequence, job: Cluster, share: float, step: int) -> float:
    path = blocks.path(sequence.cluster, generic=job == ())
    block = torch.cat([blocks.parameters[cluster] for cluster in path], dim=2)
    loss = blocks.learner.loss(sequence, block) / next_tokens(sequence)
    require_finite("loss", loss, name(job), step)
    loss.backward()
    for cluster in path:
        step_optimiser(blocks.optimisers[cluster], share, name(job), step)
    return float(loss.detach())

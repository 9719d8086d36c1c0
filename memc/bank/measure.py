"""How well a trained bank does on the passages that were held out: without a block, with theirs, with others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memc.bank.bank import Bank
from memc.bank.layout import Cluster
from memc.bank.learner import Learner, next_tokens
from memc.bank.sequences import PackedSequence, held_out, pack
from memc.bank.train import TrainOptions
from memc.bank.tree import TreePath
from memc.progress import Progress
from memc.report.models.banks import BankHeldOut, BankJob, BankTrainDocument

SEQUENCES = 8
"""Most held-out sequences of each cluster of the first level that are looked at."""


def measure_bank(
    bank: Bank, learner: Learner, options: TrainOptions, jobs: list[BankJob], progress: Progress
) -> BankTrainDocument:
    """Measure the perplexity of held-out passages with the block of their own cluster, and without and with others.

    The wrong block is that of the next cluster of the first level.
    """
    encode = learner.text.encode
    chosen = held_out(bank.passages, options.held_out)
    rows: list[BankHeldOut] = []
    trained = [job for job in jobs if job.job != "generic"]
    with progress.step("measure held-out passages", len(trained)) as advance:
        for job in trained:
            mine = chosen & (bank.passages.clusters[:, 0] == int(job.job))
            sequences = list(pack(bank.passages, bank.shape, mine, encode, options.length, options.seed))[:SEQUENCES]
            if sequences:
                rows.append(_measure(bank, learner, job.job, sequences))
            advance(1, f"cluster {job.job}")
    return BankTrainDocument(bank=str(bank.folder), jobs=jobs, held_out=rows)


def _measure(bank: Bank, learner: Learner, job: str, sequences: list[PackedSequence]) -> BankHeldOut:
    wrong = _next_cluster(bank, sequences[0].cluster)
    generic = bank.records.trained(())
    blocks: dict[str, Callable[[PackedSequence], Tensor | None]] = {
        "original": lambda sequence: None,
        "block": lambda sequence: _block(bank, sequence.cluster),
    }
    if generic:
        blocks["generic"] = lambda sequence: torch.from_numpy(bank.records.read(()).copy())
    if wrong is not None:
        blocks["wrong"] = lambda sequence: _block(bank, wrong)
    count = sum(map(next_tokens, sequences))
    found: dict[str, float] = {}
    with torch.no_grad():
        for side, block in blocks.items():
            total = sum(float(learner.loss(sequence, block(sequence))) for sequence in sequences)
            found[side] = math.exp(total / count)
    return BankHeldOut(cluster=job, tokens=count, **found)


def _block(bank: Bank, cluster: Cluster) -> Tensor:
    levels = len(cluster)
    return torch.tensor(bank.fetch(TreePath(cluster, (0.0,) * levels, levels)))


def _next_cluster(bank: Bank, cluster: Cluster) -> Cluster | None:
    """Return the largest cluster of the same level below the next trained cluster of the first level."""
    shape, level = bank.shape, len(cluster) - 1
    per = shape.branch**level
    counts = bank.tree.counts[level].reshape(shape.branch, per)
    for step in range(1, shape.branch):
        top = (cluster[0] + step) % shape.branch
        best = int(counts[top].argmax())
        wrong = shape.cluster(level, top * per + best)
        if counts[top].any() and any(bank.records.trained(wrong[: n + 1]) for n in shape.storing()):
            return wrong
    return None

"""Training as a part of conversion: from the recipe's data to batches, and what is reported of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memc.conversion.text import read_streams
from memc.data import Corpus, Sequences, TokenStream
from memc.errors import MemcError
from memc.pipeline import Pass
from memc.program import Program
from memc.progress import Progress
from memc.recipe import Recipe, Train
from memc.report.models import PassFacts
from memc.tensor_file import read_tensors, write_tensors
from memc.train import Trainer
from memc.train.device import accelerator, lent, products_on, too_large
from memc.train.guard import OWN, Guard, GuardText
from memc.train.parallel import ALONE, Processes
from memc.verify import VerificationText, sample_text

TOKENS = 200_000
"""Tokens that are trained on unless the recipe says how many."""

SAMPLED = {"cpu": 64, "cuda": 1024}
"""Most sequences that are sampled from the original: on a CPU sampling takes longer a token than training on it, while
a GPU samples many sequences as fast as few."""

GUARD_ROWS = 8
"""Held-out sequences that training looks at, and as many that verification does: alike of every text, and of many texts
at least one of each that holds out any."""


@dataclass(frozen=True)
class TrainingData:
    """What a conversion trains on, and what it holds out: for the training to look at, and for verification."""

    corpus: Corpus
    sequences: Sequences
    guard: Guard
    text: VerificationText
    tokens: int


def trains(recipe: Recipe, passes: Sequence[Pass]) -> bool:
    """Tell whether a conversion trains: it has data, and tokens are not 0.

    Raises ``MemcError`` E203 for an option that only training can settle when there is none.
    """
    if recipe.data and recipe.tokens != 0:
        return True
    for pass_ in passes:
        if option := pass_.needs_training():
            lacks = "tokens are 0" if recipe.data else "there are no data"
            hint = f"add {'--tokens N' if recipe.data else '--data FILE'}, or name the layers"
            raise MemcError("E203", f"{option} is settled by training, for which {lacks}", pass_.spec, hint)
    return False


def require_shareable(recipe: Recipe, training: bool, processes: Processes) -> None:
    """Raise ``MemcError`` E200 when several processes have nothing to share, or a batch that they cannot."""
    if processes.count > 1 and not training:
        reason = f"{processes.count} processes share the training, and there is none"
        raise MemcError("E200", reason, next="start memc without torchrun, or add --data FILE")
    processes.require_even((recipe.train or Train()).batch)


def require_mergeable(recipe: Recipe, training: bool, planned: Sequence[PassFacts]) -> None:
    """Raise ``MemcError`` E203 where adapters are asked for ``onto`` the original and there is none, or no place there.

    They are trained where a pass took something away, and what one adds, or makes another function of, is nothing that
    the original has.
    """
    settings = recipe.train or Train()
    if settings.onto != "original":
        return
    own = {"transfer": "adds parameters", "text": "adds parameters", "recovery": "is trained as another function"}
    where, adding = "train: onto", [(facts.spec, own[x]) for facts in planned for x in facts.trains if x in own]
    if adding:
        reason = f"{adding[0][0]} {adding[0][1]}, which the original has no place for"
        raise MemcError("E203", reason, where, "onto: result, or leave that pass out")
    if not training or not settings.adapters:
        lacks = "adapters are 0" if not settings.adapters else "nothing is trained"
        hint = "a rank of 1 or more" if not settings.adapters else "add --data FILE (and no --tokens 0), and prune"
        raise MemcError("E203", f"adapters are to be merged into the original, and {lacks}", where, hint)


def training_data(
    recipe: Recipe, original: Program, folder: Path, progress: Progress, *, transfers: bool = True
) -> TrainingData:
    """Read the recipe's data through the cache of tokens, sample from the original, and split off what is held out.

    ``folder`` is ``OUT.partial``, which holds the tokenizer and keeps the samples; ``transfers`` tells that a pass adds
    parameters. Raises ``MemcError``: E206 for sequences longer than the model takes, E207 for data that cannot be used
    or are too few for the tokens asked for, or tokens too few for a step, E308 when there is no tokenizer for text.
    """
    settings = recipe.train or Train()
    limit = original.model.longest
    if limit is not None and settings.length > limit:
        reason = f"sequences of {settings.length} tokens are past the model's {limit} positions"
        raise MemcError("E206", reason, "train: length", f"train: {{length: {limit}}} in a recipe")
    streams = read_streams(recipe, original, folder, progress)
    own = Corpus(streams, guard=settings.guard, block=settings.length)
    available = len(own.sequences(settings.length)) * settings.length
    tokens = recipe.tokens or min(TOKENS, available)
    if tokens < (least := _least(settings, transfers)):
        hint = "give more --tokens (0 for no training) and --data, or shorter sequences (train: length in a recipe)"
        raise MemcError("E207", f"{tokens} tokens to train on, the first step needs {least}", own.where, hint)
    if (needed := round(tokens * (1 - settings.sampled))) > available:
        reason = f"{tokens} tokens are asked for, {needed} of them from the data, which give {available}"
        hint = f"give more --data, or --tokens {int(available / (1 - settings.sampled))}"
        raise MemcError("E207", reason, own.where, hint)
    corpus = own
    if settings.sampled:
        sampled = _sampled(recipe, original, folder, settings, tokens, progress)
        shares = [1 - settings.sampled, settings.sampled]
        corpus = Corpus([streams, sampled], shares, guard=settings.guard, block=settings.length)
    guard, text = _held_out(corpus, settings.length)
    return TrainingData(corpus, corpus.sequences(settings.length, recipe.seed), guard, text, tokens)


def _held_out(corpus: Corpus, length: int) -> tuple[Guard, VerificationText]:
    """Split what each text holds out between the guard of the training and verification, the guard first."""
    each = max(1, GUARD_ROWS // len(corpus.guards(length, 1)))
    held = corpus.guards(length, 2 * each)
    guard, rows = [], []
    for name, batch in held:
        tokens, positions = (torch.from_numpy(part) for part in batch)
        guard.append(GuardText(name, tokens[::2].contiguous(), positions[::2].contiguous()))
        rows.append(tokens[1::2])
    # A single held-out sequence has to do for both.
    verified = torch.cat(rows) if any(map(len, rows)) else guard[0].tokens
    return Guard(tuple(guard)), VerificationText(verified, f"{len(verified)} sequences of {corpus.where}")


def make_trainer(
    recipe: Recipe, data: TrainingData, original: Program, progress: Progress, processes: Processes = ALONE
) -> Trainer:
    """Return what trains the passes of a conversion."""
    settings = recipe.train or Train()

    def batches(step: int) -> tuple[Tensor, Tensor]:
        tokens, positions = data.sequences.batch(step, settings.batch)
        return torch.from_numpy(tokens), torch.from_numpy(positions)

    key = {"model": original.model.digest, "data": data.corpus.digest}
    device = accelerator(processes.rank)
    narrow = products_on(device)
    return Trainer(settings, data.tokens, batches, data.guard, recipe.seed, key, narrow, progress, processes, device)


def _least(settings: Train, transfers: bool) -> int:
    """Return the tokens of which the share of transfer, or else of recovery, makes one step.

    Passes that have nothing to transfer make a step of recovery of all of the tokens.
    """
    step = settings.batch * settings.length
    transfer = settings.transfer if transfers else 0.0
    shares = (transfer, step), (1 - transfer, step * settings.accumulate)
    return min(math.ceil(size / share) for share, size in shares if share)


def _sampled(
    recipe: Recipe, original: Program, folder: Path, settings: Train, tokens: int, progress: Progress
) -> TokenStream:
    path = folder / "report" / "sampled.safetensors"
    if not path.is_file():
        device = accelerator()
        count = max(4, min(SAMPLED[device.type], round(tokens * settings.sampled / settings.length)))
        title = f"sample {count} sequences of {settings.length} tokens from the original"
        streams = too_large(settings.shard, device, [original], None)
        with progress.step(title), lent(device, original, streams=streams):
            text = sample_text(original, recipe.seed, sequences=count, length=settings.length)
        write_tensors(path, {"tokens": text.tokens})
    rows = read_tensors(path)["tokens"]
    return TokenStream.of([row.numpy() for row in rows], OWN)

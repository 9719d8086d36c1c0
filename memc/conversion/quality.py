"""How good a trained artifact is, measured against the original on text that nothing was trained on, and on recall."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest
from memc.backend import Backend, LowerOptions, Runner
from memc.conversion.lowering import lower
from memc.data import Corpus
from memc.errors import MemcError
from memc.evaluate import parse_tasks
from memc.evaluate.measure import measure_tasks, measure_text
from memc.plugins import load_plugin
from memc.program import Program
from memc.progress import Progress
from memc.report.models import EvalDocument, EvalSide
from memc.runtime import Session
from memc.target import get_target

WINDOWS = (0.5, 2, 8, 32)
"""Lengths of context that perplexity is measured in, in windows of the rewritten layers."""

WINDOW = 64
"""The window of those lengths where no rewritten layer has one."""

LONGEST = 2048
"""Longest of them: the original's attention takes time that grows with its square."""

TOKENS = 2048
NEW_TOKENS = 64
TASKS = "passkey,copy"
TASKS_OF_IDS = "copy"
"""What a model without a tokenizer is asked."""

SAMPLES = 2


def measure_quality(
    original: Program,
    manifest: Manifest,
    runner: Runner,
    corpus: Corpus,
    window: int,
    folder: Path,
    seed: int,
    progress: Progress,
) -> EvalDocument:
    """Compare what was lowered with the original: perplexity and divergence, free-running text, recall.

    Text is from what ``corpus`` holds out. ``folder`` is ``OUT.partial``; the original is run by the eager backend.
    """
    limits = [LONGEST, manifest.capacity or LONGEST, original.model.max_positions or LONGEST]
    windows = sorted({min(round(factor * window), *limits) for factor in WINDOWS} - {0, 1})
    ids = _held_out(corpus, windows)
    place = folder / "original"
    eager: Backend = load_plugin("memc.backends", "eager")()
    try:
        place.mkdir(exist_ok=True)
        _, described = lower(original, eager, get_target("cpu"), place, LowerOptions("fp32"))
        for file in folder.glob("tokenizer*"):
            shutil.copyfile(file, place / file.name)
        sides = {
            "a": Session(folder, manifest, runner),
            "b": Session(place, described, eager.load(place, described)),
        }
        document = EvalDocument(
            sides={"a": EvalSide(source="converted"), "b": EvalSide(source="original")}, text=corpus.where
        )
        measure_text(document, sides, ids, [n for n in windows if n <= len(ids)], NEW_TOKENS, progress)
        length = min(8 * window, *limits) // 2
        tasks = TASKS if (folder / "tokenizer.json").is_file() else TASKS_OF_IDS
        try:
            measure_tasks(document, sides, parse_tasks(tasks), [length], SAMPLES, seed, progress)
        except MemcError as error:  # a vocabulary or a capacity too small to be asked
            document.warnings.append(f"recall is not measured: {error.message}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return document


def _held_out(corpus: Corpus, windows: list[int]) -> npt.NDArray[np.int64]:
    """Return at most ``TOKENS`` held-out tokens, in stretches as long as the longest window where the data allow."""
    for length in sorted(windows, reverse=True):
        try:
            return corpus.guard(length, max(1, TOKENS // length)).tokens.reshape(-1)
        except MemcError:
            continue
    return corpus.guard(min(windows)).tokens.reshape(-1)

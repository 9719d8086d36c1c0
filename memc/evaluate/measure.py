"""What ``memc eval`` measures, written into its document; the last of the sides is the reference of the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.evaluate.free_running import free_running
from memc.evaluate.perplexity import Comparison, PerplexityResult, compare, perplexity
from memc.evaluate.score import Cell, run_tasks, words_of
from memc.evaluate.tasks import Task
from memc.progress import Progress
from memc.report import models as m

if TYPE_CHECKING:
    from memc.runtime import Session

NEW_TOKENS = 256
"""Tokens of a free-running continuation unless the user says how many."""


def measure_text(
    document: m.EvalDocument,
    sessions: Mapping[str, Session],
    ids: npt.NDArray[np.integer],
    windows: Sequence[int],
    new_tokens: int | None,
    progress: Progress,
) -> None:
    """Measure perplexity in windows of several lengths and, of two sides, how far they are apart.

    ``new_tokens`` of a free-running continuation: 0 for none, None for ``NEW_TOKENS`` where they fit. Raises
    ``MemcError`` as ``perplexity``, ``compare`` and ``free_running``.
    """
    a, b = sessions["a"], sessions.get("b")
    for window in sorted(windows, reverse=True):  # the longest first: what is past the capacity is told at once
        if window > len(ids):
            document.warnings.append(f"the text has {len(ids)} tokens: no window of {window} is full")
        with progress.step(f"predicting {len(ids)} tokens in windows of {window}"):
            if b is None:
                _note_side(document.sides["a"], window, perplexity(a, ids, window))
            else:
                _note_both(document, window, compare(a, b, ids, window))
    document.by_context.sort(key=lambda row: row.context)
    for side in document.sides.values():
        side.by_context.sort(key=lambda row: row.context)
    document.window = max(windows)
    if b is not None and new_tokens != 0:
        _note_free_running(document, a, b, ids, min(document.window, len(ids)), new_tokens, progress)


def measure_tasks(
    document: m.EvalDocument,
    sessions: Mapping[str, Session],
    tasks: Sequence[Task],
    lengths: Sequence[int],
    samples: int,
    seed: int,
    progress: Progress,
) -> None:
    """Ask every side the same questions.

    Raises ``MemcError`` as ``run_tasks``, and E208 when the vocabularies of two sides differ.
    """
    offered = [words_of(session).plain for session in sessions.values()]
    if any(not np.array_equal(words, offered[0]) for words in offered):
        raise MemcError("E208", "the two have different vocabularies: they cannot be asked the same")
    document.samples, document.seed = samples, seed
    for name, session in sessions.items():
        side = document.sides[name]
        if len(sessions) > 1:
            progress.note(f"{name}: {side.source}")
        cells = run_tasks(session, tasks, lengths, samples=samples, seed=seed, progress=progress)
        side.cells = [m.TaskCell.model_validate(cell, from_attributes=True) for cell in cells]
        side.tasks = {task.spec: _accuracy([cell for cell in cells if cell.task == task.spec]) for task in tasks}


def _note_side(side: m.EvalSide, window: int, result: PerplexityResult) -> None:
    side.by_context.append(m.ContextPerplexity(context=window, perplexity=result.perplexity, tokens=result.tokens))
    if side.perplexity is None:
        side.perplexity, side.tokens = result.perplexity, result.tokens
        side.by_position = [
            m.PositionBucket(start=b.start, end=b.stop, perplexity=b.perplexity, tokens=b.tokens)
            for b in result.by_position
        ]


def _note_both(document: m.EvalDocument, window: int, result: Comparison) -> None:
    _note_side(document.sides["a"], window, result.a)
    _note_side(document.sides["b"], window, result.b)
    found = m.Divergence.model_validate({**vars(result), "ratio": result.ratio, "context": window})
    document.by_context.append(found)
    if document.ratio is None:
        document.ratio, document.kl_mean, document.kl_p99 = found.ratio, found.kl_mean, found.kl_p99
        document.top1_agreement = found.top1_agreement


def _note_free_running(
    document: m.EvalDocument,
    a: Session,
    b: Session,
    ids: npt.NDArray[np.integer],
    prompt: int,
    new_tokens: int | None,
    progress: Progress,
) -> None:
    """Continue prompts of a window each, shorter where the capacity leaves no room for the new tokens after it."""
    wanted = NEW_TOKENS if new_tokens is None else new_tokens
    room = min((side.capacity for side in (a, b) if side.capacity is not None), default=prompt + wanted) - wanted
    if room < 1:
        what = f"{wanted} new tokens are past the capacity of {room + wanted}"
        if new_tokens is not None:
            raise MemcError("E206", what, "--free-run", f"--free-run {max((room + wanted) // 2, 0)}")
        document.warnings.append(f"no free-running continuation: {what}")
        return
    result = free_running(a, b, ids, prompt_tokens=min(prompt, room), new_tokens=wanted, progress=progress)
    facts = {**vars(result), "equal_before": result.equal_before}
    document.free_running = m.FreeRunningFacts.model_validate(facts)


def _accuracy(cells: Sequence[Cell]) -> float:
    return sum(cell.accuracy * cell.questions for cell in cells) / sum(cell.questions for cell in cells)

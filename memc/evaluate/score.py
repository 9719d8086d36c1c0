"""Asking a session the questions of a task: through its state, question by question, the right answers fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memc.data.tokens import ends
from memc.errors import MemcError
from memc.evaluate.tasks import Sample, Task, Words
from memc.progress import Progress, Silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from memc.runtime import Session, SessionState

BATCH_TOKENS = 8192
"""Most tokens of the sequences that are asked together: it bounds the memory of growing states."""


@dataclass(frozen=True)
class Cell:
    """What share of the questions of one task, length and depth was answered right.

    An answer is right when every token of it is the likeliest after all that stands before it. ``stderr`` is the
    standard error of ``accuracy`` over samples, whose questions are not independent; None for a single one.
    """

    task: str
    length: int
    depth: float | None
    samples: int
    questions: int
    accuracy: float
    stderr: float | None
    chance: float | None


def words_of(session: Session) -> Words:
    """Return the tokens of an artifact. Raises ``MemcError`` E208 for an encoder or one of no known vocabulary."""
    session.require_decoder()
    vocab = session.manifest.vocab_size
    if vocab is None:
        raise MemcError("E208", "the artifact does not say how many tokens it knows", str(session.folder))
    if not (session.folder / "tokenizer.json").is_file():
        return Words(vocab)
    return words_in(session.text.tokenizer, vocab)


def words_in(tokenizer: Tokenizer, vocab: int) -> Words:
    """Return the tokens that a model of ``vocab`` ids may be asked about in text."""
    # What stands in no tokenizer was never trained on: some models round their vocabulary up.
    unknown = set(range(vocab)) - set(tokenizer.get_vocab().values())
    before, _ = ends(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    return Words(vocab, frozenset(unknown | added.keys()), tuple(before), tokenizer)


def run_tasks(
    session: Session,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    *,
    samples: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Cell]:
    """Ask every task at every length, ``samples`` times for each depth.

    Everything is made before anything is asked, so that what cannot be made is told at once. Raises ``MemcError``: E206
    a length past the capacity, E208 an encoder, E200 and E308 as ``Task.sample``, E403 logits that are not finite.
    """
    words = words_of(session)
    for length in lengths:
        if session.capacity is not None and length > session.capacity:
            hint = f"memc convert MODEL -o OUT --context {length}, or shorter --lengths"
            raise MemcError("E206", f"{length} tokens are past the capacity of {session.capacity}", "--lengths", hint)
    made = [(task, n, task.samples(words, n, samples, seed)) for task in tasks for n in lengths]
    watched = progress or Silent()
    cells: list[Cell] = []
    for task, length, asked in made:
        with watched.step(f"{task.spec} at {length} tokens", total=len(asked)) as advance:
            right: list[list[bool]] = []
            size = max(BATCH_TOKENS // length, 1)
            for start in range(0, len(asked), size):
                right += ask(session, asked[start : start + size])
                advance(len(asked[start : start + size]))
        cells += _cells(task, length, asked, right)
    return cells


def ask(session: Session, samples: Sequence[Sample]) -> list[list[bool]]:
    """Tell for each question of each sample whether its answer was right.

    What stands before a question is prefilled; the question and the answer go in one token at a time, as when
    generating, all samples together. Raises ``MemcError`` E403 for logits that are not finite, and as ``prefill``.
    """
    state = session.new_state(len(samples), max(len(sample.ids) for sample in samples))
    right: list[list[bool]] = [[] for _ in samples]
    for index in range(max(len(sample.questions) for sample in samples)):
        rows = [n for n, sample in enumerate(samples) if index < len(sample.questions)]
        questions = {n: samples[n].questions[index] for n in rows}
        _feed(session, state, samples, {n: question.ask for n, question in questions.items()})
        sound = dict.fromkeys(rows, True)
        while waiting := [n for n in rows if state.lengths[n] < questions[n].stop]:
            for n in waiting:
                at = int(state.lengths[n])
                if at >= questions[n].start:
                    sound[n] &= _likeliest(state, n) == int(samples[n].ids[at])
            tokens = [-1] * len(samples)
            for n in waiting:
                tokens[n] = int(samples[n].ids[state.lengths[n]])
            if any(state.lengths[n] + 1 < len(samples[n].ids) for n in waiting):
                session.step(tokens, state)
            else:  # the last token of every sequence is answered: nothing comes after it
                break
        for n in rows:
            right[n].append(sound[n])
    return right


def _feed(session: Session, state: SessionState, samples: Sequence[Sample], until: dict[int, int]) -> None:
    """Run each row up to a place of its own; a row that is there, or has none, stays."""
    rows: list[npt.NDArray[np.int64]] = [
        sample.ids[state.lengths[n] : until.get(n, 0)] for n, sample in enumerate(samples)
    ]
    if any(map(len, rows)):
        session.prefill(rows, state)


def _likeliest(state: SessionState, row: int) -> int:
    assert state.last is not None
    logits = state.last[row]
    if not np.isfinite(logits).all():
        raise MemcError("E403", f"logits after token {int(state.lengths[row])} are not finite", next="memc report OUT")
    return int(logits.argmax())


def _cells(task: Task, length: int, samples: Sequence[Sample], right: list[list[bool]]) -> list[Cell]:
    """Average the answers by depth, in order of depth."""
    shares: dict[float | None, list[list[bool]]] = {}
    for sample, answers in zip(samples, right, strict=True):
        by_depth: dict[float | None, list[bool]] = {}
        for question, answer in zip(sample.questions, answers, strict=True):
            by_depth.setdefault(question.depth, []).append(answer)
        for depth, some in by_depth.items():
            shares.setdefault(depth, []).append(some)
    cells = []
    for depth in sorted(shares, key=lambda depth: -1.0 if depth is None else depth):
        counts = np.array([len(some) for some in shares[depth]])
        accuracy, stderr = _mean(np.array([sum(some) for some in shares[depth]]), counts)
        cells.append(Cell(task.spec, length, depth, len(counts), int(counts.sum()), accuracy, stderr, task.chance))
    return cells


def _mean(right: npt.NDArray[np.int64], asked: npt.NDArray[np.int64]) -> tuple[float, float | None]:
    """Return the share of right answers and its standard error, each sample one cluster of questions."""
    share = float(right.sum() / asked.sum())
    if len(asked) < 2:
        return share, None
    spread = right - share * asked
    error = np.sqrt(len(asked) / (len(asked) - 1) * (spread**2).sum()) / asked.sum()
    return share, float(error)

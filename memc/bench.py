"""Timing artifacts: prefill and decode over contexts, the sides taking turns so that drift of the machine hits all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from memc import machine
from memc.errors import MemcError
from memc.progress import Progress, Silent
from memc.report.models import BenchDocument, BenchRow

if TYPE_CHECKING:
    from memc.runtime import Session, SessionState

STEPS = 24
"""Decode steps timed for each side at each context, after ``WARM_UP`` that are not."""
WARM_UP = 4
WARM_UP_TOKENS = 64


@dataclass
class Runner:
    """One side at one context: its state after the prompt, and the seconds of each step."""

    name: str
    session: Session
    state: SessionState
    prefill_seconds: float
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def step(self, token: int, *, keep: bool) -> None:
        """Decode one token and note its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.session.step([token], self.state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if keep:
            self.wall.append(wall)
            self.cpu.append(cpu)

    def row(self, context: int) -> BenchRow:
        """Summarise."""
        median = statistics.median(self.wall)
        return BenchRow(
            side=self.name,
            context=context,
            prefill_tokens_per_s=context / self.prefill_seconds,
            decode_tokens_per_s=1 / median,
            decode_ms_median=1e3 * median,
            decode_ms_p90=1e3 * _quantile(self.wall, 0.9),
            cpu_ms_median=1e3 * statistics.median(self.cpu),
            state_bytes=self.state.bytes,
            rss_bytes=machine.rss_bytes(),
        )


def bench(
    sides: Mapping[str, Session],
    contexts: Sequence[int],
    *,
    threads: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BenchDocument:
    """Time each side after prompts of each length, on random tokens.

    ``threads`` is what the sessions were loaded with and ``sources`` what was (None: their folders), for the record.
    ``rss_bytes`` is of the whole process, all sides loaded. A context past a side's capacity is left out with a
    warning; raises ``MemcError`` E206 when nothing is left and E208 for an encoder.
    """
    watched = progress or Silent()
    for side in sides.values():
        side.require_decoder()
    document = BenchDocument(
        threads=threads or machine.cores(),
        machine=machine.describe(),
        sides=dict(sources or {name: str(session.folder) for name, session in sides.items()}),
        rows=[],
    )
    if not _cut_alike(list(sides.values())):
        document.warnings.append(
            "the two have different tokenizers: a token of one is not as much text as one of the other"
        )
    random = np.random.default_rng(seed)
    for context in sorted(contexts):
        fitting = {name: side for name, side in sides.items() if _fits(side, context + steps + WARM_UP)}
        for name in sides.keys() - fitting.keys():
            document.warnings.append(f"{context} tokens are past the capacity of {name}: left out")
        with watched.step(f"context {context}", len(fitting) * (steps + WARM_UP)) as advance:
            runners = [_start(name, side, context, steps, random) for name, side in fitting.items()]
            for index in range(steps + WARM_UP):
                for runner in runners[:: -1 if index % 2 else 1]:
                    runner.step(_token(runner.session, random), keep=index >= WARM_UP)
                    advance(1)
        document.rows += [runner.row(context) for runner in runners]
    if not document.rows:
        largest = min(side.capacity or 0 for side in sides.values())
        raise MemcError("E206", "every context is past the capacity", next=f"--contexts {max(largest // 2, 1)}")
    return document


def _cut_alike(sides: Sequence[Session]) -> bool:
    """Tell whether tokens mean the same to all sides, as far as they say."""
    told = [side for side in sides if (side.folder / "tokenizer.json").is_file()]
    return all(side.text.cuts_like(told[0].text) for side in told[1:])


def _start(name: str, session: Session, context: int, steps: int, random: np.random.Generator) -> Runner:
    """Warm a side up, run the prompt and time it."""
    tokens = [_token(session, random) for _ in range(context)]
    session.prefill(tokens[:WARM_UP_TOKENS], session.new_state(1, min(WARM_UP_TOKENS, context)))
    state = session.new_state(1, context + steps + WARM_UP)
    began = time.perf_counter()
    session.prefill(tokens, state)
    return Runner(name, session, state, time.perf_counter() - began)


def _token(session: Session, random: np.random.Generator) -> int:
    return int(random.integers(0, session.manifest.vocab_size or 1))


def _fits(session: Session, tokens: int) -> bool:
    return session.capacity is None or tokens <= session.capacity


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(math.ceil(share * len(values)) - 1, len(values) - 1)]

"""Timing artifacts: prefill and decode over contexts, the sides taking turns so that drift of the machine hits all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from memc import machine
from memc.artifact import held
from memc.errors import MemcError
from memc.progress import Progress, Silent
from memc.report.models import BenchDocument, BenchRow
from memc.report.text import size
from memc.runtime import Session
from memc.runtime.text import PROBE

STEPS = 24
"""Decode steps timed for each side at each context, after ``WARM_UP`` that are not."""
WARM_UP = 4
WARM_UP_TOKENS = 64
TOKEN_BYTES = 36
"""What a token of a prompt takes: a Python integer and its place in a list."""


class Timed(Protocol):
    """Something to time, one sequence at a time: a prompt from nothing, then single tokens."""

    @property
    def source(self) -> str:
        """What was loaded."""

    @property
    def vocab_size(self) -> int:
        """Tokens of the vocabulary."""

    @property
    def capacity(self) -> int | None:
        """Most tokens of a sequence, None for any."""

    def bytes_at(self, tokens: int) -> int:
        """Bytes of the state of a sequence of so many tokens, as far as they are known before."""

    def start(self, tokens: Sequence[int], room: int) -> None:
        """Run a prompt from nothing; ``room`` tokens, its own among them, are all that come."""

    def step(self, token: int) -> None:
        """Run one token after those before."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of the sequence."""

    def cut(self, text: str) -> list[int] | None:
        """Return the tokens of a text with nothing before it; None without a tokenizer."""


@dataclass
class Converted:
    """An artifact as something to time. Raises ``MemcError`` E208 for an encoder."""

    session: Session
    source: str = ""

    def __post_init__(self) -> None:
        """Say what was loaded, where nobody else did."""
        self.session.require_decoder()
        self.source = self.source or str(self.session.folder)

    @property
    def vocab_size(self) -> int:
        """See :class:`Timed`."""
        return self.session.manifest.vocab_size or 1

    @property
    def capacity(self) -> int | None:
        """See :class:`Timed`."""
        return self.session.capacity

    def bytes_at(self, tokens: int) -> int:
        """See :class:`Timed`."""
        sizes = (
            [2 if state.dtype == "bfloat16" else np.dtype(state.dtype).itemsize]
            + [1 if axis == "B" else held(axis, tokens) for axis in state.shape]
            for state in self.session.manifest.states
        )
        return sum(math.prod(each) for each in sizes)

    def start(self, tokens: Sequence[int], room: int) -> None:
        """See :class:`Timed`; room is made for what a state grows by alone."""
        self._state = self.session.new_state(1, room)
        self.session.prefill(tokens, self._state)

    def step(self, token: int) -> None:
        """See :class:`Timed`."""
        self.session.step([token], self._state)

    @property
    def state_bytes(self) -> int:
        """See :class:`Timed`."""
        return self._state.bytes

    def cut(self, text: str) -> list[int] | None:
        """See :class:`Timed`."""
        has = (self.session.folder / "tokenizer.json").is_file()
        return self.session.text.encode(text, special=False) if has else None


@dataclass
class Timing:
    """One side at one context: seconds of its prompt and of each step."""

    name: str
    side: Timed
    prefill_seconds: float
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def step(self, token: int, *, keep: bool) -> None:
        """Decode one token and note its time."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.side.step(token)
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
            state_bytes=self.side.state_bytes,
            rss_bytes=machine.rss_bytes(),
        )


def room_for(contexts: Sequence[int], steps: int) -> int:
    """Return the tokens of the longest sequence that timing runs."""
    return max(contexts) + steps + WARM_UP


def bench(
    sides: Mapping[str, Session | Timed],
    contexts: Sequence[int],
    *,
    threads: int | None = None,
    steps: int = STEPS,
    seed: int = 0,
    sources: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> BenchDocument:
    """Time each side after prompts of each length, on random tokens.

    ``threads`` is what the sides were loaded with and ``sources`` what was (None: what they say), for the record.
    ``rss_bytes`` is of the whole process, all sides loaded. A context past a side's capacity is left out with a
    warning; raises ``MemcError`` E206 when nothing is left, E208 for an encoder, and E501 before the first is timed
    where this machine's memory does not hold one of them.
    """
    watched, told = progress or Silent(), sources or {}
    timed = {name: _timed(side, told.get(name, "")) for name, side in sides.items()}
    document = BenchDocument(
        threads=threads or machine.cores(),
        machine=machine.describe(),
        sides={name: side.source for name, side in timed.items()},
        rows=[],
    )
    if not _cut_alike(list(timed.values())):
        document.warnings.append(
            "the two have different tokenizers: a token of one is not as much text as one of the other"
        )
    random = np.random.default_rng(seed)
    for context in contexts:
        _require_memory([side for side in timed.values() if _fits(side, room_for([context], steps))], context)
    for context in sorted(contexts):
        fitting = {name: side for name, side in timed.items() if _fits(side, room_for([context], steps))}
        for name in timed.keys() - fitting.keys():
            document.warnings.append(f"{context} tokens are past the capacity of {name}: left out")
        with watched.step(f"context {context}", len(fitting) * (steps + WARM_UP)) as advance:
            timings = [_start(name, side, context, steps, random) for name, side in fitting.items()]
            for index in range(steps + WARM_UP):
                for one in timings[:: -1 if index % 2 else 1]:
                    one.step(_token(one.side, random), keep=index >= WARM_UP)
                    advance(1)
        document.rows += [one.row(context) for one in timings]
    if not document.rows:
        largest = min(side.capacity or 0 for side in timed.values())
        raise MemcError("E206", "every context is past the capacity", next=f"--contexts {max(largest // 2, 1)}")
    return document


def _require_memory(sides: Sequence[Timed], context: int) -> None:
    need = sum(TOKEN_BYTES * context + side.bytes_at(context) for side in sides)
    memory = machine.memory_bytes()
    if memory is not None and need > memory:
        reason = f"timing after {context} tokens needs {size(need)} of memory, this machine has {size(memory)}"
        raise MemcError("E501", reason, "--contexts", "leave that context out")


def _timed(side: Session | Timed, source: str) -> Timed:
    return Converted(side, source) if isinstance(side, Session) else side


def _cut_alike(sides: Sequence[Timed]) -> bool:
    """Tell whether tokens mean the same to all sides, as far as they say."""
    told = [cut for side in sides if (cut := side.cut(PROBE)) is not None]
    return all(cut == told[0] for cut in told[1:])


def _start(name: str, side: Timed, context: int, steps: int, random: np.random.Generator) -> Timing:
    """Warm a side up, run the prompt and time it."""
    tokens = [_token(side, random) for _ in range(context)]
    side.start(tokens[:WARM_UP_TOKENS], min(WARM_UP_TOKENS, context))
    began = time.perf_counter()
    side.start(tokens, context + steps + WARM_UP)
    return Timing(name, side, time.perf_counter() - began)


def _token(side: Timed, random: np.random.Generator) -> int:
    return int(random.integers(0, side.vocab_size))


def _fits(side: Timed, tokens: int) -> bool:
    return side.capacity is None or tokens <= side.capacity


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(math.ceil(share * len(values)) - 1, len(values) - 1)]

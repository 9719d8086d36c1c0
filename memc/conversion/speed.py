"""Whether a converted model takes less time than it did: the original lowered alike, both timed in turns."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memc import machine
from memc.artifact import Manifest, held
from memc.backend import Backend, LowerOptions, Runner
from memc.conversion.lowering import lower
from memc.pipeline import Pass
from memc.program import Program
from memc.report.models import ConvertDocument
from memc.target import Target
from memc.verify import CheckResult

SPEED_CHECKS = ("decode_time_ratio", "prompt_time_ratio")
PROMPT, PROMPTS = 128, 8
STEPS = 32
"""Tokens of a prompt, prompts that are timed, and tokens after the last that are."""

LEAST, SHORT = 0.02, 5e-5
"""Least share of the time that counts as a difference, and least seconds: what a call costs that computes nothing."""

ROUNDING = 3.0
"""How far apart two timings of the same program may be, in what they were found apart."""


CONTEXTS = (128, 512, 2048, 8192, 32_768)
"""Contexts at which the result's tokens are timed, as far as it has room; predictions have them too."""

TIMED, FEWEST, SECONDS = 10, 5, 15.0
"""Tokens that are timed at a context, of which the first two do not count, and how few once all took that long."""

ROOM = 8
"""States of what is timed may take such a part of the machine's memory: they are made, and handed over as copies."""


@dataclass
class _Side:
    """A runner, and CPU seconds of its prompts and of its single tokens."""

    runner: Runner
    prompts: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def prompt(self, ids: np.ndarray) -> None:
        self.state = self.runner.new_state(1, ids.shape[1] + STEPS)
        self.prompts.append(self._run(ids, 0))

    def step(self, token: int, at: int) -> None:
        self.steps.append(self._run(np.array([[token]]), at))

    def _run(self, ids: np.ndarray, start: int) -> float:
        began = time.process_time()
        positions = np.arange(start, start + ids.shape[1], dtype=np.int64)[None]
        self.runner.run(ids, positions, self.state, np.array([ids.shape[1] - 1]))
        return time.process_time() - began


def random_states(manifest: Manifest, context: int) -> dict[str, np.ndarray]:
    """Return states of one sequence as if it had seen ``context`` tokens, by name: small random numbers.

    A step takes the same time as after a prompt, which need not be run; zeros would be read from one page of memory.
    """
    random = np.random.default_rng(0)
    made = {}
    for state in manifest.states:
        shape = [1 if size == "B" else held(size, context) for size in state.shape]
        made[state.input] = (0.1 * random.standard_normal(shape, np.float32)).astype(state.dtype)
    return made


def decode_times(runners: Sequence[Runner], contexts: Sequence[int], threads: int | None) -> list[dict[int, float]]:
    """Return of each runner the median milliseconds of a token after random states, at contexts that it has room for.

    They take turns. With one thread it is time of the processor, else of the wall. No further context is looked at once
    that has taken ``SECONDS``, or where states do not leave the machine ``ROOM``.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    began, found = time.perf_counter(), [dict[int, float]() for _ in runners]
    token, last = np.array([[1]]), np.zeros(1, np.int64)
    for context in sorted(contexts):
        timed = [index for index, one in enumerate(runners) if _has_room(one.manifest, context)]
        if not timed or time.perf_counter() - began > SECONDS:
            break
        states = {i: runners[i].restore(random_states(runners[i].manifest, context), context + 1) for i in timed}
        seconds: dict[int, list[float]] = {index: [] for index in timed}
        for turn in range(TIMED):
            if turn >= FEWEST and time.perf_counter() - began > SECONDS:
                break
            for index in timed[:: -1 if turn % 2 else 1]:
                start = clock()
                runners[index].run(token, np.array([[context]]), states[index], last)
                seconds[index].append(clock() - start)
        for index in timed:
            found[index][context] = 1e3 * statistics.median(seconds[index][2:])
    return found


def _has_room(manifest: Manifest, context: int) -> bool:
    if manifest.capacity is not None and context >= manifest.capacity:
        return False
    sizes = ([1 if size == "B" else held(size, context) for size in state.shape] for state in manifest.states)
    memory = machine.memory_bytes()
    return memory is None or ROOM * 4 * sum(map(math.prod, sizes)) <= memory


def speed_budgets(passes: Sequence[Pass], budgets: Mapping[str, float]) -> dict[str, float]:
    """Return the most that each ratio of times may be: 1 where every pass promises speed, or what the recipe says."""
    promised = dict.fromkeys(SPEED_CHECKS, 1.0) if passes and all(pass_.quickens() for pass_ in passes) else {}
    return promised | {name: budget for name, budget in budgets.items() if name in SPEED_CHECKS}


def measures_speed(passes: Sequence[Pass], program: Program) -> bool:
    """Tell whether a conversion's result is timed beside the original: a decoder, and a pass is there to be faster."""
    return program.model.decoder and any(pass_.quickens() for pass_ in passes)


def modelled(document: ConvertDocument, budgets: Mapping[str, float]) -> list[CheckResult]:
    """Compare the time that the target's roofline gives a token at the shortest context, where it has rates."""
    before = document.original.decode_ms if document.original is not None else {}
    after, budget = document.predicted.decode_ms, budgets.get(SPEED_CHECKS[0])
    first = min(before.keys() & after.keys(), default=None)
    if first is None:
        return []
    value = after[first] / before[first]
    detail = f"modelled: {after[first]:.3g} ms a token against {before[first]:.3g} at {first}"
    return [CheckResult(SPEED_CHECKS[0], value, budget, None, budget is None or value <= budget, detail)]


def fits_beside(document: ConvertDocument) -> bool:
    """Tell whether the machine has memory for the original's lowered weights beside the result's."""
    memory = machine.memory_bytes()
    beside = document.original.weight_bytes if document.original is not None else 0
    return memory is None or (document.predicted.peak_rss_bytes or 0) + beside <= memory


@contextmanager
def lowered_beside(
    original: Program, place: Path, backend: Backend, target: Target, options: LowerOptions
) -> Iterator[Runner]:
    """Lower the original as the result was, under ``place``, for as long as it is looked at."""
    folder = place / "original"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        _, manifest = lower(original, backend, target, folder, options)
        yield backend.load(folder, manifest, options.threads)
    finally:
        shutil.rmtree(folder)


def check_speed(runner: Runner, dense: Runner, vocab: int, budgets: Mapping[str, float]) -> list[CheckResult]:
    """Compare the CPU time of prompts and of single tokens of a result with those of the original, lowered alike.

    The original takes two of three turns; how far its two timings are apart is the noise, and a budget of
    ``budgets`` is broken by what is over it by more than ``LEAST`` and ``ROUNDING`` times the noise.
    """
    sides = [_Side(runner), _Side(dense), _Side(dense)]
    _time(sides, vocab)
    seconds = {"token": [side.steps for side in sides], "prompt": [side.prompts for side in sides]}
    return [_compare(name, what, seconds[what], budgets) for name, what in zip(SPEED_CHECKS, seconds, strict=True)]


def _time(sides: Sequence[_Side], vocab: int) -> None:
    capacities = [side.runner.manifest.capacity for side in sides]
    room = min([PROMPT + STEPS, *(capacity for capacity in capacities if capacity is not None)])
    length = max(1, room * PROMPT // (PROMPT + STEPS))
    ids = np.random.default_rng(0).integers(0, vocab, room)
    for turn in range(PROMPTS):
        for side in _order(sides, turn):
            side.prompt(ids[None, :length])
    for at in range(length, room):
        for side in _order(sides, at):
            side.step(ids[at], at)


def _order(sides: Sequence[_Side], turn: int) -> Sequence[_Side]:
    return sides[:: -1 if turn % 2 else 1]


def _compare(name: str, what: str, seconds: Sequence[list[float]], budgets: Mapping[str, float]) -> CheckResult:
    mine, first, second = (statistics.median(each) for each in seconds)
    dense = (first + second) / 2
    value, noise = mine / dense, abs(first - second) / dense
    budget = budgets[name] * (1 + max(LEAST, ROUNDING * noise, SHORT / dense)) if name in budgets else None
    detail = f"{1e3 * mine:.3g} ms of CPU a {what}, the original {1e3 * dense:.3g}, of {len(seconds[0])}"
    return CheckResult(name, value, budget, noise, budget is None or value <= budget, detail)

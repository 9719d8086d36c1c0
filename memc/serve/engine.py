"""Generation for many callers on one session: admission, threads, and the states of conversations that go on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.runtime import Session, SessionState
from memc.runtime.generate import Conversation, GenerateOptions, Run
from memc.serve.protocol import RequestError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Limits:
    """What callers may ask for. ``tokens`` is further limited by the artifact's capacity."""

    concurrent: int = 1
    """Requests that run at once, each with a state and a thread of its own."""
    waiting: int = 16
    """Requests that wait for their turn; more are refused with status 429."""
    tokens: int = 32_768
    """Prompt and answer of a request."""
    answer: int = 1024
    """New tokens of a request, and of a chat that does not say ``max_tokens``."""
    body_bytes: int = 1 << 20
    kept: int = 8
    """Conversations whose states are kept for their next turn, where the state of a conversation does not grow."""


@dataclass(frozen=True)
class Order:
    """One request as the session takes it; None leaves the choice to the limits or the model's generation config."""

    prompt: str | list[int] | Conversation
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """The request is right and the model runs."""


@dataclass(frozen=True)
class Piece:
    """Text that is settled."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is complete; tokens of the prompt, of those the ones that were held already, and new tokens."""

    reason: Literal["stop", "length"]
    prompt: int
    cached: int
    new: int


Event = Started | Piece | Finished


class Job:
    """One request that was admitted. It belongs to the event loop that made it."""

    def __init__(self, order: Order) -> None:
        """Make a job that nobody works on yet."""
        self.order = order
        self.cancelled = threading.Event()
        self.future: Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def next(self) -> Event:
        """Return the next event. Raises what the work raised, and ``RequestError`` 503 when it was given up."""
        event = await self._events.get()
        if event is None:
            assert self.future is not None
            with suppress(CancelledError):
                self.future.result()
            raise RequestError(503, "the request was given up")
        return event

    def cancel(self) -> None:
        """Stop before the next token; harmless when it is over."""
        self.cancelled.set()
        if self.future is not None:
            self.future.cancel()

    def put(self, event: Event | None) -> None:
        """Hand an event to the loop, from any thread; None says that the work is over."""
        self.tell(self._events.put_nowait, event)

    def tell(self, function: Callable[..., object], *args: object) -> None:
        """Call a function on the loop, from any thread; when the loop was closed by force nobody listens any more."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)


class Kept:
    """States of conversations between two turns, by the tokens they have seen; the oldest give way to new ones.

    A state of constant size costs the same whatever was said, so that ``limit`` of them are all the memory there is to
    it. Only a whole state can be gone on from: nothing is ever taken back.
    """

    def __init__(self, limit: int) -> None:
        """Keep at most ``limit``."""
        self.limit = limit
        self._entries: list[tuple[Ids, SessionState]] = []
        self._lock = threading.Lock()

    def take(self, ids: Ids) -> tuple[SessionState | None, int]:
        """Give out the state that has seen the longest proper beginning of ``ids``, and its length."""
        with self._lock:
            found = [
                place
                for place, (seen, _) in enumerate(self._entries)
                if len(seen) < len(ids) and np.array_equal(seen, ids[: len(seen)])
            ]
            if not found:
                return None, 0
            seen, state = self._entries.pop(max(found, key=lambda place: len(self._entries[place][0])))
            return state, len(seen)

    def put(self, ids: Ids, state: SessionState) -> None:
        """Keep the state of a conversation that has seen ``ids``."""
        with self._lock:
            self._entries = [*self._entries, (ids, state)][-self.limit :] if self.limit else []


class Engine:
    """Runs orders on a session, each in a thread; made, asked and closed on one event loop."""

    def __init__(self, session: Session, limits: Limits) -> None:
        """Take a session. Raises ``MemcError`` E208 for an encoder."""
        session.require_decoder()
        self.session = session
        self.limits = limits
        self.tokens = min(limits.tokens, session.capacity or limits.tokens)
        self.jobs: set[Job] = set()
        self.closed = False
        grows = any(state.grows is not None for state in session.manifest.states)
        self.kept = Kept(0 if grows else limits.kept)
        self._pool = ThreadPoolExecutor(limits.concurrent, thread_name_prefix="generate")

    def submit(self, order: Order) -> Job:
        """Admit an order. Raises ``RequestError``: 429 when as many wait as may, 503 when the engine is closed."""
        if self.closed:
            raise RequestError(503, "the server is shutting down")
        if len(self.jobs) >= self.limits.concurrent + self.limits.waiting:
            message = f"{len(self.jobs)} requests run or wait here: try again later"
            raise RequestError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        job = Job(order)
        self.jobs.add(job)

        def ended(future: Future[None]) -> None:
            job.tell(self.jobs.discard, job)
            job.put(None)

        job.future = self._pool.submit(self._work, job)
        job.future.add_done_callback(ended)
        return job

    def abandon(self) -> None:
        """Take no more orders, and give up those that run and wait."""
        self.closed = True
        for job in list(self.jobs):
            job.cancel()

    async def close(self) -> None:
        """Abandon all, and wait until the threads are done."""
        self.abandon()
        await asyncio.to_thread(self._pool.shutdown, wait=True, cancel_futures=True)

    def _work(self, job: Job) -> None:
        order, session = job.order, self.session
        ids = self._ids(order)
        limit = self._limit(order, len(ids))
        state, cached = self.kept.take(ids)
        if state is None:
            state = session.new_state(1, len(ids) + limit)
        *before, last = _chunks(ids[cached:], session.chunk)
        run = Run(session, [last.tolist()], state, _options(order, limit))
        if self._generate(job, run, before, ids):
            (result,) = run.results()
            job.put(Finished(result.finish_reason, len(ids), cached, len(result.ids)))
        # What failed raised, and is not kept. The last token drawn was not run.
        seen = np.concatenate([ids, np.array(run.rows[0].ids, np.int64)])[: int(state.lengths[0])]
        if len(seen):
            self.kept.put(seen, state)

    def _generate(self, job: Job, run: Run, before: list[Ids], prompt: Ids) -> bool:
        """Run the prompt and draw the answer; return whether it came to its end before the caller gave up.

        What is fetched is settled by the whole prompt, of which ``before`` has all chunks but the last.
        """
        started = False
        new = bool(before) and not run.state.lengths.any()
        fetched = self.session.fetch([prompt]) if new else None
        for chunk in before:
            if job.cancelled.is_set():
                return False
            self.session.prefill([chunk], run.state, fetched=None if started else fetched)
            if not started:
                job.put(Started())
            started = True
        for _, piece in run.pieces():
            if not started:
                job.put(Started())
            started = True
            if piece:
                job.put(Piece(piece))
            if job.cancelled.is_set():
                return False
        return True

    def _ids(self, order: Order) -> Ids:
        text = self.session.text
        match order.prompt:
            case str(prompt):
                ids = text.encode(prompt)
            case [dict(), *_] as messages:
                ids = text.encode(text.chat(messages), special=False)  # type: ignore[arg-type]
            case prompt:
                ids = list(prompt)  # type: ignore[arg-type]
        if not ids:
            raise MemcError("E205", "the prompt is empty", next="give at least one token")
        return np.array(ids, np.int64)

    def _limit(self, order: Order, prompt: int) -> int:
        """Return how many tokens may be drawn. Raises ``MemcError`` E206 where there is no room for them."""
        wanted = order.max_new_tokens or max(1, min(self.limits.answer, self.tokens - prompt))
        if prompt + wanted > self.tokens:
            what = f"the prompt has {prompt} tokens, and with {wanted} new ones {prompt + wanted}"
            raise MemcError("E206", f"{what}: at most {self.tokens} are taken here")
        return wanted


def _options(order: Order, limit: int) -> GenerateOptions:
    return {
        "max_new_tokens": limit,
        "temperature": order.temperature,
        "top_k": order.top_k,
        "top_p": order.top_p,
        "seed": order.seed,
        "stop": list(order.stop),
        "model_defaults": True,
    }


def _chunks(ids: Ids, size: int) -> Iterator[Ids]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]

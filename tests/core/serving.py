"""A session in memory behind the application that serves it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from memc.runtime import Session
from memc.serve import Limits, make_app
from tests.core.runtime_fakes import byte_tokenizer, make_session

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "

PROMPT = {"model": "tiny", "prompt": "the quick", "max_tokens": 12, "temperature": 0}

CHAT: list[Any] = [{"role": "user", "content": "the fox"}]


def make(folder: Path, **options: Any) -> Session:
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    return make_session(folder / "out", tokenizer=byte_tokenizer(), files=files, vocab_size=400, **options)


class Slow:
    """Makes every call of a session's runner wait until it is let go, then take a while, and counts the calls."""

    def __init__(self, session: Session, seconds: float = 0.0) -> None:
        self.calls, self.go, self.inner, self.seconds = 0, threading.Event(), session.runner.run, seconds
        session.runner.run = self.run  # type: ignore[method-assign]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        assert self.go.wait(20)
        time.sleep(self.seconds)
        return self.inner(*args, **kwargs)


@asynccontextmanager
async def client(
    session: Session, limits: Limits | None = None, hosts: frozenset[str] | None = None, key: str | None = None
) -> AsyncIterator[httpx2.AsyncClient]:
    app = make_app(session, limits or Limits(), "tiny", hosts=hosts, key=key)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url="http://x") as made:
        made.engine = app.state.engine  # type: ignore[attr-defined]
        yield made


Talk = Callable[[httpx2.AsyncClient], Coroutine[Any, Any, None]]


def talk(session: Session, script: Talk, limits: Limits | None = None, hosts: frozenset[str] | None = None) -> None:
    async def run() -> None:
        async with client(session, limits, hosts) as made:
            await script(made)

    asyncio.run(run())


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

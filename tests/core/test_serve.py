"""Serving: OpenAI's own client and plain HTTP against a session in memory; many at once, disconnects, the end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import uvicorn

from memc.runtime import Session
from memc.serve import Limits, listen, make_app
from memc.serve.server import LOOPBACK_NAMES
from tests.core.serving import CHAT, PROMPT, Slow, client, make, talk, until


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "out").mkdir()
    return make(tmp_path)


@pytest.fixture
def served(session: Session) -> Iterator[str]:
    """A server on a port of its own, in a thread; yields its base URL."""
    place = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(session, Limits(), "tiny", hosts=LOOPBACK_NAMES), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    yield f"http://127.0.0.1:{place.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(20)
    place.close()
    assert not thread.is_alive()


@pytest.fixture
def theirs(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served, api_key="none", max_retries=0, timeout=20) as made:
        yield made


def test_their_client_gets_what_the_session_generates(theirs: openai.OpenAI, session: Session) -> None:
    expected = session.generate("the quick", max_new_tokens=12)
    got = theirs.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0)
    assert (got.choices[0].text, got.choices[0].finish_reason, got.object) == (expected.text, "length", got.object)
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (expected.prompt_tokens, 12)
    assert got.usage.total_tokens == expected.prompt_tokens + 12
    drawn = session.generate("the quick", max_new_tokens=9, temperature=1.5, top_p=0.9, seed=7).text
    for _ in range(2):
        again = theirs.completions.create(
            model="tiny", prompt="the quick", max_tokens=9, temperature=1.5, top_p=0.9, seed=7
        )
        assert again.choices[0].text == drawn
    assert [model.id for model in theirs.models.list()] == ["tiny"]
    assert theirs.models.retrieve("tiny").id == "tiny"


def test_their_client_chats_and_streams(theirs: openai.OpenAI, session: Session) -> None:
    expected = session.generate(CHAT, chat=True, max_new_tokens=15, temperature=0)
    whole = theirs.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=15, temperature=0)
    assert whole.choices[0].message.content == expected.text and whole.choices[0].message.role == "assistant"
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "stream": True}
    pieces = list(
        theirs.chat.completions.create(
            messages=CHAT, max_completion_tokens=15, stream_options={"include_usage": True}, **options
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == expected.text and len([text for text in texts if text]) > 3
    assert pieces[-2].choices[0].finish_reason == "length"
    assert pieces[-1].choices == [] and pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 15
    plain = list(theirs.completions.create(prompt="the quick", max_tokens=12, **options))
    assert "".join(piece.choices[0].text for piece in plain) == session.generate("the quick", max_new_tokens=12).text
    assert plain[-1].choices[0].finish_reason == "length"


def test_their_client_s_stops_end_the_text(theirs: openai.OpenAI, session: Session) -> None:
    text = session.generate("the quick", max_new_tokens=12).text
    assert text
    stop = text[5:8]
    got = theirs.completions.create(model="tiny", prompt="the quick", max_tokens=12, temperature=0, stop=[stop, "\0"])
    assert got.choices[0].text == text[: text.index(stop)] and got.choices[0].finish_reason == "stop"


def test_their_client_raises_their_errors(theirs: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        theirs.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="logprobs is not supported") as caught:
        theirs.chat.completions.create(model="tiny", messages=CHAT, logprobs=True)
    assert (caught.value.param, caught.value.code) == ("logprobs", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError) as caught:
        theirs.completions.create(model="tiny", prompt="a", max_tokens=10, extra_body={"prompt": [5] * 40_000})
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_model(served: str, session: Session, stream: bool) -> None:
    slow = Slow(session, seconds=0.005)
    with _asked(served, {**PROMPT, "max_tokens": 900, "stream": stream}) as link:
        until(lambda: slow.calls > 0)
        if stream:
            slow.go.set()
            assert link.recv(15) == b"HTTP/1.1 200 OK"
    slow.go.set()
    until(lambda: httpx2.get(served.removesuffix("/v1") + "/health").json()["requests"] == 0)
    assert slow.calls < 600


def _asked(served: str, body: dict[str, Any]) -> socket.socket:
    """Send a request for a completion and return the connection."""
    url, content = httpx2.URL(served), json.dumps(body)
    link = socket.create_connection((url.host, url.port or 0), timeout=20)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    link.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    return link


def test_a_full_queue_is_refused_and_a_waiting_request_is_served(session: Session) -> None:
    slow = Slow(session)

    async def script(made: httpx2.AsyncClient) -> None:
        asked = [asyncio.ensure_future(made.post("/v1/completions", json=PROMPT)) for _ in range(2)]
        while len(made.engine.jobs) < 2:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        refused = await made.post("/v1/completions", json=PROMPT)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert (await made.get("/health")).json() == {"status": "ok", "requests": 2}
        slow.go.set()
        first, second = await asyncio.gather(*asked)
        assert first.json()["choices"] == second.json()["choices"]

    talk(session, script, Limits(concurrent=1, waiting=1))


def test_closing_gives_up_what_runs(session: Session) -> None:
    slow = Slow(session)

    async def run() -> None:
        async with client(session) as made:
            asked = asyncio.ensure_future(made.post("/v1/completions", json={**PROMPT, "max_tokens": 900}))
            while not slow.calls:
                await asyncio.sleep(0.01)
            made.engine.abandon()  # type: ignore[attr-defined]
            assert (await made.get("/health")).status_code == 503
            assert (await made.post("/v1/completions", json=PROMPT)).status_code == 503
            slow.go.set()
            assert (await asked).json()["error"]["message"] == "the request was given up"
        assert slow.calls < 4

    asyncio.run(run())


def test_several_at_once_give_what_they_give_alone(session: Session) -> None:
    prompts = ["the quick", "a dog", "naïve 東京", "lazy"]

    async def script(made: httpx2.AsyncClient) -> None:
        bodies = [{**PROMPT, "prompt": prompt} for prompt in prompts]
        found = await asyncio.gather(*(made.post("/v1/completions", json=body) for body in bodies))
        for prompt, answer in zip(prompts, found, strict=True):
            assert answer.json()["choices"][0]["text"] == session.generate(prompt, max_new_tokens=12).text

    talk(session, script, Limits(concurrent=4))

"""Serving: OpenAI's own client and plain HTTP against a session in memory; limits, disconnects, and the end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import uvicorn

from memc.errors import MemcError
from memc.runtime import Session
from memc.serve import Limits, listen, make_app
from memc.serve.engine import Engine, Kept, Order
from memc.serve.protocol import NEUTRAL, ChatRequest, CompletionRequest, RequestError, parse
from memc.serve.server import LOOPBACK_NAMES, is_loopback
from tests.core.runtime_fakes import byte_tokenizer, make_session

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
PROMPT = {"model": "tiny", "prompt": "the quick", "max_tokens": 12, "temperature": 0}
CHAT: list[Any] = [{"role": "user", "content": "the fox"}]


def make(folder: Path, **options: Any) -> Session:
    files = {"tokenizer_config.json": {"chat_template": TEMPLATE}}
    return make_session(folder / "out", tokenizer=byte_tokenizer(), files=files, vocab_size=400, **options)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "out").mkdir()
    return make(tmp_path)


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


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


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


def test_a_conversation_goes_on_from_its_state(session: Session) -> None:
    ids = session.encode("the quick brown fox")

    async def script(made: httpx2.AsyncClient) -> None:
        first = session.generate(ids, max_new_tokens=6)
        await made.post("/v1/completions", json={**PROMPT, "prompt": ids, "max_tokens": 6})
        longer = [*ids, *first.ids, 7, 9]
        expected = session.generate(longer, max_new_tokens=6)
        session.runner.calls.clear()  # type: ignore[attr-defined]
        got = (await made.post("/v1/completions", json={**PROMPT, "prompt": longer, "max_tokens": 6})).json()
        assert got["choices"][0]["text"] == expected.text
        assert got["usage"]["prompt_tokens_details"] == {"cached_tokens": len(ids) + 5}
        assert sum(width for width, _ in session.runner.calls) == 3 + 5  # type: ignore[attr-defined]
        again = (await made.post("/v1/completions", json={**PROMPT, "prompt": longer, "max_tokens": 6})).json()
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}, "nothing is taken back"

    talk(session, script)


def test_what_is_fetched_is_settled_by_the_whole_first_prompt(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    given: list[Any] = []
    prefill = session.prefill

    def noted(ids: Any, state: Any, *, fetched: Any = None) -> Any:
        given.append(fetched or {})
        return prefill(ids, state)

    monkeypatch.setattr(session, "chunk", 4)
    monkeypatch.setattr(session, "prefill", noted)
    monkeypatch.setattr(session, "fetch", lambda rows: asked.append(rows[0].tolist()) or {"bank_0": len(asked)})
    ids = list(range(20, 31))

    async def script(made: httpx2.AsyncClient) -> None:
        first = await made.post("/v1/completions", json={**PROMPT, "prompt": ids, "max_tokens": 2})
        assert first.json()["usage"]["prompt_tokens"] == 11
        assert asked == [ids] and given == [{"bank_0": 1}, {}, {}, {}]
        first_ids = session.generate(ids, max_new_tokens=2).ids
        given.clear()
        longer = {**PROMPT, "prompt": [*ids, *first_ids, 7, 8, 9, 7, 8, 9], "max_tokens": 1}
        again = await made.post("/v1/completions", json=longer)
        assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 12
        assert asked == [ids] and not any(given), "a conversation keeps what it has"

    talk(session, script)


def test_states_that_grow_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    grown = make(tmp_path, grows=True)

    async def script(made: httpx2.AsyncClient) -> None:
        ids = grown.encode("the quick brown fox")
        first = grown.generate(ids, max_new_tokens=3)
        await made.post("/v1/completions", json={**PROMPT, "prompt": ids, "max_tokens": 3})
        got = await made.post("/v1/completions", json={**PROMPT, "prompt": [*ids, *first.ids]})
        assert got.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}

    talk(grown, script)


def test_kept_states_give_way_to_new_ones(session: Session) -> None:
    kept = Kept(2)
    states = [session.new_state() for _ in range(3)]
    for number, state in enumerate(states):
        kept.put(np.array([number, 1]), state)
    assert kept.take(np.array([0, 1, 2])) == (None, 0)
    assert kept.take(np.array([1, 1])) == (None, 0), "one that saw the whole prompt has no logits to go on from"
    found, length = kept.take(np.array([1, 1, 5]))
    assert found is states[1] and length == 2
    assert kept.take(np.array([1, 1, 5])) == (None, 0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "temperature": 3}, "temperature"),
    ({"prompt": "a", "temperature": "0.5"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2000}, "max_tokens"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": []}, ""),
    ({"prompt": [400]}, ""),
    ({"prompt": [1 << 70]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "a\ud800"}, ""),
    ({"prompt": "a", "temperature": float("nan")}, ""),
    ({"prompt": "a", "\ud800": 1}, ""),
    ({"prompt": "a", "logprobs": 0}, "logprobs"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "n": 2}, "n"),
    ({"prompt": "a", "speed": "high"}, "speed"),
    ({}, "prompt"),
]


def test_what_is_wrong_is_named(session: Session) -> None:
    async def script(made: httpx2.AsyncClient) -> None:
        for body, param in REFUSED:
            content = json.dumps({"model": "tiny", **body})
            answer = await made.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert answer.status_code == 400, body
            assert error["type"] == "invalid_request_error" and error["message"]
            assert (error["param"] or "").startswith(param), error
            assert str(session.folder) not in error["message"]
        part = {"type": "image_url", "image_url": {"url": "x"}}
        answer = await made.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
        )
        assert answer.status_code == 400 and "messages" in answer.json()["error"]["param"]
        for path, status in (("/v1/embeddings", 404), ("/v1/completions", 405), ("/v1/models/other", 404)):
            answer = await made.get(path)
            assert answer.status_code == status and answer.json()["error"]["message"]
        assert (await made.get("/health")).json()["requests"] == 0

    talk(session, script)


def test_bodies_and_hosts_that_are_not_taken(session: Session) -> None:
    async def script(made: httpx2.AsyncClient) -> None:
        kind = {"content-type": "application/json"}
        here = {**kind, "host": "localhost:8000"}
        path = "/v1/completions"
        assert (await made.post(path, json=PROMPT)).status_code == 403
        assert (await made.post(path, json=PROMPT, headers={"host": "[::1]:8000"})).status_code == 200
        assert (await made.post(path, content=b"{}", headers={"host": "localhost"})).status_code == 415
        for content in (b"{", b"[]", b"\xff", b"[" * 150_000):
            answer = await made.post(path, content=content, headers=here)
            assert answer.status_code == 400, content[:9]
        large = await made.post(path, content=b" " * 200_001, headers=here)
        assert large.status_code == 413 and large.json()["error"]["message"]

    talk(session, script, Limits(body_bytes=200_000), LOOPBACK_NAMES)


def test_with_a_key_nothing_but_health_is_answered_without_it(session: Session) -> None:
    async def run() -> None:
        async with client(session, key="s3cret") as made:
            for given in (None, "none", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer \u00e9"):
                headers = {} if given is None else {"Authorization": given.encode()}
                for call in (
                    made.get("/v1/models", headers=headers),
                    made.get("/v1/models/tiny", headers=headers),
                    made.post("/v1/completions", json=PROMPT, headers=headers),
                    made.post("/v1/chat/completions", content=b"no JSON", headers=headers),
                ):
                    answer = await call
                    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), given
                    assert answer.headers["www-authenticate"] == "Bearer" and "s3cret" not in answer.text
            assert (await made.get("/health")).status_code == 200
            right = {"Authorization": "bearer s3cret"}
            assert (await made.get("/v1/models", headers=right)).status_code == 200
            answer = await made.post("/v1/completions", json=PROMPT, headers=right)
            assert answer.json()["choices"][0]["text"]

    asyncio.run(run())


def test_faults_of_the_model_are_the_server_s(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    session = make(tmp_path, poison=7)

    async def script(made: httpx2.AsyncClient) -> None:
        answer = await made.post("/v1/completions", json={**PROMPT, "prompt": [5, 7]})
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "E403" in answer.json()["error"]["message"]

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("secret")

        session.runner.run = broken  # type: ignore[method-assign]
        answer = await made.post("/v1/completions", json=PROMPT)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "internal error")

    talk(session, script)


def test_a_fault_after_the_first_piece_ends_the_stream(session: Session) -> None:
    inner, calls = session.runner.run, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise MemcError("E403", "not finite")
        return inner(*args, **kwargs)

    session.runner.run = failing  # type: ignore[method-assign]

    async def script(made: httpx2.AsyncClient) -> None:
        answer = await made.post("/v1/completions", json={**PROMPT, "stream": True})
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert answer.status_code == 200 and "[DONE]" not in lines
        assert "E403" in json.loads(lines[-1])["error"]["message"]

    talk(session, script)


def test_neutral_values_pass_and_others_do_not() -> None:
    for name, values in NEUTRAL.items():
        for value in (*values, None):
            parse(json.dumps({**PROMPT, name: value}).encode(), CompletionRequest)
        with pytest.raises(RequestError) as caught:
            parse(json.dumps({**PROMPT, name: "planted"}).encode(), CompletionRequest)
        assert caught.value.param == name


def test_parts_of_messages_are_joined_and_roles_translated() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    asked = parse(json.dumps({"model": "m", "messages": messages, "user": "me"}).encode(), ChatRequest)
    assert asked.input == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert asked.limit is None


def test_limits_follow_the_artifact(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    session = make(tmp_path, capacity=50)
    assert Engine(session, Limits()).tokens == 50

    async def run() -> None:
        engine = Engine(session, Limits())
        job = engine.submit(Order(prompt=[5] * 45))
        while not hasattr(event := await job.next(), "new"):
            pass
        assert event.new == 5  # type: ignore[union-attr]
        await engine.close()

    asyncio.run(run())


def test_sockets() -> None:
    assert is_loopback("127.0.0.5") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    with listen("127.0.0.1", 0) as place, pytest.raises(MemcError, match="E200 cannot listen"):
        listen("127.0.0.1", place.getsockname()[1])

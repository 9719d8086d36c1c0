"""Serving: what is refused, by name, and what faults of the model become."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from memc.errors import MemcError
from memc.runtime import Session
from memc.serve import Limits, listen
from memc.serve.engine import Engine, Order
from memc.serve.protocol import NEUTRAL, ChatRequest, CompletionRequest, RequestError, parse
from memc.serve.server import LOOPBACK_NAMES, is_loopback
from tests.core.serving import PROMPT, client, make, talk


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "out").mkdir()
    return make(tmp_path)


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
            assert (error["param"] or "").startswith(param) and "str" not in (error["param"] or ""), error
            assert "valid string" not in error["message"], error
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
        for host in ("[abc", "localhost]", "[::1", "localhost@evil", "local host", "evil:8000", "localhost.evil", ""):
            assert (await made.post(path, json=PROMPT, headers={**kind, "host": host})).status_code == 403, host
        for host in ("LOCALHOST", "127.0.0.1:", "[::1]"):
            assert (await made.post(path, json=PROMPT, headers={**kind, "host": host})).status_code == 200, host
        assert (await made.post(path, json=PROMPT, headers={"host": "[::1]:8000"})).status_code == 200
        assert (await made.post(path, content=b"{}", headers={"host": "localhost"})).status_code == 415
        for content in (b"{", b"[]", b"\xff", b"[" * 150_000):
            answer = await made.post(path, content=content, headers=here)
            assert answer.status_code == 400, content[:9]
        large = await made.post(path, content=b" " * 200_001, headers=here)
        assert large.status_code == 413 and large.json()["error"]["message"]

    talk(session, script, Limits(body_bytes=200_000), LOOPBACK_NAMES)


def test_of_several_parameters_the_first_listed_is_named() -> None:
    names = list(NEUTRAL)
    for first, second in pairwise(names):
        body = json.dumps({"model": "tiny", "prompt": "x", second: "?", first: "?"}).encode()
        with pytest.raises(RequestError) as caught:
            parse(body, CompletionRequest)
        assert caught.value.param == first


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

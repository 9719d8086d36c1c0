"""Serving conversations: states that are kept, what is fetched for them, and what gives way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from memc.runtime import Session
from memc.serve.engine import Kept
from tests.core.serving import PROMPT, make, talk


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "out").mkdir()
    return make(tmp_path)


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

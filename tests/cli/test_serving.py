"""serve on an artifact in memory: signals, what it refuses, what is not installed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path

import httpx2
import pytest

from memc.cli import main
from memc.report.tools import ServeDocument
from tests.core.runtime_fakes import make_artifact

pytestmark = pytest.mark.usefixtures("fake_backend")

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_answers_until_a_signal_and_ends_in_order(stop: signal.Signals, out: str, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[httpx2.Response] = []
    caller = threading.Thread(target=_call_then_stop, args=(port, stop, answers))
    caller.start()
    assert main(["serve", out, "--port", str(port), "--json", "--name", "tiny"]) == 0
    caller.join()
    shown = capsys.readouterr()
    document = ServeDocument.model_validate_json(shown.out)
    assert (document.url, document.model) == (f"http://127.0.0.1:{port}/v1", "tiny")
    assert "serving tiny" in shown.err and "Traceback" not in shown.err
    assert [answer.status_code for answer in answers] == [200]
    assert answers[0].json()["usage"]["completion_tokens"] == 5


def _call_then_stop(port: int, stop: signal.Signals, answers: list[httpx2.Response]) -> None:
    """Ask once the server listens, then end it, whatever came of that."""
    transport = httpx2.HTTPTransport(retries=8)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=20) as client:
            answers.append(client.post("/v1/completions", json={"model": "tiny", "prompt": "a dog", "max_tokens": 5}))
    finally:
        os.kill(os.getpid(), stop)


def test_conversations_past_the_training_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("memc.serve.run", lambda *args, **options: None)
    out = str(make_artifact(tmp_path / "out", trained_positions=20))
    for most, told in (("20", 0), ("21", 1)):
        assert main(["serve", out, "--port", "0", "--max-tokens", most]) == 0
        assert capsys.readouterr().err.count("beyond_trained: 21 tokens are past the 20 positions") == told


def test_serve_refuses_what_it_cannot_serve(out: str, tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", out, "--port", str(taken.getsockname()[1])]) == 2
    assert "E200 cannot listen" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 3
    assert capsys.readouterr().err.startswith("E309")
    key = tmp_path / "key"
    for held in (b"", b" \n", b"two words", b"\xff\xfe", "schlüssel".encode()):
        key.write_bytes(held)
        assert main(["serve", out, "--port", "0", "--api-key-file", str(key)]) == 2
        assert "API key" in capsys.readouterr().err
    assert main(["serve", out, "--port", "0", "--api-key-file", str(key) + "x"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    encoder = str(make_artifact(tmp_path / "encoder", decoder=False))
    assert main(["serve", encoder, "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("E208")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_serve_without_its_extra_says_what_to_install(
    missing: str, out: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing or name.startswith("memc.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without(missing), *sys.meta_path])
    assert main(["serve", out]) == 6
    shown = capsys.readouterr().err
    assert shown.startswith(f"E602 {missing} is not installed") and "pip install 'memc[serve]'" in shown


class _Without:
    """Finds no module of one name, as if it were not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(name=self.name)

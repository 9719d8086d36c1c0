"""generate, eval, bench and serve on an artifact in memory; lower on a small real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest

from memc import api, plugins, runtime
from memc.artifact import read_manifest
from memc.cli import main
from memc.report import models as m
from memc.report.read import read_report
from memc.report.tools import ServeDocument
from tests.core.runtime_fakes import CORPUS, byte_tokenizer, make_artifact, metaspace_tokenizer
from tests.core.tiny import tiny_program


@pytest.fixture(autouse=True)
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("fake", "tests.core.runtime_fakes:FakeBackend", "memc.backends")
    known = plugins.registered

    def registered(group: str) -> dict[str, EntryPoint]:
        return {**known(group), **({"fake": point} if group == "memc.backends" else {})}

    monkeypatch.setattr(plugins, "registered", registered)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(make_artifact(tmp_path / "out", tokenizer=byte_tokenizer()))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(CORPUS))
    return str(tmp_path / "text.txt")


Capture = pytest.CaptureFixture[str]


def test_generate_streams_to_stdout_and_figures_to_stderr(out: str, capsys: Capture) -> None:
    words = ["generate", out, "--prompt", "the quick", "--max-new-tokens", "5", "--seed", "3", "--temperature", "0.8"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert main([*words, "--json"]) == 0
    document = m.GenerateDocument.model_validate_json(capsys.readouterr().out)
    assert shown.out == document.text + "\n"
    assert "tokens/s; state" in shown.err
    assert shown.err.rstrip().endswith("seed 3")
    assert (document.new_tokens, document.seed, document.stopped) == (5, 3, "length")


@pytest.mark.parametrize("words", [["--top-p", "1.5"], ["--temperature", "-1"], ["--max-new-tokens", "0"]])
def test_generate_refuses_options_out_of_range(out: str, capsys: Capture, words: list[str]) -> None:
    assert main(["generate", out, "--prompt", "a", *words]) == 2
    assert capsys.readouterr().err.startswith("E200")


def test_eval_alone_and_against(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["eval", out, "--text", text, "--context", "16", "--json"]) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert alone.sides["a"].perplexity
    assert alone.ratio is None
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    assert main(["eval", out, "--text", text, "--context", "16", "--against", other, "--json", "-q"]) == 0
    both = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert both.sides["a"] == alone.sides["a"]
    assert (both.ratio, both.top1_agreement) == (1.0, 1.0)
    assert main(["eval", out, "--text", text, "--context", "16", "--against", other]) == 0
    assert "perplexity ratio" in capsys.readouterr().out


def test_eval_of_token_ids_needs_no_tokenizer(text: str, tmp_path: Path, capsys: Capture) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(Path(text).read_text()).ids
    np.save(tmp_path / "ids.npy", ids)
    bare, named = str(make_artifact(tmp_path / "bare")), str(make_artifact(tmp_path / "named", tokenizer=tokenizer))
    found = []
    for out, source in ((bare, str(tmp_path / "ids.npy")), (named, text)):
        assert main(["eval", out, "--text", source, "--context", "16", "--json", "-q"]) == 0
        found.append(m.EvalDocument.model_validate_json(capsys.readouterr().out).sides["a"].perplexity)
    assert found[0] == found[1] and found[0]
    assert main(["eval", bare, "--text", str(tmp_path / "ids.npy"), "--against", bare, "--context", "16", "-q"]) == 0
    np.save(tmp_path / "ids.npy", [0.5])
    assert main(["eval", bare, "--text", str(tmp_path / "ids.npy"), "-q"]) == 2
    assert "no token ids" in capsys.readouterr().err


def test_eval_refuses_different_tokenizers(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=metaspace_tokenizer()))
    assert main(["eval", out, "--text", text, "--against", other, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different tokenizers")


def test_eval_refuses_a_window_of_one(out: str, text: str, capsys: Capture) -> None:
    assert main(["eval", out, "--text", text, "--context", "1"]) == 2
    assert "at least 2 tokens" in capsys.readouterr().err


def test_eval_of_several_windows_and_free_running(out: str, text: str, tmp_path: Path, capsys: Capture) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    words = ["eval", out, "--text", text, "--contexts", "16,4,999", "--against", other, "--free-run", "9", "--json"]
    assert main(words) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert [row.context for row in document.by_context] == [4, 16, 999]
    for side in document.sides.values():
        assert [row.context for row in side.by_context] == [4, 16, 999]
        assert (side.perplexity, side.tokens) == (side.by_context[-1].perplexity, side.by_context[-1].tokens)
    assert document.window == 999
    assert "no window of 999 is full" in document.warnings[0]
    assert document.free_running is not None
    assert document.free_running.first_difference == [9] * document.free_running.prompts
    assert (document.free_running.equal_before, document.free_running.equal) == (1.0, 1.0)
    assert main(["eval", out, "--text", text, "--context", "4", "--json"]) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert alone.sides["a"].by_context == document.sides["a"].by_context[:1]
    assert alone.free_running is None


def test_free_running_where_it_does_not_fit(tmp_path: Path, text: str, capsys: Capture) -> None:
    out = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=40))
    words = ["eval", out, "--text", text, "--context", "16", "--against", out, "--json", "-q"]
    assert main(words) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert document.free_running is None
    assert "256 new tokens are past the capacity of 40" in document.warnings[0]
    assert main([*words, "--free-run", "40"]) == 2
    assert capsys.readouterr().err.startswith("E206")
    assert main([*words, "--free-run", "30"]) == 0
    document = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert document.free_running is not None
    assert (document.free_running.prompt_tokens, document.free_running.new_tokens) == (10, 30)
    assert main([*words, "--free-run", "0"]) == 0
    assert m.EvalDocument.model_validate_json(capsys.readouterr().out).warnings == []


def test_eval_of_tasks(out: str, tmp_path: Path, capsys: Capture) -> None:
    words = ["eval", out, "--task", "mqar:pairs=2,gap=9,passkey", "--lengths", "300,400", "--samples", "2", "--json"]
    assert main(words) == 0
    alone = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    cells = alone.sides["a"].cells
    assert list(alone.sides["a"].tasks) == ["mqar:pairs=2,gap=9", "passkey"]
    assert [(cell.task, cell.length, cell.depth) for cell in cells] == [
        *(("mqar:pairs=2,gap=9", length, None) for length in (300, 400)),
        *(("passkey", length, depth) for length in (300, 400) for depth in (0.0, 0.25, 0.5, 0.75, 1.0)),
    ]
    assert {(cell.samples, cell.questions, cell.chance) for cell in cells} == {(2, 4, 0.5), (2, 2, None)}
    assert (alone.samples, alone.seed, alone.window) == (2, 0, None)
    other = str(make_artifact(tmp_path / "other", tokenizer=byte_tokenizer()))
    assert main([*words, "--against", other, "-q"]) == 0
    both = m.EvalDocument.model_validate_json(capsys.readouterr().out)
    assert both.sides["a"] == alone.sides["a"]
    assert both.sides["b"].cells == alone.sides["a"].cells
    assert main([*words[:-1], "--against", other]) == 0
    shown = capsys.readouterr()
    assert "by chance, %: mqar:pairs=2,gap=9 50" in shown.out
    assert "passkey at 400 tokens ... " in shown.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], "E200", "--text FILE, --task NAME"),
        (["--task", "pass_key"], "E202", "did you mean 'passkey'?"),
        (["--task", "mqar:pairs=0"], "E203", "at least 1"),
        (["--task", "passkey", "--lengths", "50"], "E200", "needs"),
        (["--task", "copy", "--lengths", "41"], "E206", "past the capacity of 40"),
        (["--task", "mqar", "--lengths", "a"], "E200", "positive numbers"),
        (["--text", "TEXT", "--context", "4", "--contexts", "4,8"], "E200", "exclude each other"),
        (["--text", "TEXT", "--contexts", "1,8"], "E200", "at least 2 tokens"),
        (["--text", "TEXT", "--contexts", "8,64"], "E206", "past the capacity of 40"),
    ],
)
def test_eval_refuses(tmp_path: Path, text: str, capsys: Capture, words: list[str], code: str, said: str) -> None:
    capacity = None if "50" in words else 40
    out = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=capacity))
    assert main(["eval", out, *(text if word == "TEXT" else word for word in words), "-q"]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(code) and said in shown.err
    assert shown.out == ""


def test_eval_refuses_tasks_that_an_artifact_cannot_do(tmp_path: Path, out: str, capsys: Capture) -> None:
    encoder = str(make_artifact(tmp_path / "encoder", tokenizer=byte_tokenizer(), decoder=False))
    assert main(["eval", encoder, "--task", "copy", "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208")
    bare = str(make_artifact(tmp_path / "bare"))
    assert main(["eval", bare, "--task", "passkey", "-q"]) == 3
    assert capsys.readouterr().err.startswith("E308")
    assert main(["eval", bare, "--task", "copy", "--samples", "1", "--lengths", "70", "-q"]) == 0
    metaspace = str(make_artifact(tmp_path / "metaspace", tokenizer=metaspace_tokenizer()))
    assert main(["eval", out, "--task", "copy", "--against", metaspace, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different tokenizers")
    larger = str(make_artifact(tmp_path / "larger", vocab_size=500))
    assert main(["eval", bare, "--task", "copy", "--against", larger, "-q"]) == 2
    assert capsys.readouterr().err.startswith("E208 the two have different vocabularies")


def test_eval_tells_a_missing_side_before_converting_the_other(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    words = ["eval", str(tmp_path / "model.gguf"), "--task", "copy", "--against", str(tmp_path / "missing")]
    assert main(words) == 3
    shown = capsys.readouterr().err
    assert shown.startswith("E309") and "converted" not in shown


def test_an_artifact_that_keeps_a_model_configuration_is_no_model(tmp_path: Path, capsys: Capture) -> None:
    out = make_artifact(tmp_path / "out", tokenizer=byte_tokenizer(), files={"config.json": {}})
    assert main(["eval", str(out), "--task", "copy", "--lengths", "70", "--samples", "1"]) == 0
    assert "is a model" not in capsys.readouterr().err


def test_eval_of_a_real_artifact_answers_the_same_through_both_backends(tmp_path: Path, capsys: Capture) -> None:
    words = ["--task", "mqar:pairs=3,joint_recall:contexts=2,keys=2,queries=3,copy:asked=4"]
    words += ["--lengths", "24", "--samples", "6", "--json", "-q"]
    sides = []
    for backend in ("eager", "onnx"):
        api.convert(tiny_program(), tmp_path / backend, passes=["window:window=8,sinks=2"], backend=backend)
        assert main(["eval", str(tmp_path / backend), *words]) == 0
        sides.append(m.EvalDocument.model_validate_json(capsys.readouterr().out).sides["a"])
    assert sides[0].cells == sides[1].cells
    assert [cell.questions for cell in sides[0].cells] == [18, 18, 24]


def test_bench_takes_turns_and_leaves_out_what_does_not_fit(out: str, tmp_path: Path, capsys: Capture) -> None:
    small = str(make_artifact(tmp_path / "small", tokenizer=byte_tokenizer(), capacity=40))
    words = ["bench", out, "--against", small, "--contexts", "60,16", "--steps", "6", "--json"]
    assert main(words) == 0
    document = m.BenchDocument.model_validate_json(capsys.readouterr().out)
    assert [(row.context, row.side) for row in document.rows] == [(16, "a"), (16, "b"), (60, "a")]
    assert "past the capacity of b" in document.warnings[0]
    for row in document.rows:
        assert row.decode_ms_p90 >= row.decode_ms_median > 0
        assert min(row.prefill_tokens_per_s, row.decode_tokens_per_s, row.state_bytes, row.rss_bytes) > 0
    assert main(["bench", small, "--contexts", "512"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("E206")


def test_bench_of_other_tokenizers_says_so_and_eval_refuses(
    out: str, text: str, tmp_path: Path, capsys: Capture
) -> None:
    other = str(make_artifact(tmp_path / "other", tokenizer=metaspace_tokenizer()))
    bare = str(make_artifact(tmp_path / "bare"))
    for against, said in ((other, True), (bare, False), (out, False)):
        assert main(["bench", out, "--against", against, "--contexts", "8", "--steps", "1", "--json"]) == 0
        document = m.BenchDocument.model_validate_json(capsys.readouterr().out)
        assert any("different tokenizers" in warning for warning in document.warnings) == said
    assert main(["eval", out, "--text", text, "--against", other]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("E208 the two have different tokenizers")


def test_bench_draws(out: str, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "bench.html"
    assert main(["bench", out, "--contexts", "8,16", "--steps", "1", "--html", str(page)]) == 0
    assert "context" in capsys.readouterr().out and page.read_text().count("<svg") == 3
    assert main(["bench", out, "--contexts", "8", "--steps", "1", "--html", str(tmp_path / "no" / "x.html")]) == 2
    assert "folder of the page does not exist" in capsys.readouterr().err


class Binding:
    """``llama_cpp`` as its documentation has it, as far as memc calls it: a model of byte tokens that counts."""

    __version__ = "0.3.16"

    class Llama:
        def __init__(
            self, model_path: str, *, n_ctx: int, n_gpu_layers: int, n_threads: int, n_threads_batch: int, verbose: bool
        ) -> None:
            if not Path(model_path).read_bytes().startswith(b"GGUF"):
                raise ValueError(f"Failed to load model from file: {model_path}")
            assert n_gpu_layers == 0 and n_threads == n_threads_batch == 1 and not verbose
            self.context, self.n_tokens = n_ctx, 0

        def n_ctx(self) -> int:
            return self.context

        def n_vocab(self) -> int:
            return 400

        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
            return [1] * add_bos + list(text)

        def reset(self) -> None:
            self.n_tokens = 0

        def eval(self, tokens: Sequence[int]) -> None:
            assert all(0 <= token < 400 for token in tokens)
            self.n_tokens += len(tokens)
            assert self.n_tokens <= self.context

        def save_state(self) -> SimpleNamespace:
            return SimpleNamespace(llama_state_size=100 * self.n_tokens)


def test_bench_takes_a_file_in_llama_cpp(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", Binding)  # type: ignore[arg-type]
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    against = f"llama.cpp:{tmp_path / 'model.gguf'}"
    words = ["bench", out, "--contexts", "8,40", "--steps", "2", "--threads", "1", "--json", "--against"]
    assert main([*words, against]) == 0
    document = m.BenchDocument.model_validate_json(capsys.readouterr().out)
    assert document.sides == {"a": out, "b": f"{against} (llama-cpp-python 0.3.16)"}
    held = [row.state_bytes for row in document.rows if row.side == "b"]
    assert held == [100 * (8 + 2 + 4), 100 * (40 + 2 + 4)], "after the prompt, the warm-up and the steps, no more"
    assert any("different tokenizers" in warning for warning in document.warnings)
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    assert main([*words, against]) == 3
    assert "E302 llama.cpp cannot read the file" in capsys.readouterr().err
    assert main([*words, against + "x"]) == 3
    assert "E301" in capsys.readouterr().err


def test_without_its_binding_llama_cpp_is_refused_with_what_installs_it(
    out: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["bench", out, "--against", "llama.cpp:model.gguf"]) == 6
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "E602 llama-cpp-python is not installed Next: pip install llama-cpp-python"
    assert main(["eval", out, "--text", text, "--against", "llama.cpp:model.gguf"]) == 2
    assert "E208 llama.cpp can only be timed" in capsys.readouterr().err


def test_lower_makes_a_second_artifact(tmp_path: Path, capsys: Capture) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    api.convert(tiny_program(), first, passes=["window:window=8,sinks=2"], backend="eager")
    words = ["lower", str(first), "--target", "cpu", "-o", str(second)]
    assert main([*words, "--backend", "onnx", "--weights", "fp16"]) == 6
    assert capsys.readouterr().err.startswith("E601")
    assert not second.exists()
    assert main([*words, "--backend", "onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.lower/1"
    assert [check["passed"] for check in document["checks"]] == [True]
    assert read_manifest(second, verify=True).backend == "onnx"
    ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    assert runtime.load(second).logits(ids) == pytest.approx(runtime.load(first).logits(ids), abs=1e-4)
    report = read_report(second)
    assert report.convert is not None
    assert (report.convert.backend, report.convert.out) == ("onnx", str(second))
    assert main([*words, "--backend", "eager"]) == 2
    assert capsys.readouterr().err.startswith("E204")
    assert main([*words, "--backend", "eager", "--force", "-q"]) == 0
    assert read_manifest(second).backend == "eager"
    assert main(["lower", str(first), "--target", "cpu", "-o", str(first), "--force"]) == 2


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

"""bench on an artifact in memory: turns, other tokenizers, llama.cpp."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from memc.cli import main
from memc.report import models as m
from tests.core.runtime_fakes import byte_tokenizer, make_artifact, metaspace_tokenizer

pytestmark = pytest.mark.usefixtures("fake_backend")

Capture = pytest.CaptureFixture[str]


def test_bench_takes_turns_and_leaves_out_what_does_not_fit(
    out: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr("memc.machine.memory_bytes", lambda: 1 << 20)
    assert main(["bench", out, "--contexts", "16,200000"]) == 5
    assert "E501 timing after 200000 tokens needs" in capsys.readouterr().err


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

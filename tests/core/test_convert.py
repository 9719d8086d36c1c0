"""A tiny Llama on disk becomes an artifact, or nothing at all."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import memc
from memc import api, partial, plugins
from memc.artifact import read_manifest
from memc.cli import main
from memc.errors import MemcError
from memc.frontend import capture
from memc.program import Program
from memc.recipe import Recipe, Verify
from memc.report.files import CaptureReport, PassReportFile, RaiseReport, VerifyReport
from memc.report.models import ConvertDocument
from memc.verify import VerificationText, past
from tests.core.toy import Toy

ANY_TIME = Verify(budgets={"decode_time_ratio": 100.0, "prompt_time_ratio": 100.0})
"""Models as small as those of the tests get no faster: tests/core/test_speed.py is about time."""


TRAINED = 128
"""Positions of :func:`make_llama`."""


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, layers: int = 2, hidden: int = 40) -> Path:
    """Save a random Llama whose every dimension is distinct, and a tokenizer of bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    register_toy(monkeypatch.setitem)


def register_toy(setitem: object) -> None:
    """Make ``toy`` a known pass."""
    setitem(plugins.BUILTIN["memc.passes"], "toy", "tests.core.toy:Toy")  # type: ignore[operator]
    plugins.registered.cache_clear()


@pytest.fixture(scope="module")
def program(llama: Path) -> Program:
    """The same model, captured once."""
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(llama)
    tokens = torch.arange(14).reshape(2, 7)
    return capture(Logits(module), (tokens, torch.arange(7).expand(2, 7).contiguous()), name="tiny-llama")


class Logits(torch.nn.Module):
    """A Hugging Face model as a function of tokens and positions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits
        return logits


def run(llama: Path | Program, out: Path, *passes: str, **options: object) -> ConvertDocument:
    return api.convert(llama, out, passes=passes, backend="eager", recipe=Recipe(recipe=1), **options)  # type: ignore[arg-type]


@pytest.mark.usefixtures("beside")
def test_a_model_becomes_a_verified_artifact(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = run(llama, out, "window:window=8,sinks=2", seed=3)
    assert document.verified and not document.untrained and not document.dry_run
    assert [(facts.spec, facts.sites) for facts in document.passes] == [("window:window=8,sinks=2", 2)]
    assert document.passes[0].relation == "perplexity_ratio" and (document.passes[0].value or 0) > 0
    assert {"capture", "raise", "lower", "verify", "window:window=8,sinks=2"} <= set(document.measured.steps)  # type: ignore[union-attr]
    times = document.measured
    assert times is not None and times.decode_ms.keys() == times.original_decode_ms.keys() != set()
    names = {check.name for check in document.checks}
    assert names == {"raised_logits", "split_invariance", "perplexity_ratio", "kl_mean", "lowered_logits"}
    manifest = read_manifest(out, verify=True)
    assert manifest.backend == "eager" and manifest.source == llama.name
    assert manifest.trained_positions == TRAINED
    assert {"recipe.yaml", "tokenizer.json", "program/program.json", "program/params.safetensors"} <= set(
        manifest.files
    )
    assert not list(out.glob("stage-*")) and not (tmp_path / "out.partial").exists()
    report = out / "report"
    CaptureReport.model_validate_json((report / "00-capture.json").read_text())
    assert len(RaiseReport.model_validate_json((report / "01-raise.json").read_text()).blocks) == 4
    assert PassReportFile.model_validate_json((report / "02-window.json").read_text()).timing.seconds > 0
    assert VerifyReport.model_validate_json((report / "verify.json").read_text()).passed
    assert ConvertDocument.model_validate_json((report / "convert.json").read_text()) == document
    assert "seed 3" in json.loads((report / "text.json").read_text())["origin"]


def test_the_command_of_a_report_makes_the_same_again(
    llama: Path, program: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(llama, tmp_path / "a b", "window:window=8,sinks=2", seed=3, threads=1)
    assert first.machine and first.measured is not None and first.measured.at.endswith("+00:00")
    name, *words = shlex.split(first.command)
    assert name == "memc" and main([*words, "--json", "-q"]) == 0
    again = ConvertDocument.model_validate_json(capsys.readouterr().out)
    assert again.out == f"{tmp_path}/a b-again" and again.checks == first.checks
    before, after = (read_manifest(Path(made.out)).files for made in (first, again))
    assert before == after
    assert run(program, tmp_path / "program", dry_run=True).command == ""


def test_the_artifact_runs_and_equals_the_model(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    run(llama, tmp_path / "out")
    tokens = np.arange(22).reshape(2, 11)
    import memc

    found = memc.load(tmp_path / "out").logits(tokens)
    expected = LlamaForCausalLM.from_pretrained(llama)(torch.from_numpy(tokens)).logits.detach().numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_bfloat16_checkpoint_is_verified_in_float32(tmp_path: Path) -> None:
    document = run(make_llama(tmp_path / "half", torch.bfloat16, layers=1), tmp_path / "out", "window:window=8")
    assert document.verified


def test_a_model_too_large_for_float32_keeps_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.conversion.planning.SMALL", 0)
    document = run(make_llama(tmp_path / "half", torch.bfloat16, layers=1), tmp_path / "out", "window:window=8")
    assert document.verified


def test_a_dry_run_plans_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    shutil.copyfile(llama / "config.json", (tmp_path / "config.json"))
    document = run(tmp_path, tmp_path / "out", "window:window=8,keep=[1]", dry_run=True)
    assert document.dry_run and not document.verified and document.measured is None
    (facts,) = document.passes
    assert facts.sites == 1 and [(skip.layer, skip.code) for skip in facts.skipped] == [(1, "kept")]
    assert document.original is not None
    assert document.predicted.state_bytes[32768] < document.original.state_bytes[32768]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_a_dry_run_misses_data_that_are_not_there(program: Program, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.txt")
    with pytest.raises(MemcError, match=r"E207 data file cannot be read: No such file.*none\.txt"):
        run(program, tmp_path / "out", dry_run=True, data=[missing])


def test_a_pass_says_that_an_earlier_one_took_its_blocks(program: Program, tmp_path: Path) -> None:
    with pytest.raises(MemcError, match=r"E307 .*no block of its kind that no earlier pass rewrote"):
        run(program, tmp_path / "out", "window:window=8", "linearize:window=8", dry_run=True)


def test_keys_rotated_in_one_of_two_parts_have_positions_of_another_kind(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
    config = DeepseekV3Config(vocab_size=67, num_key_value_heads=4, first_k_dense_replace=1, **sizes, **latent)
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(tmp_path)
    block = api.inspect(tmp_path).blocks[0]
    assert (block.kind, block.head_dim, block.value_dim, block.positions) == ("attention", 10, 8, "other")


def test_inspect_reads_the_configuration_alone(llama: Path, tmp_path: Path) -> None:
    shutil.copyfile(llama / "config.json", tmp_path / "config.json")
    document = api.inspect(tmp_path, contexts=(7,))
    attention = [block for block in document.blocks if block.kind == "attention"]
    assert [(b.heads, b.kv_heads, b.head_dim, b.mask, b.positions) for b in attention] == [
        (4, 2, 10, "causal", "rotary")
    ] * 2
    feed = [block for block in document.blocks if block.kind == "feed_forward"]
    assert [(b.activation, b.gated, b.hidden) for b in feed] == [("silu", True, 40)] * 2
    assert document.state_bytes == {7: 2 * 7 * (2 * 2 * 10 * 4 + 8)} and document.flops_per_token > 0


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        ("toy:op=shift,by=0.01,relation=close", "E401"),
        ("toy:op=nan,relation=close", "E403"),
        ("toy:op=nothing", "E307"),
    ],
)
def test_a_pass_that_fails_leaves_no_output(program: Program, tmp_path: Path, spec: str, code: str) -> None:
    with pytest.raises(MemcError, match=code):
        run(program, tmp_path / "out", spec)
    assert not (tmp_path / "out").exists()
    error = tmp_path / "out.partial" / "report" / "error.json"
    assert error.exists() is (code != "E307")
    if error.exists():
        assert json.loads(error.read_text())["code"] == code


def test_values_that_are_not_finite_are_found(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MemcError, match=r"E403.*layers\.1\.mlp\.up_proj\.weight"):
        run(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lowered_program_that_is_wrong_is_refused(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memc.backends.eager import EagerRunner

    right = EagerRunner.run
    monkeypatch.setattr(EagerRunner, "run", lambda *args: right(*args) + np.float32(0.01))
    with pytest.raises(MemcError, match=r"E401.*lowered_logits.*0\.01"):
        run(program, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(program, out)
    with pytest.raises(MemcError, match=r"E204.*this recipe.*--force"):
        run(program, out)
    with pytest.raises(MemcError, match=r"E204.*another artifact.*--force"):
        run(program, out, seed=1)
    before = (out / "memc.json").read_bytes()
    run(program, out, force=True)
    assert (out / "memc.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_foreign_output_is_refused(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*file"):
        run(program, tmp_path / "file", force=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*no artifact.*--force"):
        run(program, folder)
    monkeypatch.chdir(folder)
    with pytest.raises(MemcError, match=r"E204.*cannot be replaced"):
        run(program, folder, force=True)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("mine")
    with pytest.raises(MemcError, match=r"E204.*in the way"):
        run(program, tmp_path / "new", fresh=True)
    assert (folder / "mine.txt").read_text() == (tmp_path / "new.partial" / "mine.txt").read_text() == "mine"


def killed_writing(patch: pytest.MonkeyPatch, name: str) -> None:
    """Have a kill come when half of the file of a name is written, which stays where it is made."""
    whole = partial.replacing

    @contextmanager
    def half(path: Path) -> Iterator[Path]:
        if path.name != name:
            with whole(path) as beside:
                yield beside
            return
        yield (beside := partial.partial_of(path))
        os.truncate(beside, beside.stat().st_size // 2)
        raise KeyboardInterrupt

    patch.setattr(partial, "replacing", half)


@pytest.mark.parametrize("name", ["resume.json", "text.json", "00-capture.json", "convert.json"])
def test_a_kill_while_a_file_is_written_is_gone_on_from(
    name: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        killed_writing(patch, name)
        with pytest.raises(KeyboardInterrupt):
            run(program, tmp_path / "out")
    assert run(program, tmp_path / "out").verified
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_another_recipe_needs_fresh_where_something_was_finished(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MemcError, match="E401"):
        run(program, out, "toy:op=shift,by=0", "toy:op=shift,by=0.01,relation=close")
    assert list((tmp_path / "out.partial").glob("stage-*"))
    with pytest.raises(MemcError, match=r"E204.*--fresh"):
        run(program, out)
    assert list((tmp_path / "out.partial").glob("stage-*"))
    assert run(program, out, fresh=True).verified


def test_another_recipe_starts_over_where_nothing_was_finished(program: Program, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MemcError, match="E401"):
        run(program, out, "toy:op=shift,by=0.01,relation=close")
    assert (tmp_path / "out.partial" / "report" / "error.json").is_file()
    assert run(program, out).verified and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model"'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("special_tokens_map.json", "3"),
        ("generation_config.json", "[" * 100_000),
        ("generation_config.json", '{"eos_token_id": "w1"}'),
        ("generation_config.json", '{"do_sample": true, "temperature": "hot"}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_broken_file_beside_the_weights_is_refused_by_name(
    llama: Path, tmp_path: Path, name: str, content: str | bytes
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for dry_run in (True, False):
        with pytest.raises(MemcError) as caught:
            run(folder, tmp_path / "out", dry_run=dry_run)
        assert caught.value.code == "E302" and caught.value.where.endswith(name) and "leave it out" in caught.value.next
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_said_before(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MemcError, match=r"E502 output needs \d+ KiB of disk, 0\.977 KiB are free"):
        run(program, tmp_path / "out")
    monkeypatch.setattr("memc.machine.memory_bytes", lambda: 1000)
    with pytest.raises(MemcError, match="E501"):
        run(program, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_the_backend_refuses_are_said_before(program: Program, tmp_path: Path) -> None:
    with pytest.raises(MemcError, match="E601"):
        run(program, tmp_path / "out", weights="int4")


def test_data_is_read_and_kept(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{i * i % 67}" for i in range(100)))
    run(llama, tmp_path / "out", data=[str(data)], tokens=0)
    text = json.loads((tmp_path / "out" / "report" / "text.json").read_text())
    assert text["tokens"] == [[i * i % 67 for i in range(100)]] and "text.txt" in text["origin"]
    data.write_text("w1 w2")
    with pytest.raises(MemcError, match="E207"):
        run(llama, tmp_path / "other", data=[str(data)])


SCRIPT = """
import sys
from pathlib import Path
from tests.core.test_convert import killable
killable(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


def killable(llama: Path, out: Path, trigger: str) -> ConvertDocument:
    """Convert with two passes of which the second is killed while ``trigger`` exists."""
    torch.set_num_threads(1)
    register_toy(dict.__setitem__)
    return run(llama, out, "window:window=8,sinks=2", f"toy:kill={trigger}")


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    llama = make_llama(tmp_path / "model", layers=1)
    trigger = tmp_path / "kill"
    trigger.touch()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(llama), str(tmp_path / "a"), str(trigger)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    killed = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "a.partial" / "stage-02").is_dir() and not (tmp_path / "a").exists()
    trigger.unlink()
    resumed = killable(llama, tmp_path / "a", str(trigger))
    assert [facts.resumed for facts in resumed.passes] == [True, False]
    killable(llama, tmp_path / "b", str(trigger))
    first, second = (read_manifest(tmp_path / name).files for name in "ab")
    assert first == second and Toy.name in (tmp_path / "a" / "recipe.yaml").read_text()


SPARSE = "sparsify:method=bounds,budget=16,page=4,sinks=1,window=5,dense_below=24"


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_a_sparse_artifact_is_checked_where_it_chooses(llama: Path, tmp_path: Path, backend: str) -> None:
    recipe = Recipe(recipe=1)
    document = api.convert(llama, tmp_path / "out", passes=[SPARSE], backend=backend, recipe=recipe, context=100)
    assert document.verified
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    close, ratio = document.passes[0].relations
    assert (close.tokens, close.passed) == (24, True)
    assert ratio.value is not None and ratio.value != 1.0, "measured past what is read whole"
    page_bytes = 2 * 2 * 2 * 10 * 4
    assert document.original is not None
    for context, held in document.predicted.state_bytes.items():
        assert held - document.original.state_bytes[context] == -(-context // 4) * page_bytes
        less = document.original.bytes_read_per_token[context] - document.predicted.bytes_read_per_token[context]
        assert less == 2 * 2 * 10 * 4 * (2 * context - 2 * -(-context // 4) - 2 * 16 - 16)
    session = memc.load(tmp_path / "out")
    assert session.generate("w1 w2 w3", max_new_tokens=40, seed=1).ids


@pytest.mark.parametrize(
    ("chosen_by", "exact", "backend"),
    [
        ("method=bounds,bits=4,rerank=2", 4, "eager"),
        ("method=bounds,bits=4,rerank=2", 4, "onnx"),
        ("method=hip,refresh=4,rerank=1", 24, "eager"),
        ("method=bounds,levels=2,beam=1", 24, "onnx"),
        ("method=lowbit,refresh=4,mass=0.6", 24, "onnx"),
        ("method=em,rerank=1,longest=4,calls=9", 24, "onnx"),
        pytest.param(
            "method=em,rerank=1,longest=4,calls=9,refine=conductance", 24, "tvm", marks=pytest.mark.conformance
        ),
    ],
)
def test_an_artifact_with_a_state_of_its_own_is_checked_saved_and_restored(
    llama: Path, tmp_path: Path, chosen_by: str, exact: int, backend: str
) -> None:
    spec, recipe = SPARSE.replace("method=bounds", chosen_by), Recipe(recipe=1)
    document = api.convert(llama, tmp_path / "out", passes=[spec], backend=backend, recipe=recipe, context=100)
    assert document.verified
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    close, _ = document.passes[0].relations
    assert (close.tokens, close.passed) == (exact, True), "with bits a page"
    session = memc.load(tmp_path / "out")
    state = session.new_state()
    session.prefill([list(range(1, 28))], state)
    session.save(state, tmp_path / "state.npz")
    again = session.load_state(tmp_path / "state.npz")
    for token in (3, 5):
        assert np.array_equal(session.step([token], state), session.step([token], again))


@pytest.mark.parametrize(("method", "backend"), [("longheads", "onnx"), ("infllm", "eager")])
def test_an_artifact_runs_beyond_the_trained_length(llama: Path, tmp_path: Path, method: str, backend: str) -> None:
    spec = f"sparsify:method={method},budget=32,page=4,sinks=1,window=8,dense_below=0"
    options = {"backend": backend, "recipe": Recipe(recipe=1), "context": 8 * TRAINED}
    document = api.convert(llama, tmp_path / "out", passes=[spec], **options)
    assert document.verified and not document.warnings
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    session = memc.load(tmp_path / "out")
    state = session.new_state()
    session.prefill([[n % 30 for n in range(8 * TRAINED - 2)]], state)
    assert np.isfinite(session.step([3], state)).all()
    for others in (f"{spec},keep=[0]", SPARSE):
        (warning,) = api.convert(llama, tmp_path / "other", passes=[others], dry_run=True, **options).warnings
        assert warning.startswith(f"beyond_trained: context {8 * TRAINED}")


def test_a_relation_is_measured_past_what_is_exact() -> None:
    tokens = torch.arange(80).reshape(2, 40)
    text = VerificationText(tokens, "made")
    assert past(text, None, None) is text and past(text, 39, None) is text
    longer = past(text, 100, None)
    assert longer.tokens.shape == (1, 356) and torch.equal(longer.tokens[0, :160], torch.arange(80).repeat(2))
    assert longer.origin == "made, repeated to 356 tokens"
    assert past(text, 100, 128).tokens.shape == (1, 128)
    assert past(text, 100, 90) is text

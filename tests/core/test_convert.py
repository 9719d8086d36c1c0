"""A tiny Llama on disk becomes an artifact, or nothing at all."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import memc
from memc import api
from memc.artifact import read_manifest
from memc.cli import main
from memc.errors import MemcError
from memc.program import Program
from memc.report.files import CaptureReport, PassReportFile, RaiseReport, VerifyReport
from memc.report.models import ConvertDocument
from tests.core.converting import TRAINED, make_llama, run

pytestmark = pytest.mark.usefixtures("toy")


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
    with pytest.raises(MemcError, match=r"E601 .*\[--weights int4\] Next: one of: fp32, bf16, fp16$"):
        run(program, tmp_path / "out", weights="int4")
    with pytest.raises(MemcError, match=r"E601 .* not for cpu \[--target cpu\] Next: --backend onnx, or another"):
        api.convert(program, tmp_path / "out", backend="triton", weights="bf16")


def test_data_is_read_and_kept(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{i * i % 67}" for i in range(100)))
    run(llama, tmp_path / "out", data=[str(data)], tokens=0)
    text = json.loads((tmp_path / "out" / "report" / "text.json").read_text())
    assert text["tokens"] == [[i * i % 67 for i in range(100)]] and "text.txt" in text["origin"]
    data.write_text("w1 w2")
    with pytest.raises(MemcError, match="E207"):
        run(llama, tmp_path / "other", data=[str(data)])

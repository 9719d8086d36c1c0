"""A model that is too large for a float32 copy is converted from its file, or refused before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from memc import api
from memc.artifact import read_manifest
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.program import get_tensor
from memc.program_io import load_program
from memc.raising import raise_program
from memc.raising.evaluate import evaluate
from memc.recipe import Recipe
from memc.verify import run_nodes
from memc.verify.execute import whole_all
from memc.verify.inputs import positions_of
from memc.weights import materialize, open_safetensors, program_dtype
from tests.core.converting import make_llama, run


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny bfloat16 Llama that is treated as one that does not fit."""
    monkeypatch.setattr("memc.conversion.planning.SMALL", 0)
    return make_llama(tmp_path / "half", torch.bfloat16)


def test_half_precision_is_raised_as_float32_is(half: Path) -> None:
    raised = raise_program(capture_source(half, remote_code=False, weights=True).program)
    assert program_dtype(raised.program) == torch.bfloat16 and not raised.near_misses
    ops = [str(node.target) for node in raised.program.module.graph.nodes]
    assert ops.count("memc.rotary.default") == 4 and ops.count("memc.attention.default") == 2


def test_evaluation_does_not_round_to_half_precision() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    rounded = graph.call_function(torch.ops.aten.to.dtype, (x, torch.bfloat16))
    copied = graph.call_function(torch.ops.aten._to_copy.default, (rounded,), {"dtype": torch.float16})
    graph.output((copied,))
    value = torch.tensor([1.0 / 3.0])
    found = evaluate(torch.fx.GraphModule(torch.nn.Module(), graph), [copied], {x: value})[0]
    assert found.dtype == torch.float32 and torch.equal(found, value)


@pytest.mark.parametrize("spec", ["linearize:window=8", "window:window=8"])
def test_a_model_in_its_file_is_converted_with_every_check(half: Path, tmp_path: Path, spec: str) -> None:
    document = api.convert(half, tmp_path / "out", passes=[spec], weights="int4", recipe=Recipe(recipe=1))
    assert document.verified and document.passes[0].sites == 2
    names = {check.name for check in document.checks}
    assert {"raised_logits", "split_invariance", "perplexity_ratio", "kl_mean", "lowered_logits"} <= names
    kept = load_program(tmp_path / "out" / "program")
    assert get_tensor(kept.module, "model.embed_tokens.weight").dtype == torch.bfloat16
    read_manifest(tmp_path / "out", verify=True)


def test_parameters_are_mapped_and_converted_one_at_a_time(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture_source(half, remote_code=False, weights=True)
    assert captured.weights is not None and captured.weights.held_bytes(torch.bfloat16) == 0
    assert captured.weights.held_bytes(torch.float32) > 0
    program = materialize(captured.program, captured.weights)
    held: list[int] = []

    def visit(node: torch.fx.Node, value: object) -> None:
        if node.op == "get_attr":
            assert isinstance(value, torch.Tensor)
            held.append(value.dtype == torch.float32 and value.dim() == 2)

    tokens = torch.arange(10).reshape(2, 5)
    run_nodes(program, (tokens, positions_of(tokens)), precision=torch.float32, visit=visit)
    assert held and not any(held)


def test_texts_side_by_side_give_what_they_give_alone(half: Path) -> None:
    captured = capture_source(half, remote_code=False, weights=True)
    assert captured.weights is not None
    program = materialize(raise_program(captured.program).program, captured.weights)
    texts = [torch.randint(67, size, generator=torch.Generator().manual_seed(1)) for size in ((1, 1), (3, 2), (2, 9))]
    for tokens, found in zip(texts, whole_all(program, texts), strict=True):
        assert torch.equal(found, whole_all(program, [tokens])[0])


def test_a_pass_writes_the_model_once(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    from memc import program_io

    write = program_io.write_tensors
    monkeypatch.setattr(program_io, "write_tensors", lambda path, tensors: (written.append(path), write(path, tensors)))
    api.convert(half, tmp_path / "out", passes=["window:window=8"], weights="int4", recipe=Recipe(recipe=1))
    assert [path.parent.name for path in written] == ["stage-02.writing"]
    assert (tmp_path / "out" / "program" / "params.safetensors").stat().st_nlink == 1


def test_what_does_not_fit_is_refused_before_anything_is_written(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memc.conversion import planning

    captured = capture_source(half, remote_code=False, weights=True)
    largest = max(value.numel() for value in captured.program.module.parameters())
    room = planning.WORKING * 4 * largest
    monkeypatch.setattr("memc.machine.memory_bytes", lambda: room + captured.program.parameter_count * 4 - 1)
    options = {"passes": ["window:window=8"], "recipe": Recipe(recipe=1)}
    with pytest.raises(MemcError, match=r"E501 .*GB of memory for its fp32 weights.*this machine has") as refused:
        api.convert(half, tmp_path / "out", weights="fp32", **options)  # type: ignore[arg-type]
    assert refused.value.next == "--weights int4"
    monkeypatch.setattr("memc.machine.memory_bytes", lambda: room)
    with pytest.raises(MemcError, match="E501") as refused:
        api.convert(half, tmp_path / "out", weights="int4", **options)  # type: ignore[arg-type]
    assert refused.value.next == "convert on a machine with more memory"
    assert not (tmp_path / "out.partial").exists()


def test_disk_for_every_copy_is_asked_before(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = open_safetensors(half)
    assert size is not None
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(MemcError, match="E502"):
        run(half, tmp_path / "out", "window:window=8")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.conformance
def test_memory_of_a_conversion_is_that_of_a_layer(tmp_path: Path) -> None:
    """377 M parameters take 1.5 GB in float32; a float32 copy is more than what the whole conversion may take."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    count = sum(value.numel() for value in model.parameters())
    layer = 4 * sum(value.numel() for value in model.model.layers[0].parameters())
    table = 4 * model.lm_head.weight.numel()
    model.save_pretrained(tmp_path / "model", max_shard_size="200MB")
    del model
    command = [sys.executable, "-m", "memc", "convert", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    command += ["--target", "cpu", "--recipe", "long-context", "--weights", "int4", "--threads", "1", "--json"]
    # glibc keeps what is freed in blocks under 32 MiB, which the parameters of a large model are not.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    peaks = peak_of(command, env)
    base = peak_of([sys.executable, "-c", "import memc.conversion.driver, onnxruntime, transformers"], env)
    assert json.loads((tmp_path / "out" / "report" / "convert.json").read_text())["verified"]
    # Twice a layer and a table on their way, the int4 weights that the runtime packs, the tracers and kernels.
    allowed = 2 * (layer + table) + 0.7 * count + 300e6
    assert peaks - base < allowed < 0.7 * 4 * count, (peaks, base, layer)


def peak_of(command: list[str], env: dict[str, str]) -> int:
    """Run a command and return the peak of its anonymous memory in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True)
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        peak = max(peak, int(found[1]) * 1024 if found else 0)
        time.sleep(0.02)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read()
    return peak

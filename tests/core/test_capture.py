"""Capture of every family: the raw program computes what the model computes, and keeps its facts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from memc.errors import MemcError
from memc.frontend import Captured, capture, capture_source, huggingface
from memc.frontend.huggingface import model_info, trace_model
from memc.frontend.recast import recast
from memc.program import Program
from memc.weights import materialize
from tests import families

QUICK = ("llama", "gemma2", "gpt2", "mixtral", "bert", "t5", "vit", "minimal_gpt", "torch_mha")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.conformance) for name in families.FAMILIES]


raw = functools.cache(families.raw_program)


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    module, _ = families.build(name)
    module.to(dtype).save_pretrained(folder)
    return module


def error(program: Program, reference: object, batch: int, length: int) -> float:
    inputs = families.inputs_of(program, batch, length)
    with torch.no_grad():
        return float((program(*inputs)[0] - reference(*inputs)).abs().max())  # type: ignore[operator]


@pytest.mark.parametrize("name", EVERY)
def test_family_is_plain_aten_that_computes_what_the_model_computes(name: str) -> None:
    program, reference = raw(name)
    sizes = [(2, 7), (1, 1), (3, 19), (2, 2), (1, families.POSITIONS)]
    assert max(error(program, reference, *size) for size in sizes) < 1e-5
    assert program.inputs[0].shape[0] == "B" and program.outputs[0].name == "logits"
    check_plain(program)
    encoders = ("bert", "roberta", "distilbert", "vit", "t5", "torch_encoder")
    assert program.model.decoder == (name not in encoders)
    if program.model.decoder:
        assert [spec.role for spec in program.inputs] == ["tokens", "positions"]
        assert program.outputs[0].shape == ("B", "T", families.VOCAB)


def check_plain(program: Program) -> None:
    program.module.graph.lint()
    for node in program.module.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten" and not node.target._schema.is_mutable
            assert "_assert" not in node.name
        if node.op in ("placeholder", "get_attr", "call_function"):
            assert "val" in node.meta and set(node.meta["memc"]) == {"path", "source", "line"}
    assert not program.module._forward_pre_hooks
    assert type(program.module.graph._codegen) is torch.fx.graph.CodeGen


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox"])
def test_checkpoint_loads_in_the_layout_of_the_hub(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    captured = capture_source(tmp_path)
    assert captured.program.is_fake and captured.weights is not None
    program = materialize(captured.program, captured.weights)
    assert not program.is_fake and captured.program.is_fake
    assert error(program, raw(name)[1], 3, 9) == 0.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Captured]:
    folder = tmp_path_factory.mktemp("llama")
    save("llama", folder)
    (folder / "LICENSE.txt").write_text("terms")
    return folder, capture_source(folder)


def test_plan_needs_no_weights(llama: tuple[Path, Captured], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama[0] / "config.json").read_text())
    captured = capture_source(tmp_path, weights=False)
    assert captured.weights is None and captured.program.is_fake
    devices = {node.meta["val"].device.type for node in captured.program.module.graph.find_nodes(op="get_attr")}
    assert devices == {"cpu"} and "meta" not in captured.program.module.code
    assert captured.program.parameter_count == llama[1].program.parameter_count


def test_tied_parameters_stay_one(llama: tuple[Path, Captured]) -> None:
    captured = llama[1]
    assert captured.weights is not None
    program = materialize(captured.program, captured.weights)
    names = [name for name, _ in program.module.named_parameters(remove_duplicate=False)]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    uses = next(n for n in program.module.graph.nodes if n.target == "model.embed_tokens.weight").users
    assert {str(user.target) for user in uses} == {"aten.embedding.default", "aten.linear.default"}
    assert (
        program.provenance["model.embed_tokens.weight"].source
        in captured.weights.provenance("model.embed_tokens.weight").source
    )
    assert "model.rotary_emb.inv_freq" not in program.provenance


def test_nodes_know_where_they_come_from(llama: tuple[Path, Captured]) -> None:
    nodes = llama[1].program.module.graph.nodes
    attention = next(n for n in nodes if "scaled_dot_product" in n.name).meta["memc"]
    assert attention["path"] == "model.layers.0.self_attn"
    assert attention["source"].startswith("modeling_llama.py:") and "attention" in attention["line"]


def test_files_and_info(llama: tuple[Path, Captured]) -> None:
    folder, captured = llama
    assert {p.name for p in captured.tokenizer_files} == {"config.json", "generation_config.json", "LICENSE.txt"}
    info = captured.program.model
    assert (info.family, info.vocab_size, info.max_positions) == ("llama", families.VOCAB, families.POSITIONS)
    assert not info.absolute_positions and info.source == folder.name and len(info.digest) == 64


@pytest.mark.parametrize(("name", "absolute"), [("gpt2", True), ("minimal_gpt", True), ("bert", True), ("t5", False)])
def test_absolute_positions_are_seen(name: str, absolute: bool) -> None:
    info = raw(name)[0].model
    assert info.absolute_positions is absolute
    assert not absolute or info.max_positions == families.POSITIONS


def test_checkpoint_keeps_its_dtype_and_may_be_recast(tmp_path: Path) -> None:
    save("gemma2", tmp_path, torch.bfloat16)
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    captured = capture_source(tmp_path)
    assert captured.weights is not None
    kept = materialize(captured.program, captured.weights)
    widened = capture_source(tmp_path, float32_below=1e9)
    assert widened.weights is not None
    wide = materialize(widened.program, widened.weights)
    assert {p.dtype for p in kept.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.module.parameters()} == {torch.float32}
    tokens = torch.arange(22).view(2, 11)
    with torch.no_grad():
        assert torch.equal(kept.run(tokens), module(tokens).logits)
        wider = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(wide.run(tokens), wider(tokens).logits)
    assert recast(captured.program, torch.float32).outputs[0].dtype == torch.float32


class Oddities(nn.Module):
    """No-grad regions, in-place ops and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        with torch.enable_grad():
            y = x * 2
        y += 1
        y[:, :, 0:].clone().mul_(0)
        return self.head(torch.relu_(y - 1))


def test_module_is_captured_with_its_own_parameters() -> None:
    module = Oddities()
    program = capture(module, (torch.zeros(2, 7, dtype=torch.int64),))
    tokens = torch.arange(12).view(3, 4) % 11
    assert torch.equal(program(tokens, tokens)[0], module(tokens))
    assert next(program.module.parameters()) is module.embed.weight
    assert program.parameter_count == 66 + 11 and program.model.vocab_size == 11
    loss = program(tokens, tokens)[0].sum()
    loss.backward()
    assert module.embed.weight.grad is not None


@pytest.mark.parametrize("shape", [(1, 7), (2, 1), (3, 3)])
def test_ambiguous_example_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(MemcError, match="ambiguous"):
        capture(Oddities(), (torch.zeros(shape, dtype=torch.int64),))


@pytest.mark.parametrize(
    ("module", "example", "expected"),
    [
        (torch.nn.Linear(8, 5), (3, 8), ("B", 8)),
        (torch.nn.Linear(8, 5), (2, 7, 8), ("B", "T", 8)),
        (torch.nn.Conv2d(3, 4, 3), (2, 3, 9, 9), ("B", 3, 9, 9)),
    ],
)
def test_floats_have_a_length_where_there_is_one(
    module: torch.nn.Module, example: tuple[int, ...], expected: tuple[int | str, ...]
) -> None:
    value = torch.randn(example)
    program = capture(module, value)
    assert program.inputs[0].shape == expected and not program.model.decoder
    more = torch.randn(example[0] + 2, *example[1:])
    torch.testing.assert_close(program(more)[0], module(more))


@pytest.mark.parametrize("shape", [(8, 8), (1, 8), (2, 7, 7), (2, 2, 8), (2, 8, 2)])
def test_an_example_of_floats_that_is_ambiguous_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(MemcError, match=r"E305 example input .* is ambiguous"):
        capture(torch.nn.Linear(8, 5), (torch.randn(shape),))


@pytest.mark.parametrize("examples", [None, 3, (), ("x",), (torch.tensor(1.0),)])
def test_what_is_no_example_is_refused(examples: Any) -> None:
    with pytest.raises(MemcError, match="E305 example inputs are"):
        capture(torch.nn.Linear(8, 5), examples)
    with pytest.raises(MemcError, match="E305 3 is no nn"):
        capture(3, examples)  # type: ignore[arg-type]


class Branches(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()[:, :, None]
        if x.sum() > 3:
            return x
        return x + 1


class WritesView(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.float()[:, :, None] * 1
        x[:, :, 0].add_(1)
        return x


def test_writes_into_views_are_captured() -> None:
    program = capture(WritesView(), (torch.zeros(2, 7, dtype=torch.int64),))
    check_plain(program)
    tokens = torch.arange(12).view(3, 4) % 11
    assert torch.equal(program(tokens, tokens)[0], WritesView()(tokens))


_SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({**_SCALED, **_FACTORS, "rope_type": "longrope"}, 16),
        ({"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0}, families.POSITIONS),
    ],
    ids=["longrope", "dynamic"],
)
def test_frequencies_chosen_by_the_length_stay_those_of_short_calls(scaling: dict[str, object], limit: int) -> None:
    config = LlamaConfig(**families.GROUPED, rope_parameters=scaling)
    original, traced = (huggingface.build(config, "", dtype=torch.float32) for _ in range(2))
    traced.load_state_dict(original.state_dict())
    program = trace_model(traced, model_info(config, "", ""))
    assert program.model.max_positions == limit
    tokens = torch.randint(3, families.VOCAB, (2, limit + 1))
    with torch.no_grad():
        within = program.run(tokens[:, :limit]) - original(tokens[:, :limit]).logits
        past = program.run(tokens) - original(tokens).logits
    assert within.abs().max() < 1e-5 < past.abs().max()


class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.add_(1)
        return tokens.float()[:, :, None] + self.calls


@pytest.mark.parametrize(
    ("module", "line"),
    [(Branches(), "if x.sum() > 3"), (CountsCalls(), "")],
    ids=["data-dependent branch", "changed buffer"],
)
def test_what_cannot_be_captured_names_the_users_line(
    module: nn.Module, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MemcError) as caught:
        capture(module, (torch.zeros(2, 7, dtype=torch.int64),), decoder=True)
    assert caught.value.code == "E305" and line in caught.value.where and caught.value.next
    assert capfd.readouterr() == ("", "")


class SevenTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.float().view(-1, 7)[:, :, None]


def test_a_fixed_length_is_said() -> None:
    with pytest.raises(MemcError, match="specialized it to be a constant"):
        capture(SevenTokens(), (torch.zeros(2, 7, dtype=torch.int64),))

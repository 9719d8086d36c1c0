"""The eager backend: lowered and loaded again, a program gives what it gave; states, weights types and refusals."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import memc.kernels  # noqa: F401
from memc import __version__
from memc.artifact import SCHEMA, Manifest
from memc.backend import Lowered, LowerOptions, No
from memc.backends.eager import EagerBackend, EagerRunner, EagerState
from memc.backends.eager.precision import store_weights
from memc.errors import MemcError
from memc.infer import infer
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, Provenance, StateSpec
from memc.target import Target, get_target

VOCAB, WIDTH, WINDOW = 13, 8, 3
ATEN, MEMC = torch.ops.aten, torch.ops.memc
CPU = Target(name="cpu", description="", kind="cpu", backend="eager", instruction_set="any")
SOURCE = Target(name="c", description="", kind="source", backend="tvm", instruction_set="any")


def tiny_program(dtype: torch.dtype = torch.float32) -> Program:
    """Embedding, growing attention, window, linear memory with a gate that memc made, tied head; two heads of 4."""
    root = nn.Module()
    root.emb = nn.Parameter(torch.randn(VOCAB, WIDTH).to(dtype))
    root.head = root.emb
    root.gate = nn.Parameter(-torch.rand(1, 1, 1, 1))
    graph = Graph()
    tokens, positions = graph.placeholder("tokens"), graph.placeholder("positions")
    states = [
        StateSpec("k", dtype, ("B", 2, "S", 4), 0.0, 2),
        StateSpec("v", dtype, ("B", 2, "S", 4), 0.0, 2),
        StateSpec("p", torch.int64, ("B", "S"), -1, 1),
        StateSpec("wk", dtype, ("B", 2, WINDOW + 1, 4)),
        StateSpec("wv", dtype, ("B", 2, WINDOW + 1, 4)),
        StateSpec("wp", torch.int64, ("B", WINDOW + 1), -1),
        StateSpec("memory", torch.float32, ("B", 2, 4, 4)),
    ]
    held = [graph.placeholder(spec.name) for spec in states]
    call, item = graph.call_function, lambda node, index: graph.call_function(operator.getitem, (node, index))
    x = call(ATEN.embedding.default, (graph.get_attr("emb"), tokens))
    heads = call(ATEN.permute.default, (call(ATEN.unflatten.int, (x, 2, [2, 4])), [0, 2, 1, 3]))
    first = call(MEMC.attention.default, (heads, heads, heads, positions, *held[:3]), {"scale": 0.5})
    y = item(first, 0)
    second = call(
        MEMC.window_memory.default, (y, y, y, positions, *held[3:6]), {"scale": 0.5, "window": WINDOW, "sinks": 1}
    )
    z = item(second, 0)
    ones = call(
        ATEN.mul.Tensor, (call(ATEN.slice.Tensor, (call(ATEN.abs.default, (z,)), 3, 0, 1)), graph.get_attr("gate"))
    )
    third = call(MEMC.linear_memory.default, (z, z, z, ones, positions, held[6]))
    mixed = call(ATEN.add.Tensor, (item(third, 0), call(ATEN._to_copy.default, (heads,), {"dtype": dtype})))
    flat = call(ATEN.flatten.using_ints, (call(ATEN.permute.default, (mixed, [0, 2, 1, 3])), 2))
    logits = call(ATEN.linear.default, (flat, graph.get_attr("head")))
    after = [item(first, i) for i in (1, 2, 3)] + [item(second, i) for i in (5, 6, 7)] + [item(third, 1)]
    graph.output((logits, *after))
    program = Program(
        GraphModule(root, graph),
        (
            InputSpec("tokens", "tokens", torch.int64, ("B", "T")),
            InputSpec("positions", "positions", torch.int64, ("B", "T")),
        ),
        (OutputSpec("logits", dtype, ("B", "T", VOCAB)),),
        tuple(states),
        ModelInfo("tiny", "0" * 64, "tiny", vocab_size=VOCAB),
        {"emb": Provenance("emb.weight"), "head": Provenance("emb.weight"), "gate": Provenance("", "linearize")},
        raised=True,
    )
    infer(program)
    return program


def manifest(lowered: Lowered, target: str = "cpu") -> Manifest:
    return Manifest(
        schema=SCHEMA, version=__version__, source="tiny", source_digest="0" * 64, family="tiny", target=target,
        backend="eager", weights="fp32", lowered=lowered.path, inputs=lowered.inputs, outputs=lowered.outputs,
        states=lowered.states, capacity=lowered.capacity,
    )  # fmt: skip


def loaded(program: Program, folder: Path, weights: str = "fp32") -> EagerRunner:
    lowered = EagerBackend().lower(program, CPU, folder, LowerOptions(weights))
    runner = EagerBackend().load(folder, manifest(lowered))
    assert isinstance(runner, EagerRunner)
    return runner


def text(batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.broadcast_to(np.arange(tokens), (batch, tokens)).copy()
    return np.random.default_rng(0).integers(0, VOCAB, (batch, tokens)), positions


def test_a_lowered_program_gives_what_it_gave(tmp_path: Path) -> None:
    program = tiny_program()
    runner = loaded(program, tmp_path)
    tokens, positions = text(2, 9)
    whole = runner.run(tokens, positions, runner.new_state(2))
    torch.testing.assert_close(torch.from_numpy(whole), program.run(torch.from_numpy(tokens)).detach(), rtol=0, atol=0)
    state = runner.new_state(2)
    parts = [runner.run(tokens[:, a:b], positions[:, a:b], state) for a, b in ((0, 4), (4, 5), (5, 9))]
    # Logits reach 400 here, where neighbouring float32 numbers are 3e-5 apart.
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-6, atol=1e-5)
    kept = runner.run(tokens, positions, runner.new_state(2), keep=np.array([8, 2]))
    np.testing.assert_array_equal(kept, whole[:, [8, 2]])
    assert state.arrays()["k"].shape[2] == 9


def test_states_copy_select_save_and_restore(tmp_path: Path) -> None:
    runner = loaded(tiny_program(), tmp_path)
    tokens, positions = text(2, 6)
    state = runner.new_state(2)
    runner.run(tokens[:, :5], positions[:, :5], state)
    copy, swapped = state.copy(), state.select([1, 0, 1])
    saved = runner.restore(state.arrays())
    assert saved.bytes == state.bytes > 0
    last = [runner.run(tokens[:, 5:], positions[:, 5:], each) for each in (state, copy, saved)]
    np.testing.assert_array_equal(last[0], last[1])
    np.testing.assert_array_equal(last[0], last[2])
    turned = runner.run(tokens[[1, 0, 1], 5:], positions[[1, 0, 1], 5:], swapped)
    np.testing.assert_allclose(turned, last[0][[1, 0, 1]], atol=1e-6)
    assert isinstance(swapped, EagerState)
    assert swapped.batch == 3


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_stored_as_asked(tmp_path: Path, native: torch.dtype, stored: str) -> None:
    program = tiny_program(native)
    before = {name: value.clone() for name, value in program.module.named_parameters()}
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[stored]
    narrow = store_weights(program, kind)
    assert narrow.module.emb.dtype == kind
    assert narrow.module.emb is narrow.module.head
    assert narrow.module.gate.dtype == torch.float32
    tokens, positions = text(2, 7)
    runner = loaded(program, tmp_path, stored)
    logits = runner.run(tokens, positions, runner.new_state(2))
    for name, value in program.module.named_parameters():
        assert torch.equal(value, before[name])
    wide = store_weights(program, torch.float32)
    wide.module.emb.data.copy_(before["emb"].to(kind))
    expected = wide.run(torch.from_numpy(tokens)).detach()
    near = 1e-6 if native != kind or kind == torch.float32 else 0.15
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=near, atol=near)
    assert runner.program.module.emb is runner.program.module.head
    if native != kind:
        assert all(
            not str(node.target).startswith("aten._to_copy") or node.args[0].op != "get_attr"
            for node in runner.program.module.graph.nodes
        )


def test_a_rounded_weight_is_found(tmp_path: Path) -> None:
    program = tiny_program()
    runner = loaded(program, tmp_path, "bf16")
    tokens, positions = text(1, 5)
    rounded = torch.from_numpy(runner.run(tokens, positions, runner.new_state(1)))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(rounded, program.run(torch.from_numpy(tokens)).detach())


@pytest.mark.parametrize(
    ("target", "weights", "word"), [(SOURCE, "fp32", "does not run"), (CPU, "int4", "int4"), (CPU, "int8", "quantised")]
)
def test_refusals_come_before_anything_is_written(tmp_path: Path, target: Target, weights: str, word: str) -> None:
    with pytest.raises(MemcError, match=word) as caught:
        EagerBackend().lower(tiny_program(), target, tmp_path, LowerOptions(weights))
    assert caught.value.code == "E601"
    assert not list(tmp_path.iterdir())


def test_an_op_of_a_stranger_is_refused() -> None:
    graph = Graph()
    node = graph.call_function(torch.ops.quantized.add.default, ())
    assert isinstance(EagerBackend().supports(node, CPU), No)


def test_a_foreign_state_is_refused(tmp_path: Path) -> None:
    runner = loaded(tiny_program(), tmp_path)
    arrays = runner.new_state(1).arrays()
    with pytest.raises(MemcError, match="missing"):
        runner.restore({name: value for name, value in arrays.items() if name != "memory"})
    with pytest.raises(MemcError, match="shape"):
        runner.restore({**arrays, "memory": np.zeros((1, 2, 4, 5))})


def test_a_gpu_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = EagerBackend().lower(tiny_program(), CPU, tmp_path, LowerOptions())
    assert get_target("nvidia-sm90").kind == "gpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MemcError, match="GPU") as caught:
        EagerBackend().load(tmp_path, manifest(lowered, "nvidia-sm90"))
    assert caught.value.code == "E602"


def test_the_program_trains_through_every_op() -> None:
    program = tiny_program()
    loss = program.run(torch.randint(0, VOCAB, (2, 9))).square().mean()
    loss.backward()
    gradients: list[Tensor | None] = [p.grad for p in program.module.parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)

"""Every dialect op, run in pieces by the triton backend with interpreted kernels, equals the reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import numpy as np
import op_programs as ops
import pytest
import torch

from memc.backends.triton.graph import prepare
from memc.errors import MemcError
from memc.kernels.launch import Jit
from tests.backends.runs import SCENARIOS, Calls, compare, span
from tests.backends.triton_support import interpret
from tests.core.test_families import DECODERS, every, raised
from tests.families import FAMILIES, inputs_of

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = 1e-4

QUICK = {"gated delta": ("pieces",), "llama, window": ("pieces", "padding"), "llama, dense": ("pieces",)}
"""Cases, and scenarios of them, that together go through most kernels in little time."""

INTERPRETED = [case for case in ops.ON_GPUS if case not in ("sparse, compact", "sparse, clipped")]
"""All cases but two that have a twin with every option, and whose kernels take longest to interpret."""


@pytest.mark.conformance
@pytest.mark.parametrize("case", INTERPRETED)
def test_op_in_place_equals_reference(case: str) -> None:
    program = ops.CASES[case]()
    runner = interpret(program)
    # Interpreted, each token of a sparse case is a hundred programs; tests/kernels/ has more of them.
    names: Iterable[str] = SCENARIOS
    if case.startswith("sparse"):
        names = ("padding",) if any(word in case for word in ops.ASIDE) else ("pieces", "padding", "restart")
    elif case.startswith("llama"):  # of ops that each go through every scenario alone
        names = ("pieces", "padding", "restart inside")
    worst = {name: compare(program, runner, SCENARIOS[name]) for name in names}
    assert max(worst.values()) < TOLERANCE, worst


@pytest.mark.parametrize("case", QUICK)
def test_kernels_run_a_program_in_pieces(case: str) -> None:
    program = ops.CASES[case]()
    runner = interpret(program)
    for scenario in QUICK[case]:
        assert compare(program, runner, SCENARIOS[scenario]) < TOLERANCE, scenario


@pytest.mark.parametrize("name", every([name for name in FAMILIES if name not in DECODERS]))
def test_an_encoder_runs_as_the_program(name: str) -> None:
    program = raised(name)[0].program
    inputs = inputs_of(program, 2, 5)
    named = {spec.name: value.numpy() for spec, value in zip(program.inputs, inputs, strict=True)}
    runner = interpret(program)
    with torch.no_grad(), patch.object(Jit, "__call__", autospec=True, side_effect=Jit.__call__) as launched:
        found = torch.from_numpy(np.array(runner.run(None, None, runner.new_state(2), None, named)))
        torch.testing.assert_close(found, program(*inputs)[0], rtol=0, atol=TOLERANCE)
    assert "attention.prompt" in {call.args[1].kernel for call in launched.call_args_list}


def test_prefix_in_one_call() -> None:
    program = ops.attention(prefix=3)
    runner = interpret(program)
    calls: Calls = [([span(0, 5), span(0, 2, right=3)], None), ([span(5, 2), [-1, -1]], None)]
    assert compare(program, runner, calls) < TOLERANCE


def test_states_are_copied_saved_and_restored() -> None:
    program = ops.llama("attention", layers=1)
    runner = interpret(program)
    tokens = np.arange(12).reshape(2, 6) % ops.VOCAB
    positions = np.tile(np.arange(6), (2, 1))
    state = runner.new_state(2)
    runner.run(tokens, positions, state)
    saved, copied, swapped = state.arrays(), state.copy(), state.select([1, 0])
    assert all(array.shape[2 if array.ndim == 4 else 1] == 6 for array in saved.values())
    restored = runner.restore(saved)
    after = [runner.run(tokens[:, :1], positions[:, -1:] + 1, each) for each in (state, copied, restored, swapped)]
    assert np.array_equal(after[0], after[1]) and np.array_equal(after[0], after[2])
    assert not np.array_equal(after[0], after[3])
    saved.popitem()
    with pytest.raises(MemcError, match="another artifact"):
        runner.restore(saved)


def test_ids_out_of_range_and_tokens_past_the_capacity_are_refused() -> None:
    runner = interpret(ops.llama("attention", layers=1), context=4)
    for tokens, positions, code in (([[ops.VOCAB]], [[0]], "E200"), ([[0]], [[4]], "E206")):
        with pytest.raises(MemcError) as refused:
            runner.run(np.array(tokens), np.array(positions), runner.new_state(1))
        assert refused.value.code == code


def test_what_is_fetched_is_sent_once_for_as_long_as_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = interpret(ops.bank_ffn("silu"))
    (port,) = (port for port in runner.manifest.inputs if port.role == "fetched")
    sent: list[np.ndarray] = []
    send = runner._fed
    monkeypatch.setattr(runner, "_fed", lambda array, dtype: (sent.append(array), send(array, dtype))[1])
    one, other = (np.full(port.nothing(1).shape, value, np.float32) for value in (0.1, 0.2))
    for block in (one, other):
        block.setflags(write=False)
    tokens, positions = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64)
    found = [
        runner.run(tokens, positions, runner.new_state(1), inputs={port.name: block})
        for block in (one, one, other, one)
    ]
    assert [array is one for array in sent if array.shape == one.shape] == [True, False, True]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[2])
    changing = one.copy()
    before = runner.run(tokens, positions, runner.new_state(1), inputs={port.name: changing})
    changing[:] = other
    after = runner.run(tokens, positions, runner.new_state(1), inputs={port.name: changing})
    assert np.array_equal(before, found[0]) and np.array_equal(after, found[2])


@pytest.mark.parametrize("kind", ["attention", "window_memory"])
def test_one_graph_of_torch_compile_serves_every_length(kind: str) -> None:
    """No graph breaks, and no more graphs than one for prompts and one for steps."""
    program = ops.llama(kind, layers=1)
    prepared = prepare(program)
    made: list[torch.fx.GraphModule] = []

    def count(module: torch.fx.GraphModule, _: Any) -> Any:
        made.append(module)
        return module.forward

    torch._dynamo.reset()
    run = torch.compile(prepared.module, backend=count, fullgraph=True, dynamic=True)
    state = interpret(program).new_state(2).tensors
    with torch.no_grad():
        for tokens in (5, 9, 17, 1, 1, 3):
            ids = torch.zeros(2, tokens, dtype=torch.int64)
            run(ids, torch.full((2, tokens), -1), torch.arange(tokens), *state.values())
    assert len(made) <= 2

"""What the tvm backend promises besides the values of single ops."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import op_programs as ops
import pytest
import torch
from tvm.script import tirx as T
from tvm_support import build, lower

from memc import api
from memc.artifact import read_manifest
from memc.backend import No, Yes
from memc.backends.tvm import TvmBackend, library, support
from memc.backends.tvm import runner as running
from memc.backends.tvm.isa import Tile
from memc.backends.tvm.kernels import dots
from memc.dialect import OPS, arguments, op_spec
from memc.errors import Exit, MemcError
from memc.plugins import load_plugin
from memc.program import Program
from memc.target import get_target
from tests.backends.runs import compare
from tests.core.tiny import tiny_program

CPU = get_target("cpu")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    lower(ops.llama("attention", layers=1), folder)
    return folder


def load(folder: Path) -> running.TvmRunner:
    return TvmBackend().load(folder, read_manifest(folder), 1)  # type: ignore[return-value]


# ---- the library


def test_states_are_written_in_place_and_the_table_is_stored_once(decoder: Path) -> None:
    manifest, info = read_manifest(decoder), json.loads((decoder / "lowered/tvm/library.json").read_text())
    assert all(state.update == "alias" for state in manifest.states)
    assert [state.shape for state in manifest.states] == [["B", 2, "S/16", 8, 16], ["B", 2, "S", 8]]
    assert sum("embedding" in name for name in info["parameters"]) == 1
    assert info["limits"] == {"tokens": 37}
    runner, positions = load(decoder), np.array([[0, 1, 2]])
    state = runner.new_state(1)
    before = {name: array.ctypes.data for name, array in state.current.items()}
    runner.run(positions, positions, state)
    assert before == {name: array.ctypes.data for name, array in state.current.items()}
    assert state.current["past_value0"][0, 0, :3].any(axis=-1).all()
    assert not state.current["past_value0"][0, 0, 3:].any()


def test_state_round_trip_and_rows(decoder: Path) -> None:
    runner = load(decoder)
    positions = np.array([[0, 1, 2, 3], [-1, 0, 1, 2]])
    state = runner.new_state(2)
    runner.run(np.maximum(positions, 0), positions, state)
    copies = [state.copy(), runner.restore(state.arrays()), state.select([1, 0])]
    at = np.array([[4], [3]])
    want = runner.run(at, at, state)
    for copy, rows in zip(copies, ([0, 1], [0, 1], [1, 0]), strict=True):
        np.testing.assert_array_equal(runner.run(at[rows], at[rows], copy), want[rows])


def test_threads_change_nothing(decoder: Path) -> None:
    positions = np.array([np.arange(11), np.arange(11) - 1])
    one, two = load(decoder), TvmBackend().load(decoder, read_manifest(decoder), 2)
    found = two.run(np.maximum(positions, 0), positions, two.new_state(2))
    np.testing.assert_array_equal(one.run(np.maximum(positions, 0), positions, one.new_state(2)), found)
    load(decoder)  # the pool of threads is the process's


def test_the_caller_may_run_where_it_could_before(decoder: Path) -> None:
    allowed = os.sched_getaffinity(0)
    runner = TvmBackend().load(decoder, read_manifest(decoder), 2)
    runner.run(np.zeros((1, 3), np.int64), np.arange(3)[None], runner.new_state(1))
    assert os.sched_getaffinity(0) == allowed


def test_a_run_imports_no_torch_and_no_compiler(decoder: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from memc.artifact import read_manifest;"
        "from memc.backends.tvm import TvmBackend; f = Path(sys.argv[1]);"
        "r = TvmBackend().load(f, read_manifest(f), 1); p = np.arange(5)[None];"
        "assert np.isfinite(r.run(p, p, r.new_state(1))).all();"
        "maps = Path('/proc/self/maps').read_text();"
        "assert 'torch' not in sys.modules and 'tvm' not in sys.modules and 'libtvm_compiler' not in maps"
    )
    subprocess.run([sys.executable, "-c", code, str(decoder)], check=True)


@pytest.mark.conformance
def test_same_program_same_parameters_and_results(tmp_path: Path) -> None:
    """TVM orders some of its code by addresses, so that libraries differ in bytes, and in nothing else."""
    digests, results = [], []
    for name in ("a", "b"):
        runner = build(ops.norm(), tmp_path / name)
        files = sorted(path for path in (tmp_path / name / "lowered" / "tvm").iterdir() if path.suffix != ".so")
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        results.append(runner.run(np.ones((1, 5), np.int64), np.arange(5)[None], runner.new_state(1)))
    assert digests[0] == digests[1] and len(digests[0]) == 2
    np.testing.assert_array_equal(*results)


def test_a_wrong_tail_loop_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(out: int, into: int, tile: Tile, *, bias: bool) -> Any:
        columns, tiles, read = tile.columns, -(-out // tile.columns), out if bias else 1

        @T.prim_func(private=True)
        def linear(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):  # type: ignore[no-untyped-def]
            m = T.int64()
            x = T.match_buffer(x_, (m, into), "float32")
            w = T.match_buffer(w_, (tiles, into, columns), "float32")
            b = T.match_buffer(b_, (read,), "float32")
            y = T.match_buffer(y_, (m, out), "float32")
            for i in T.serial(m // tile.rows * tile.rows):  # and none for the rows that are left
                for j in T.serial(out):
                    y[i, j] = b[j] if bias else T.float32(0)
                    for k in T.serial(into):
                        y[i, j] = y[i, j] + x[i, k] * w[j // columns, k, j % columns]

        return linear

    monkeypatch.setattr(dots, "linear", faulty)
    program = ops.norm()
    runner = build(program, tmp_path)
    assert compare(program, runner, [([list(range(8))], None)]) < 1e-4, "whole tiles are right"
    state, positions = runner.new_state(1), np.arange(13)[None]
    with torch.no_grad():
        want = program.run(torch.from_numpy(positions)).numpy()
    assert not np.abs(want - runner.run(positions, positions, state)).max() < 1e-4


@pytest.mark.parametrize(("axis", "index"), [(1, 0), (2, 23), (-1, 3), (-1, -24)])
def test_one_of_an_axis_is_read_from_either_end(
    axis: int, index: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = ops.selected(axis, index)
    runner = build(program, tmp_path)
    assert compare(program, runner, [([list(range(13))], None)]) < 1e-4
    assert capfd.readouterr().err == ""


def test_frequencies_that_are_computed_alike_are_told_apart(tmp_path: Path) -> None:
    b = ops.Builder()
    x = b.heads(b.embed(24), "heads", 3, 8, 24)
    for base in (100.0, 10.0):
        power = b.constant(f"power_{int(base)}", -torch.arange(4) / 4 * torch.tensor(base).log())
        frequencies = b.call(torch.ops.aten.exp.default, power)
        x = b.call(torch.ops.memc.rotary.default, x, b.positions, frequencies)
    program = b.finish(b.linear(b.merge(x), "logits", ops.VOCAB, 24))
    assert compare(program, build(program, tmp_path), [([list(range(13))], None)]) < 1e-4


def test_powers_are_right_below_zero_and_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = ops.powers(2, 3.0, 5, 2.5)
    runner = build(program, tmp_path)
    assert compare(program, runner, [([list(range(13))], None)]) < 1e-4
    assert capfd.readouterr().err == ""


def test_exponentials_by_vectors(tmp_path: Path) -> None:
    program = ops.activations()
    assert compare(program, build(program, tmp_path), [([list(range(13))], None)]) < 1e-5


# ---- what is refused


def test_every_dialect_op_has_a_form_or_a_reason() -> None:
    answers = {}
    sparse = (*(ops.sparse_attention(**o) for o in ({}, {"refresh": 2}, {"bits": 4})), ops.compact_attention())
    programs = (ops.llama("attention"), ops.window_memory(), ops.linear_memory(), ops.full_attention())
    for program in (*programs, *sparse, ops.eventful_attention(), ops.bank_ffn("silu")):
        for node in program.module.graph.nodes:
            if (spec := op_spec(node.target)) is not None:
                answers[spec.name] = TvmBackend().supports(node, CPU)
    assert all(isinstance(answer, Yes) for answer in answers.values())
    assert set(OPS) == set(answers)


def with_frequencies_made() -> Program:
    """A program that turns keys by frequencies which it computes, for which no table can be stored."""
    program = ops.compact_attention()
    node = next(n for n in program.module.graph.nodes if op_spec(n.target) is not None)
    frequencies = arguments(node)["inv_freq"]
    with program.module.graph.inserting_before(node):
        made = program.module.graph.call_function(ops.aten.mul.Tensor, (frequencies, 1.0))
        made.meta = dict(frequencies.meta)
    node.replace_input_with(frequencies, made)
    return program


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match=r"compact_attention.*by a table of angles") as refused:
        lower(with_frequencies_made(), tmp_path)
    assert refused.value.code == "E601"
    for weights in ("fp16", "bf16", "int3"):
        with pytest.raises(MemcError, match=weights):
            lower(ops.norm(), tmp_path, weights=weights)
    with pytest.raises(MemcError, match="compiles for CPUs"):
        lower(ops.norm(), tmp_path, target="amd-gfx942")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry_run", [True, False])
def test_an_op_without_a_form_is_refused_while_planning(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = support.form
    lacking = ("memc.quantised_attention",)
    monkeypatch.setattr(support, "form", lambda n: No("no form") if str(n.target).startswith(lacking) else form(n))
    spec = "sparsify:method=bounds,bits=4,budget=6,page=2,sinks=1,window=2"
    with pytest.raises(MemcError, match=r"E601 tvm cannot lower memc\.quantised_attention") as refused:
        api.convert(tiny_program(), tmp_path / "out", passes=[spec], backend="tvm", dry_run=dry_run)
    assert refused.value.next and not list(tmp_path.iterdir())


def test_an_id_out_of_range_never_reaches_the_library(decoder: Path) -> None:
    runner = load(decoder)
    for token in (37, -1, 1 << 40):
        with pytest.raises(MemcError, match="out of range") as refused:
            runner.run(np.array([[token]]), np.array([[0]]), runner.new_state(1))
        assert refused.value.code == "E200"
    with pytest.raises(MemcError, match="capacity"):
        runner.run(np.array([[1]]), np.array([[24]]), runner.new_state(1))


@pytest.mark.parametrize("name", ["model.so", "parameters.safetensors", "library.json"])
def test_a_changed_file_is_not_loaded(decoder: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(decoder), str(folder)], check=True)
    with (folder / "lowered" / "tvm" / name).open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(MemcError, match=name) as refused:
        load(folder)
    assert refused.value.code == "E402"


def test_a_library_for_another_processor_is_not_loaded(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "processor_flags", frozenset)
    with pytest.raises(MemcError, match="which this processor does not have") as refused:
        load(decoder)
    assert refused.value.exit_code == Exit.BACKEND
    monkeypatch.setattr(running.platform, "machine", lambda: "riscv64")
    with pytest.raises(MemcError, match="this machine is riscv64"):
        load(decoder)


def test_a_missing_or_wrong_tvm_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.REQUIRED, "apache-tvm-ffi", "0.0.1")
    with pytest.raises(MemcError, match="pip install apache-tvm==") as refused:
        library.require_tvm()
    assert refused.value.exit_code == Exit.BACKEND
    assert "pip install" in load_plugin("memc.backends", "tvm")().missing()
    monkeypatch.setattr(library, "REQUIRED", {"no-such-package": "1"})
    with pytest.raises(MemcError, match="not installed"):
        library.require_tvm()

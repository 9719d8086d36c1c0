"""What the onnx backend promises besides the values of single ops."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import op_programs as ops
import pytest
import torch
from onnx_support import SCENARIOS, build, compare, span
from torch.fx import Graph

from memc.artifact import read_manifest
from memc.backend import LowerOptions, No, Yes
from memc.backends.onnx import OnnxBackend
from memc.backends.onnx.runner import OnnxRunner
from memc.dialect import OPS, op_spec
from memc.errors import MemcError
from memc.quantise import quantise
from memc.target import get_target

CPU = get_target("cpu")
FILE = "lowered/onnx/model.onnx"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    return build(ops.attention(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    return build(ops.sparse_attention(layers=2, dense_below=3), tmp_path_factory.mktemp("sparse"))


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> OnnxRunner:
    return build(ops.window_memory(), tmp_path_factory.mktemp("window"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    build(ops.llama(softcap=3.0), folder)
    return folder


def feed(runner: OnnxRunner, state: object, *positions: list[int]) -> np.ndarray:
    at = np.array(positions)
    return runner.run(np.maximum(at, 0) % 37, at, state)  # type: ignore[arg-type]


# ---- the file


def test_same_program_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("a", "b"):
        build(ops.llama(layers=1), tmp_path / name, weights="int8")
        folder = tmp_path / name / "lowered" / "onnx"
        digests.append([hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())])
    assert digests[0] == digests[1]


def test_file_holds_no_weights_no_paths_and_passes_the_checker(decoder: Path) -> None:
    assert (decoder / f"{FILE}.data").is_file()
    onnx.checker.check_model(str(decoder / FILE))
    text = (decoder / FILE).read_bytes()
    assert b"site-packages" not in text and str(decoder).encode() not in text


def test_layers_share_what_depends_on_positions_alone(decoder: Path) -> None:
    model = onnx.load(decoder / FILE, load_external_data=False)
    kinds = [node.op_type.partition("_")[0] for node in model.graph.node]
    assert kinds.count("WindowPlan") == kinds.count("RotaryPlan") == 1
    assert kinds.count("WindowMemory") == 2
    assert sum(state.dtype == "int64" for state in read_manifest(decoder).states) == 1


def test_sparse_layers_share_their_plan(sparse: OnnxRunner) -> None:
    kinds = [n.op_type.partition("_")[0] for n in onnx.load(sparse.folder / FILE, load_external_data=False).graph.node]
    assert (kinds.count("SparsePlan"), kinds.count("SparseAttention")) == (1, 2)
    assert sparse.manifest.symbols["S/2"] == "pages: ceil(S / 2)"


def test_kept_columns_are_selected_before_the_last_linear(decoder: Path) -> None:
    kinds = [node.op_type for node in onnx.load(decoder / FILE, load_external_data=False).graph.node]
    assert kinds.index("Gather", 1) < len(kinds) - 1 - kinds[::-1].index("FusedMatMul")


def test_tied_embedding_is_written_once(decoder: Path) -> None:
    size = sum(p.numel() for p in ops.llama().module.parameters()) * 4
    assert (decoder / f"{FILE}.data").stat().st_size < 1.2 * size


PLAIN = """
import json, sys
import numpy as np, onnxruntime as ort
manifest = json.load(open(sys.argv[1] + "/memc.json"))
options = ort.SessionOptions()
options.log_severity_level = 3
session = ort.InferenceSession(sys.argv[1] + "/" + manifest["lowered"], options, providers=["CPUExecutionProvider"])
slots = (manifest["capacity"] or 0) + 1
size = lambda n: n if isinstance(n, int) else 2 if n == "B" else -(-slots // int(n[2:] or 1))
states = {s["input"]: np.full([size(n) for n in s["shape"]], s["init"], s["dtype"]) for s in manifest["states"]}
logits = []
for positions in ([[0, 1, 2, -1], [-1, 0, 1, 2]], [[3], [3]], [[4, 5], [-1, -1]]):
    positions = np.array(positions)
    feeds = {"tokens": np.maximum(positions, 0), "positions": positions, "keep": np.arange(positions.shape[1])}
    out = dict(zip([o.name for o in session.get_outputs()], session.run(None, {**feeds, **states})))
    states = {s["input"]: out[s["output"]] for s in manifest["states"]}
    logits.append(out[manifest["outputs"][0]["name"]])
assert not {"torch", "memc"} & set(sys.modules)
np.savez(sys.argv[2], *logits)
"""


@pytest.mark.parametrize("kind", ["swapped states", "growing states", "pages"])
def test_file_runs_in_plain_onnxruntime_from_the_manifest(
    kind: str, decoder: Path, dense: OnnxRunner, sparse: OnnxRunner, tmp_path: Path
) -> None:
    program, folder = {
        "swapped states": (ops.llama(softcap=3.0), decoder),
        "growing states": (ops.attention(), dense.folder),
        "pages": (ops.sparse_attention(layers=2, dense_below=3), sparse.folder),
    }[kind]
    assert "positions" in json.loads((folder / "memc.json").read_text())["how_to_run"]
    command = [sys.executable, "-c", PLAIN, str(folder), str(tmp_path / "got.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    got = np.load(tmp_path / "got.npz")
    state = program.new_state(2)
    for index, rows in enumerate(([[0, 1, 2, -1], [-1, 0, 1, 2]], [[3], [3]], [[4, 5], [-1, -1]])):
        positions = torch.tensor(rows)
        with torch.no_grad():
            want, *state = program(positions.clamp(min=0), positions, *state)
        np.testing.assert_allclose(got[f"arr_{index}"], want.numpy(), atol=1e-4)


def test_loading_and_running_import_no_torch(decoder: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from memc.artifact import read_manifest
from memc.backends.onnx import OnnxBackend
folder = Path(sys.argv[1])
runner = OnnxBackend().load(folder, read_manifest(folder), 1)
state = runner.new_state(1)
print(runner.run(np.array([[1, 2, 3]]), np.array([[0, 1, 2]]), state, np.array([2])).shape)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code, str(decoder)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 1, 37)"


# ---- weights


@pytest.mark.parametrize(("bits", "worst"), [(8, 1 / 127), (4, 1 / 7)])
def test_quantised_weight_is_near(bits: int, worst: float) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float32)
    back = quantise(weight, bits).values(70)
    assert np.abs(back - weight).max() <= np.abs(weight).max() * worst
    assert not quantise(np.zeros((1, 33), np.float32), bits).values(33).any()


def test_weights_that_were_stored_in_eight_bits_come_back_exactly() -> None:
    codes = np.random.default_rng(0).integers(-126, 127, (3, 64)).astype(np.float32)
    codes[:, ::32] = 127.0
    weight = codes * np.float32(0.013)
    np.testing.assert_allclose(quantise(weight, 8).values(64), weight, rtol=1e-6)


def test_four_bits_lose_less_than_one_symmetric_scale_does() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    blocks = weight.reshape(-1, 32)
    scale = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1) / -8
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    error = np.square(quantise(weight, 4).values(256) - weight).mean()
    assert error < 0.85 * np.square(plain - blocks).mean()


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8), ("int4", 4)])
def test_quantised_file_equals_eager_with_the_same_weights(weights: str, bits: int, tmp_path: Path) -> None:
    program, quantised = ops.llama(width=32), ops.llama(width=32)
    runner = build(program, tmp_path, weights=weights)
    for name, parameter in quantised.module.named_parameters():
        if parameter.dim() == 2 and name != "embedding":
            parameter.data = torch.from_numpy(quantise(parameter.detach().numpy(), bits).values(parameter.shape[1]))
    # What is left: activations rounded to 8 bits (accuracy level 4) and the tied matrix, which eager keeps in float32
    # since it is the embedding too. Logits have a deviation of 6 here.
    near = compare(quantised, runner, SCENARIOS["pieces"])
    assert near < (0.6 if bits == 8 else compare(program, runner, SCENARIOS["pieces"]) / 2)
    model = onnx.load(tmp_path / FILE, load_external_data=False)
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 9  # q, k, v and gate, up are packed
    assert not any(node.op_type in ("MatMul", "FusedMatMul") for node in model.graph.node)


@pytest.mark.parametrize("token", [-1, -ops.VOCAB, ops.VOCAB])
def test_ids_that_are_no_row_are_refused(token: int, tmp_path: Path) -> None:
    runner = build(ops.norm(), tmp_path)
    tokens = np.array([[3, token, 0]])
    with pytest.raises(MemcError, match=f"E200 an input is out of range: tokens holds {token}, which is no id"):
        runner.run(tokens, np.arange(3)[None], runner.new_state(1))


@pytest.mark.parametrize("inner", [64, 96])
def test_a_quantised_matrix_is_read_both_ways(inner: int, tmp_path: Path) -> None:
    b = ops.Builder()
    x = b.embed(64)
    down = b.call(ops.aten.matmul.default, x, b.parameter("tied", 64, inner))
    up = b.call(ops.aten.linear.default, down, b.parameter("tied", 64, inner))
    program = b.finish(b.linear(b.call(ops.aten.add.Tensor, up, x), "logits", ops.VOCAB, 64))
    runner = build(program, tmp_path, weights="int8")
    assert compare(program, runner, SCENARIOS["prompt"]) < 0.2  # of logits whose deviation is 2.2


def test_report_names_what_stays_float32(tmp_path: Path) -> None:
    lowered = OnnxBackend().lower(ops.llama(), CPU, tmp_path, LowerOptions("int4"))
    assert lowered.forms["weights"].endswith("float32 matrices: embedding")
    assert lowered.forms["rotary"].startswith("RotaryEmbedding") and lowered.capacity is None


def test_refused_weights() -> None:
    backend = OnnxBackend()
    assert "float32" in (backend.refuses_weights("bf16", CPU) or "")
    assert backend.refuses_weights("fp16", CPU)
    assert backend.refuses_weights("int4", CPU) is None
    assert backend.refuses_weights("fp32", get_target("nvidia-sm90"))
    with pytest.raises(MemcError, match="E601"):
        backend.lower(ops.norm(), CPU, Path("nowhere"), LowerOptions("fp16"))


# ---- what is supported


def test_every_dialect_op_is_supported() -> None:
    programs = (
        ops.norm(),
        ops.rotary(),
        ops.full_attention(),
        ops.window_memory(),
        ops.attention(),
        ops.sparse_attention(),
        ops.sparse_attention(refresh=2),
        ops.sparse_attention(bits=4),
        ops.compact_attention(),
        ops.eventful_attention(),
        ops.linear_memory(),
        ops.bank_ffn("silu"),
    )
    seen = {}
    for program in programs:
        for node in program.module.graph.nodes:
            spec = op_spec(node.target)
            if spec is not None:
                seen[spec.name] = OnnxBackend().supports(node, CPU)
                assert isinstance(OnnxBackend().supports(node, get_target("nvidia-sm90")), No)
    assert set(seen) == set(OPS)
    assert all(isinstance(answer, Yes) and answer.how for answer in seen.values())


def test_unknown_memc_op_is_refused() -> None:
    library = torch.library.Library("memc", "FRAGMENT")
    library.define("mystery(Tensor x) -> Tensor")
    node = Graph().call_function(torch.ops.memc.mystery.default, ())
    answer = OnnxBackend().supports(node, CPU)
    assert isinstance(answer, No) and "mystery" in answer.reason


def test_op_that_cannot_be_exported_is_named_with_its_source_line(tmp_path: Path) -> None:
    b = ops.Builder()
    odd = b.call(torch.ops.aten.special_bessel_j0.default, b.embed(8))
    odd.meta["memc"] = {"source": "model.py:7"}
    program = b.finish(b.linear(odd, "logits", ops.VOCAB, 8))
    with pytest.raises(MemcError, match="E601") as caught:
        OnnxBackend().lower(program, CPU, tmp_path / "out", LowerOptions())
    assert "bessel" in caught.value.message and caught.value.where == "model.py:7"
    assert not (tmp_path / "out").exists()


def test_changed_growing_state_is_refused(tmp_path: Path) -> None:
    program = ops.attention()
    graph = program.module.graph
    key = next(node for node in graph.nodes if node.target == "past_key0")
    with graph.inserting_after(key):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (key, 2.0))
    key.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    scaled.meta = dict(key.meta)
    with pytest.raises(MemcError, match="fixed buffer"):
        OnnxBackend().lower(program, CPU, tmp_path / "out", LowerOptions())


def test_missing_or_broken_file_is_reported(tmp_path: Path) -> None:
    build(ops.norm(), tmp_path)
    manifest = read_manifest(tmp_path)
    (tmp_path / FILE).write_bytes(b"not onnx")
    with pytest.raises(MemcError, match="E602"):
        OnnxBackend().load(tmp_path, manifest)


# ---- states


@pytest.mark.parametrize("kind", ["dense", "sparse", "window"])
def test_state_copy_select_save_and_restore(kind: str, request: pytest.FixtureRequest) -> None:
    runner: OnnxRunner = request.getfixturevalue(kind)
    state = runner.new_state(2)
    feed(runner, state, span(0, 6), span(0, 4, right=2))
    copied, swapped = state.copy(), state.select([1, 0, 1])
    restored = runner.restore(state.arrays())
    want = feed(runner, state, [6], [4])
    np.testing.assert_array_equal(feed(runner, copied, [6], [4]), want)
    np.testing.assert_array_equal(feed(runner, restored, [6], [4]), want)
    np.testing.assert_allclose(feed(runner, swapped, [4], [6], [4]), want[[1, 0, 1]], atol=1e-5)
    assert swapped.batch == 3 and state.bytes == copied.bytes


def test_growing_state_is_one_buffer_and_is_cut_when_saved(dense: OnnxRunner) -> None:
    state = dense.new_state(1)
    before = state.current["past_key0"].ctypes.data
    feed(dense, state, span(0, 5))
    assert state.current["past_key0"].ctypes.data == before
    feed(dense, state, [5])
    assert state.current["past_key0"].ctypes.data == before
    assert state.arrays()["past_key0"].shape == (1, 2, 6, 8)
    assert dense.new_state(1, capacity=50).current["past_key0"].shape[2] == 51


def test_pages_are_one_buffer_and_are_cut_when_saved(sparse: OnnxRunner) -> None:
    state = sparse.new_state(1)
    assert state.current["past_pages0"].shape == (1, 2, 13, 16)
    before = state.current["past_pages0"].ctypes.data
    feed(sparse, state, span(0, 5))
    feed(sparse, state, [5])
    assert state.current["past_pages0"].ctypes.data == before
    assert state.arrays()["past_pages0"].shape == (1, 2, 3, 16)
    feed(sparse, state, [6])
    assert state.arrays()["past_pages0"].shape == (1, 2, 4, 16)
    with pytest.raises(MemcError, match="E206"):
        sparse.restore(state.arrays(), capacity=6)


def test_swapped_states_take_turns_and_a_window_stays(window: OnnxRunner) -> None:
    state = window.new_state(1)
    seen, kept = [], []
    for position in range(4):
        feed(window, state, [position])
        seen.append(state.current["past_positions"].ctypes.data)
        kept.append(state.current["past_key"].ctypes.data)
    assert seen[0] == seen[2] != seen[1] == seen[3]
    assert len(set(kept)) == 1


def test_past_the_capacity(dense: OnnxRunner) -> None:
    assert dense.manifest.capacity == 24
    state = dense.new_state(1)
    feed(dense, state, span(0, 24))
    with pytest.raises(MemcError, match="E206"):
        feed(dense, state, [24])
    with pytest.raises(MemcError, match="E206"):
        dense.restore(state.arrays(), capacity=20)


def test_second_sequence_in_a_row(dense: OnnxRunner, window: OnnxRunner) -> None:
    state = dense.new_state(1)
    feed(dense, state, [0, 1, 2, 3])
    feed(dense, state, [4, 5, 0, 1])
    assert state.lengths.tolist() == [2]
    program = ops.window_memory()
    assert compare(program, window, [([span(0, 6), span(0, 6)], None), ([[6, 0, 1, 2], [6, 7, 8, 0]], None)]) < 1e-4


def test_saved_state_of_another_artifact(dense: OnnxRunner, window: OnnxRunner) -> None:
    with pytest.raises(MemcError, match="E208"):
        dense.restore(window.new_state(1).arrays())

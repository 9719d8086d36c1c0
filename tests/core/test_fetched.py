"""What is fetched for each sequence, from a converted model's manifest to a conversation, in every backend."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from memc import api
from memc.artifact import read_manifest, seal
from memc.backend import LowerOptions
from memc.backends.eager import EagerBackend
from memc.backends.onnx import OnnxBackend
from memc.cli import main
from memc.conversion.lowering import lower
from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program import Program
from memc.program_io import load_program
from memc.report.html import render
from memc.report.read import read_report
from memc.report.terminal import convert_view
from memc.report.text import FETCHED
from memc.runtime import Session, load
from memc.target import get_target
from tests.core.runtime_fakes import make_session
from tests.core.tiny import tiny_program

load_kernels()

SPEC = "memory_bank:ranks=4:2"
ROWS = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]
Blocks = dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("banked")
    api.convert(tiny_program(), place / "onnx", passes=[SPEC], threads=1)
    program = load_program(place / "onnx" / "program")
    for name, backend, weights in (("eager", EagerBackend(), "fp32"), ("int8", OnnxBackend(), "int8")):
        folder = place / name
        _, manifest = lower(program, backend, get_target("cpu"), folder, LowerOptions(weights, 64, 1))
        seal(folder, manifest)
    return {path.name: path for path in place.iterdir()}


@pytest.fixture(params=["eager", "onnx"])
def session(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Session:
    return load(folders[request.param], threads=1, chunk=3)


def blocks_of(session: Session, batch: int, seed: int = 0) -> Blocks:
    random = np.random.default_rng(seed)
    ports = [port for port in session.manifest.inputs if port.role == "fetched"]
    return {port.name: 0.5 * random.standard_normal((batch, *port.shape[1:]), np.float32) for port in ports}


def expected(program: Program, row: list[int], blocks: Blocks, index: int) -> npt.NDArray[np.float32]:
    given = [torch.from_numpy(block[index : index + 1]) for block in blocks.values()]
    tokens = torch.tensor([row])
    with torch.no_grad():
        logits = program(tokens, torch.arange(len(row))[None], *given, *program.new_state(1))[0]
    return logits[0].numpy()


def test_the_manifest_and_the_reports_name_what_is_fetched(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        ports = [port for port in read_manifest(folder).inputs if port.role == "fetched"]
        assert [(port.name, port.dtype, port.shape) for port in ports] == [
            ("bank_0", "float32", ["B", 3, 6, 24]),
            ("bank_1", "float32", ["B", 3, 6, 24]),
        ]
    assert [spec.name for spec in load_program(folders["onnx"] / "program").fetched] == ["bank_0", "bank_1"]
    report = read_report(folders["onnx"])
    assert report.convert is not None and report.convert.original is not None
    assert report.convert.predicted.fetched_bytes == 2 * 3 * 6 * 24 * 4
    read, before = (side.bytes_read_per_token for side in (report.convert.predicted, report.convert.original))
    assert all(read[context] - before[context] == 2 * 3 * 6 * 24 * 4 for context in read)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(convert_view(report.convert))
    assert FETCHED in console.export_text()
    assert FETCHED in render(report)
    assert "bank_0, bank_1" in read_manifest(folders["onnx"]).how_to_run


def test_nothing_fetched_is_the_original(session: Session) -> None:
    program = tiny_program()
    found = session.logits(ROWS)
    for index, row in enumerate(ROWS):
        wanted = program.run(torch.tensor([row]))[0].detach().numpy()
        np.testing.assert_allclose(found[index, : len(row)], wanted, atol=2e-5)


def test_a_batch_has_a_block_for_each_sequence(session: Session, folders: dict[str, Path]) -> None:
    program = load_program(folders["onnx"] / "program")
    blocks = blocks_of(session, 3)
    found = session.logits(ROWS, **blocks)
    for index, row in enumerate(ROWS):
        np.testing.assert_allclose(found[index, : len(row)], expected(program, row, blocks, index), atol=2e-5)
        alone = session.logits(row, **{name: block[index : index + 1] for name, block in blocks.items()})
        np.testing.assert_allclose(alone[0], found[index, : len(row)], atol=2e-5)
    assert np.abs(found - session.logits(ROWS)).max() > 0.1


def test_it_stays_with_the_conversation(session: Session, tmp_path: Path) -> None:
    blocks = blocks_of(session, 3)
    longer = [[*row, 20] for row in ROWS]
    wanted = session.prefill(longer, session.new_state(3, fetched=blocks))
    given_later = session.new_state(3)
    session.prefill(ROWS, given_later, fetched=blocks)
    session.save(given_later, tmp_path / "state")
    read = session.load_state(tmp_path / "state")
    fork = session.fork(given_later, [2, 0])
    assert given_later.fetched_bytes == 3 * 2 * 3 * 6 * 24 * 4
    for state in (given_later, read):
        np.testing.assert_allclose(session.step([20, 20, 20], state), wanted, atol=2e-5)
    np.testing.assert_allclose(session.step([20, 20], fork), wanted[[2, 0]], atol=2e-5)
    assert np.abs(session.prefill(longer, session.new_state(3)) - wanted).max() > 0.1, "blocks must show"


def test_another_block_serves_from_its_token_on(session: Session) -> None:
    first, second = blocks_of(session, 1), blocks_of(session, 1, seed=1)
    state = session.new_state(fetched=first)
    session.prefill(ROWS[0], state)
    kept = session.fork(state)
    found = session.step([20], state, fetched=second)
    assert np.abs(found - session.step([20], kept)).max() > 0.01
    only = {"bank_1": second["bank_1"]}
    session.step([21], kept, fetched=only)
    assert kept.fetched["bank_0"] is not second["bank_0"]
    np.testing.assert_array_equal(kept.fetched["bank_0"], first["bank_0"])
    np.testing.assert_array_equal(kept.fetched["bank_1"], second["bank_1"])


def test_it_generates_with_blocks(session: Session) -> None:
    blocks = blocks_of(session, 3)
    together = session.generate(ROWS, fetched=blocks, max_new_tokens=5)
    for index, row in enumerate(ROWS):
        own = {name: block[index : index + 1] for name, block in blocks.items()}
        alone = session.generate(row, fetched=own, max_new_tokens=5)
        assert alone.ids == together[index].ids
        state = session.new_state(fetched=own)
        assert session.generate(row, state=state, max_new_tokens=5).ids == alone.ids
    assert together[0].fetched_bytes == 3 * 2 * 3 * 6 * 24 * 4
    assert [each.ids for each in together] != [each.ids for each in session.generate(ROWS, max_new_tokens=5)]


def test_quantised_weights_leave_it_in_float32(folders: dict[str, Path]) -> None:
    session, plain = (load(folders[name], threads=1) for name in ("int8", "onnx"))
    blocks = blocks_of(session, 3)
    added = session.logits(ROWS, **blocks) - session.logits(ROWS)
    wanted = plain.logits(ROWS, **blocks) - plain.logits(ROWS)
    assert np.abs(added - wanted).max() < 0.1 * np.abs(wanted).max()
    graph = onnx.load(folders["int8"] / session.manifest.lowered, load_external_data=False).graph
    assert any(node.op_type == "MatMulNBits" for node in graph.node)
    readers = {node.op_type for node in graph.node if {"bank_0_gate_up", "bank_0_down"} & {*node.input}}
    assert readers and all(reader == "Shape" or reader.startswith("BankFfn") for reader in readers)


def test_plain_onnxruntime_takes_the_parts_of_a_block(folders: dict[str, Path]) -> None:
    session, manifest = load(folders["onnx"], threads=1), read_manifest(folders["onnx"])
    assert 'An input with "parts"' in manifest.how_to_run
    blocks, ids = blocks_of(session, 2), np.array([[3, 4, 5], [6, 7, 8]])
    ports = {port.name: port for port in manifest.inputs}
    feeds = {"tokens": ids, "positions": np.array([[0, 1, 2]] * 2), "keep": np.arange(3)}
    for name, block in blocks.items():
        assert ports[name].parts == {f"{name}_gate_up": 2, f"{name}_down": 1}
        turned = np.ascontiguousarray(block.swapaxes(0, 1))
        feeds |= {f"{name}_gate_up": turned[:2], f"{name}_down": turned[2:]}
    states = {
        state.input: np.full([{"B": 2, "S": 9}.get(str(n), n) for n in state.shape], state.init, state.dtype)
        for state in manifest.states
    }
    run = onnxruntime.InferenceSession(folders["onnx"] / manifest.lowered)
    names = [port.name for port in run.get_inputs()]
    given = {name: array for name, array in (feeds | states).items() if name in names}
    np.testing.assert_allclose(run.run(None, given)[0], session.logits(ids.tolist(), **blocks), atol=2e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_session_feeds_parts_without_a_copy(folders: dict[str, Path], batch: int) -> None:
    session = load(folders["onnx"], threads=1)
    blocks = blocks_of(session, batch)
    port = next(port for port in session.manifest.inputs if port.name == "bank_0")
    state = session.new_state(batch, fetched=blocks)
    forked = session.fork(state, [batch - 1, 0])
    for held, wanted in (
        (state.fetched["bank_0"], blocks["bank_0"]),
        (forked.fetched["bank_0"], blocks["bank_0"][[batch - 1, 0]]),
        (port.nothing(batch), np.zeros_like(blocks["bank_0"])),
    ):
        np.testing.assert_array_equal(held, wanted)
        parts = list(port.cut(held).values())
        assert [part.shape[:2] for part in parts] == [(2, len(held)), (1, len(held))]
        assert all(part.flags.c_contiguous and np.shares_memory(part, held) for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts).swapaxes(0, 1), wanted)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"bank_2": np.zeros((3, 3, 6, 24), np.float32)}, "no 'bank_2'"),
    ({"tokens": np.zeros((3, 4), np.int64)}, "no 'tokens'"),
    ({"bank_0": np.zeros((3, 3, 5, 24), np.float32)}, "has shape [3, 3, 5, 24], not ['B', 3, 6, 24]"),
    ({"bank_0": np.zeros((2, 3, 6, 24), np.float32)}, "has shape [2, 3, 6, 24]"),
    ({"bank_0": np.zeros((3, 6, 24), np.float32)}, "has shape [3, 6, 24]"),
    ({"bank_0": np.zeros((3, 3, 6, 24), np.complex64)}, "is of type float32, not complex64"),
]


@pytest.mark.parametrize(("fetched", "said"), BAD)
def test_what_does_not_fit_is_refused(session: Session, fetched: dict[str, Any], said: str) -> None:
    state = session.new_state(3)
    calls = (
        lambda: session.new_state(3, fetched=fetched),
        lambda: session.prefill(ROWS, state, fetched=fetched),
        lambda: session.step([1, 2, 3], state, fetched=fetched),
        lambda: session.generate(ROWS, fetched=fetched, max_new_tokens=1),
    )
    for call in calls:
        with pytest.raises(MemcError) as caught:
            call()
        assert caught.value.code == "E200"
        assert said in caught.value.message
        assert "\n" not in str(caught.value)
    assert not state.lengths.any(), "nothing was run"


def test_a_model_without_a_bank_says_so(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    with pytest.raises(MemcError, match="bank_0") as caught:
        session.new_state(fetched={"bank_0": np.zeros((1, 3, 6, 24))})
    assert caught.value.next == "it fetches nothing"


def test_generate_says_that_no_bank_was_given(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(37)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    words.save(str(folders["onnx"] / "tokenizer.json"))
    assert main(["generate", str(folders["onnx"]), "--prompt", "w3 w4", "--max-new-tokens", "2", "--json"]) == 0
    shown = capsys.readouterr()
    assert "no bank was given" in shown.err
    assert json.loads(shown.out)["fetched_bytes"] == 0

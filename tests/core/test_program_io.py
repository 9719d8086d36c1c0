"""Programs survive the disk, byte for byte, and a file that is not one is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program import Program, StateSpec, get_tensor, set_tensor
from memc.program_io import GRAPH, PARAMETERS, decode, encode, load_program, save_program
from memc.tensor_file import read_tensors
from tests.core.tiny import TinyConfig, tiny_program


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / GRAPH).read_bytes(), (folder / PARAMETERS).read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_gives_the_same_program_and_bytes(tmp_path: Path, tied: bool) -> None:
    program = tiny_program(TinyConfig(tied=tied))
    list(program.module.graph.nodes)[20].meta["memc"] = {"layer": 1, "shape": (1, None), "inf": -math.inf}
    save_program(program, tmp_path / "a")
    loaded = load_program(tmp_path / "a")
    save_program(loaded, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (loaded.inputs, loaded.outputs, loaded.states) == (program.inputs, program.outputs, program.states)
    assert (loaded.model, loaded.provenance, loaded.raised) == (program.model, program.provenance, program.raised)
    assert [str(n) for n in loaded.module.graph.nodes] == [str(n) for n in program.module.graph.nodes]
    assert [n.meta.get("memc") for n in loaded.module.graph.nodes] == [
        n.meta.get("memc") for n in program.module.graph.nodes
    ]
    assert loaded.parameter_count == program.parameter_count
    assert (loaded.module.lm_head.weight is loaded.module.model.embed.weight) == tied  # type: ignore[union-attr]


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    for tied in (True, False):
        save_program(tiny_program(TinyConfig(tied=tied)), tmp_path / str(tied))
    c = TinyConfig()
    sizes = {tied: (tmp_path / str(tied) / PARAMETERS).stat().st_size for tied in (True, False)}
    assert c.vocab * c.width * 4 <= sizes[False] - sizes[True] < c.vocab * c.width * 4 + 200


def test_reloaded_program_gives_the_same_logits(tmp_path: Path) -> None:
    load_kernels()
    program = tiny_program()
    save_program(program, tmp_path)
    tokens = torch.arange(14).reshape(2, 7)
    assert torch.equal(load_program(tmp_path).run(tokens), program.run(tokens))


def test_a_program_can_be_saved_over_the_one_it_was_read_from(tmp_path: Path) -> None:
    save_program(tiny_program(), tmp_path)
    before = contents(tmp_path)
    save_program(load_program(tmp_path), tmp_path)
    assert contents(tmp_path) == before


def test_tensors_that_stay_the_same_are_linked_and_new_ones_are_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    save_program(tiny_program(), folders[0])
    program = load_program(folders[0])
    for step, folder in enumerate(folders[1:], 1):
        changed = program.copy()
        name = f"model.layers.{step - 1}.mlp.up.weight"
        set_tensor(changed.module, name, get_tensor(program.module, name) * 2)
        save_program(changed, folder, (program, folders[step - 1]))
        program = load_program(folder)
        assert torch.equal(get_tensor(program.module, name), get_tensor(changed.module, name))
    tokens = torch.arange(10).reshape(2, 5)
    assert torch.equal(program.run(tokens), changed.run(tokens))
    assert sorted(path.name for path in folders[2].iterdir()) == [
        "params-1.safetensors",
        "params-2.safetensors",
        PARAMETERS,
        GRAPH,
    ]
    assert (folders[2] / PARAMETERS).samefile(folders[0] / PARAMETERS)
    assert list(read_tensors(folders[2] / "params-2.safetensors")) == [name]


def test_a_parameter_file_elsewhere_is_refused(tmp_path: Path) -> None:
    save_program(tiny_program(), tmp_path)
    data = json.loads((tmp_path / GRAPH).read_text())
    data["tensors"][0]["file"] = "../params.safetensors"
    (tmp_path / GRAPH).write_text(json.dumps(data))
    with pytest.raises(MemcError, match=r"E309.*outside"):
        load_program(tmp_path)


def test_every_node_gets_its_symbolic_value(tmp_path: Path) -> None:
    save_program(tiny_program(), tmp_path)
    loaded = load_program(tmp_path)
    values = {node.name: node.meta["val"] for node in loaded.module.graph.nodes if node.op != "output"}
    batch, length = values["tokens"].shape
    assert isinstance(batch, torch.SymInt) and isinstance(length, torch.SymInt)
    assert values["linear_default"].shape[0].node.expr == batch.node.expr
    assert values["attention_default"][1].shape[2].node.expr == (values["layer0_key"].shape[2] + length).node.expr


def test_fake_parameters_are_not_saved(tmp_path: Path) -> None:
    program = tiny_program()
    program.module.to("meta")
    with pytest.raises(ValueError, match="fake"):
        save_program(program, tmp_path)


def test_every_kind_of_argument_round_trips() -> None:
    values = [
        None, True, 3, 0.1, math.inf, "x", (1, (2,)), [1, [2]], {"a": (1,), 2: None}, slice(0, None, 2),
        torch.bfloat16, torch.device("cpu"), torch.strided, torch.channels_last, 1 + 2j, ...,
    ]  # fmt: skip
    text = json.dumps([encode(value) for value in values], allow_nan=False)
    assert [decode(value, {}) for value in json.loads(text)] == values
    assert math.isnan(decode(encode(math.nan), {}))
    with pytest.raises(TypeError, match="Generator"):
        encode(torch.Generator())


def test_dtypes_and_buffers_round_trip(tmp_path: Path) -> None:
    program = tiny_program()
    graph = program.module.graph
    values = {
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
        "i8": torch.tensor([[1], [-2]], dtype=torch.int8).t(),
        "flag": torch.tensor(True),
        "none": torch.empty(0, 3),
    }
    with graph.inserting_before(next(iter(graph.nodes))):
        for name, value in values.items():
            program.module.register_buffer(name, value)
            graph.get_attr(name)
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    for name, value in values.items():
        assert torch.equal(loaded.module.get_buffer(name), value)
        assert loaded.module.get_buffer(name).dtype == value.dtype


def test_an_op_without_a_place_is_refused_when_saving(tmp_path: Path) -> None:
    program = tiny_program()
    with program.module.graph.inserting_before(program.module.graph.find_nodes(op="output")[0]):
        program.module.graph.call_function(print, ("x",))
    with pytest.raises(MemcError, match=r"E305.*print"):
        save_program(program, tmp_path)


def rename_target(text: str, name: str) -> str:
    return text.replace('"aten.silu.default"', json.dumps(name), 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: rename_target(t, "aten.no_such_op.default"), "aten.no_such_op"),
        (lambda t: rename_target(t, "aten.from_file.default"), "aten.from_file"),
        (lambda t: rename_target(t, "aten.save.default"), "aten.save"),
        (lambda t: rename_target(t, "os.system"), "os.system"),
        (lambda t: rename_target(t, "_operator.attrgetter"), "attrgetter"),
        (lambda t: rename_target(t, "aten.__class__.default"), "__class__"),
        (lambda t: t.replace('"memc.program/1"', '"memc.program/9"'), "memc.program/9"),
        (lambda t: t[: len(t) // 2], "does not parse"),
        (lambda t: t.replace('"node":"tokens"', '"node":"nowhere"'), "nowhere"),
        (lambda t: t.replace('"name":"silu_default"', '"name":"linear_default"'), "linear"),
        (lambda t: t.replace('"stored_as":"model.inv_freq"', '"stored_as":"absent"'), "absent"),
        (lambda t: "[]", "does not parse"),
    ],
)
def test_a_damaged_graph_is_refused(tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    save_program(tiny_program(), tmp_path)
    text = (tmp_path / GRAPH).read_text()
    changed = change(text)
    assert changed != text
    (tmp_path / GRAPH).write_text(changed)
    with pytest.raises(MemcError, match=rf"E309.*{reason}"):
        load_program(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage"])
def test_damaged_parameters_are_refused(tmp_path: Path, damage: str) -> None:
    save_program(tiny_program(), tmp_path)
    path = tmp_path / PARAMETERS
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-9] if damage == "truncated" else b"\xff" * 64)
    with pytest.raises(MemcError, match=r"E309.*params\.safetensors"):
        load_program(tmp_path)


def test_a_missing_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match="E309"):
        load_program(tmp_path)


def test_states_of_any_kind_round_trip(tmp_path: Path) -> None:
    program: Program = tiny_program()
    assert all(isinstance(spec, StateSpec) and spec.grows is not None for spec in program.states)
    save_program(program, tmp_path)
    assert [spec.output for spec in load_program(tmp_path).states] == [spec.output for spec in program.states]

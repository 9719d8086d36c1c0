"""Bad models: one line with the right code, the place and the next step; never a MemoryError, never a hang."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memc.errors import MemcError
from memc.frontend import capture_source
from memc.frontend.gguf_file import read_gguf
from memc.weights import SafetensorsWeights, materialize
from tests import families
from tests.core.test_capture_sources import exported, write_gguf


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    families.build("gpt2")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refused(model: Path | str, code: str, **options: bool) -> MemcError:
    with pytest.raises(MemcError) as caught:
        capture_source(model, **options)
    assert caught.value.code == code and caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and (caught.value.where or caught.value.next)
    return caught.value


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["nowhere", "./no/such/folder", "model.gguf", "not a model", "/nope/at/all"])
def test_missing_model(name: str) -> None:
    assert "hub id" in refused(name, "E301").next


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, "E301")


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, "E301")
    assert capture_source(folder, weights=False).weights is None
    (folder / "memc.json").write_text("{}")
    assert refused(folder, "E301", weights=False).message == "an artifact of memc is no model"


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, "E302")


def test_a_configuration_of_rotary_positions_that_is_wrong_is_told_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    families.build("llama")[0].save_pretrained(tmp_path)
    capfd.readouterr()
    edit_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": "x", "odd": 1}, rope_parameters=None)
    with pytest.raises(MemcError):
        capture_source(tmp_path, weights=False)
    shown = capfd.readouterr()
    assert shown.out == shown.err == ""


def test_a_file_that_may_not_be_read_is_not_told_to_be_had_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *args: object, **options: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    error = refused(folder, "E302")
    assert "Permission denied" in error.message and "readable" in error.next


def header(length: int, text: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text


def entry(dtype: str, shape: list[int], end: int) -> bytes:
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return header(len(text), text)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        header(1 << 60),
        header(2**64 - 1, b"{}"),
        header(2, b"[]"),
        header(9, b"{nonsense"),
        header(50_000, b"[" * 50_000),
        entry("F32", [1 << 60], 1 << 62),
        entry("F32", [2], 8) + b"1234",
        entry("F32", [3], 8) + b"12345678",
        entry("F32", [-1], -4),
        entry("F99", [1], 4) + b"1234",
        header(10, b'{"w": [1]}'),
    ],
)
def test_corrupt_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "E302")


def test_truncated_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refused(folder, "E302").message


def test_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002" in refused(folder, "E301").message


def test_shards_are_one_checkpoint(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    captured = capture_source(folder)
    assert captured.weights is not None
    assert not materialize(captured.program, captured.weights).is_fake


def test_shape_that_contradicts_the_configuration(folder: Path) -> None:
    edit_config(folder, n_inner=81)
    message = refused(folder, "E303").message
    assert "mlp.c_fc" in message and "80" in message and "81" in message


def test_missing_and_extra_tensors(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    lost = dict(tensors)
    del lost["transformer.ln_f.bias"]
    save_file(lost, folder / "model.safetensors", {"format": "pt"})
    assert "transformer.ln_f.bias" in refused(folder, "E303").message
    save_file(tensors | {"transformer.extra": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    assert "transformer.extra" in refused(folder, "E303").message


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.bool])
def test_integers_where_the_model_has_none(folder: Path, kind: torch.dtype) -> None:
    path, name = folder / "model.safetensors", "transformer.h.0.ln_1.weight"
    tensors = load_file(path)
    save_file({**tensors, name: torch.ones_like(tensors[name]).to(kind)}, path)
    assert name in refused(folder, "E303").message

    class Late(SafetensorsWeights):
        def dtype(self, name: str) -> torch.dtype:
            return kind

    captured = capture_source(folder, weights=False)
    with pytest.raises(MemcError, match=r"E303.* is "):
        materialize(captured.program, Late([path], str(path)))


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_head", "vocab_size"])
def test_sizes_that_no_model_has(folder: Path, name: str, value: int) -> None:
    edit_config(folder, **{name: value})
    for weights in (True, False):
        assert "config" in refused(folder, "E302", weights=weights).next


def test_more_layers_than_the_configuration(folder: Path) -> None:
    edit_config(folder, n_layer=1)
    assert "transformer.h.1." in refused(folder, "E303").message


def test_names_without_the_base_prefix_are_taken(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    captured = capture_source(folder)
    assert captured.weights is not None
    assert materialize(captured.program, captured.weights).provenance["transformer.wte.weight"].source == "wte.weight"


def test_pickled_checkpoint(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "pickled" in refused(folder, "E304").message
    refused(folder / "pytorch_model.bin", "E304")
    (folder / "config.json").unlink()
    assert "pickled" in refused(folder, "E304").message


def test_remote_code(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "--remote-code" in refused(folder, "E304").next
    refused(folder, "E304", weights=False)


@pytest.mark.parametrize("change", [{"model_type": "nonesuch"}, {"architectures": ["NoneSuchForCausalLM"]}])
def test_unknown_architecture(folder: Path, change: dict[str, Any]) -> None:
    edit_config(folder, **change)
    assert "one" in refused(folder, "E305").message


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, "llama", *families.build("llama"))
    return path.read_bytes()


BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda b: b"",
    "not gguf": lambda b: b"GGML" + b[4:],
    "version": lambda b: b[:4] + struct.pack("<I", 99) + b[8:],
    "tensor count": lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:],
    "pair count": lambda b: b[:16] + struct.pack("<Q", 2**64 - 1) + b[24:],
    "key length": lambda b: b[:24] + struct.pack("<Q", 1 << 62) + b[32:],
    "half": lambda b: b[: len(b) // 2],
    "header only": lambda b: b[:200],
    "last bytes": lambda b: b[:-200],
}


@pytest.mark.parametrize("how", BREAK)
def test_corrupt_gguf(how: str, gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(BREAK[how](gguf_bytes))
    refused(path, "E302")


def test_gguf_cut_or_changed_anywhere_never_crashes(gguf_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    for at in range(8, 2400, 37):
        for content in (gguf_bytes[:at], gguf_bytes[:at] + b"\xff" * 8 + gguf_bytes[at + 8 :]):
            path.write_bytes(content)
            try:  # a changed text may also still be a valid file
                read_gguf(path)
            except MemcError as error:
                assert error.code == "E302"


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        items = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in items.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        (b'"use_pickle": false', b'"use_pickle": true', "E304"),
        (b"torch.ops.aten.embedding.default", b"torch.hub.load", "E304"),
        (b"torch.ops.aten.embedding.default", b"builtins.exec", "E304"),
        (b"Symbol('s", b"exec('s", "E304"),
        (b'"sizes": [{"as_int": 97}', b'"sizes": [{"as_int": 970000000000}', "E302"),
        (b'{"graph_module"', b'{"graph_modul', "E302"),
    ],
)
def test_bad_pt2(old: bytes, new: bytes, code: str, tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    exported(path)
    rewrite(path, lambda name, data: data.replace(old, new) if name.endswith(".json") else data)
    refused(path, code)


def test_truncated_pt2(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"PK\x03\x04 nothing")
    refused(path, "E302")


def test_digest_follows_the_content(folder: Path) -> None:
    path = folder / "model.safetensors"
    before = SafetensorsWeights([path], "x").digest
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert SafetensorsWeights([path], "x").digest != before

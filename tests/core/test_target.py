"""Targets: the files, the user's own, and what cannot be used here."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from memc.backends.eager import EagerBackend
from memc.doctor import examine, list_targets, require_backend
from memc.errors import MemcError
from memc.target import Target, get_target, targets, write_target

NAMES = {
    "cpu": "onnx",
    "x86-64-v2": "tvm",
    "x86-64-v3": "tvm",
    "x86-64-v4": "tvm",
    "aarch64": "tvm",
    "riscv64": "tvm",
    "c": "tvm",
    "nvidia-sm80": "triton",
    "nvidia-sm90": "triton",
    "nvidia-sm100": "triton",
    "nvidia-sm120": "triton",
    "amd-gfx942": "triton",
    "amd-gfx950": "triton",
}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    targets.cache_clear()
    folder = tmp_path / "memc" / "targets"
    folder.mkdir(parents=True)
    yield folder
    targets.cache_clear()


def test_every_full_name_is_there_with_its_backend() -> None:
    assert {name: target.backend for name, target in targets().items()} == NAMES


def test_figures_make_sense() -> None:
    for target in targets().values():
        if target.kind == "source":
            assert not target.flops
            continue
        assert target.memory_bandwidth
        assert target.flops["int8"] >= target.flops["fp32"] > target.memory_bandwidth
        assert 0 < target.launch_overhead < 1e-4


def test_unknown_target_is_suggested() -> None:
    with pytest.raises(MemcError, match="did you mean 'nvidia-sm90'"):
        get_target("nvidia-sm91")


def test_users_targets_are_read(own_folder: Path) -> None:
    text = 'name = "board"\ndescription = "mine"\nkind = "cpu"\nbackend = "onnx"\ninstruction_set = "x"\n'
    (own_folder / "board.toml").write_text(text)
    assert get_target("board").description == "mine"


def test_a_target_that_is_written_is_the_one_that_is_read(own_folder: Path) -> None:
    described = 'mine, "fast"\\ \n'
    mine = get_target("cpu").model_copy(
        update={"description": described, "state_bandwidth": 1.5e9, "flops": {"int4": 2}}
    )
    write_target(mine, own_folder / "deeper" / "cpu.toml")
    write_target(mine, own_folder / "cpu.toml")
    assert get_target("cpu") == mine
    (own_folder / "file").write_text("")
    with pytest.raises(MemcError, match="E502"):
        write_target(mine, own_folder / "file" / "cpu.toml")


def test_a_target_that_cannot_be_written_leaves_the_one_that_is_there(own_folder: Path) -> None:
    mine = get_target("cpu").model_copy(update={"description": "mine"})
    write_target(mine, own_folder / "cpu.toml")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # as when the disk is full, 16 bytes in
    try:
        with pytest.raises(MemcError, match="E502"):
            write_target(mine.model_copy(update={"description": "another"}), own_folder / "cpu.toml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    targets.cache_clear()
    assert get_target("cpu") == mine and [path.name for path in own_folder.iterdir()] == ["cpu.toml"]


@pytest.mark.parametrize("text", ["name = ", 'name = "x"', 'name = "x"\nspeed = 3\n'])
def test_a_file_that_does_not_parse_is_named(own_folder: Path, text: str) -> None:
    (own_folder / "bad.toml").write_text(text)
    with pytest.raises(MemcError, match=r"E201 .*bad\.toml"):
        targets()


def test_a_file_that_is_no_text_is_named(own_folder: Path) -> None:
    (own_folder / "bad.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(MemcError, match=r"E201 .*bad\.toml"):
        targets()


def test_targets_without_backend_say_why() -> None:
    rows = {row.name: row for row in list_targets().targets}
    assert rows["cpu"].available
    for row in rows.values():
        assert row.available == (not row.reason)


def test_backend_of_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_backend(get_target("cpu")) == "onnx"
    assert require_backend(get_target("cpu"), "eager") == "eager"
    with pytest.raises(MemcError, match="E202 unknown backend"):
        require_backend(get_target("cpu"), "onx")
    monkeypatch.setattr("memc.doctor.backend_reason", lambda name: "it is broken")
    with pytest.raises(MemcError, match="E602 it is broken"):
        require_backend(get_target("cpu"))


def test_what_this_machine_lacks_for_a_target_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"aarch64": MemcError("E602", "a linker is needed", next="install it")}

    def require(backend: object, target: Target) -> None:
        if target.name in lacking:
            raise lacking[target.name]

    monkeypatch.setattr(EagerBackend, "require", require)
    monkeypatch.setattr("memc.doctor.registered", lambda group: ["eager"])
    (row,) = examine().backends
    assert row.available and row.lacks == {"aarch64": "a linker is needed: install it"}
    lacking.clear()
    assert not examine().backends[0].lacks

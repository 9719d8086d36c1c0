"""Libraries for NVIDIA GPUs: what nvcc makes of every kernel, what the library holds, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import op_programs as ops
import pytest
from tvm_support import lower

from memc.api import convert
from memc.artifact import read_manifest
from memc.backends.tvm import TvmBackend, backend, build, runner
from memc.backends.tvm.gpu import binary, device
from memc.backends.tvm.gpu.binary import compile_source, read_kernels, with_binary
from memc.conversion.again import lower_again
from memc.errors import MemcError
from memc.recipe import Recipe
from memc.target import get_target
from tests.families import raw_program

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc of the CUDA toolkit")
PLACE = Path("lowered/tvm")
REGISTERS, SHARED = 255, 48 << 10
"""What a thread, and a block of threads, of any GPU has."""

BANK = "bank, two blocks"
"""With eleven blocks, and as many sums after one product, a kernel for sm_80 spills four bytes."""

MORE = ("llama, window", "window, every option", "gated delta", "full, bias", "attention, every option", BANK)
PROGRAMS = {**ops.CASES, BANK: lambda: ops.bank_ffn("silu", "gelu")}
CASES = ["llama, dense", *(pytest.param(case, marks=pytest.mark.conformance) for case in MORE)]
ARCHS = ["sm80", "sm90", *(pytest.param(name, marks=pytest.mark.conformance) for name in ("sm100", "sm120"))]


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder for one kind of GPU, and the CUDA source beside it."""
    folder = tmp_path_factory.mktemp("window")
    with pytest.MonkeyPatch.context() as patch:

        def kept(source: str, arch: str) -> Any:
            (folder / "kernels.cu").write_text(source)
            return compile_source(source, arch)

        patch.setattr(build, "compile_source", kept)
        lower(ops.llama(layers=1), folder, target="nvidia-sm90")
    return folder


@needs_nvcc
@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("case", CASES)
def test_every_kernel_is_compiled_and_fits(name: str, case: str, tmp_path: Path) -> None:
    if f"sm_{name[2:]}" not in binary.architectures():
        pytest.skip(f"this nvcc does not compile for sm_{name[2:]}")
    lower(PROGRAMS[case](), tmp_path, target=f"nvidia-{name}")
    info = json.loads((tmp_path / PLACE / "library.json").read_text())
    assert info["options"] == {"kind": "cuda", "arch": f"sm_{name[2:]}"} and len(info["kernels"]) > 10
    for kernel in info["kernels"]:
        assert 0 < kernel["registers"] <= REGISTERS and kernel["shared"] <= SHARED, kernel
        assert kernel["spilled"] == 0, kernel


@needs_nvcc
def test_every_kernel_binds_threads(window: Path) -> None:
    source = (window / "kernels.cu").read_text()
    found: dict[str, str] = {}
    for text in source.split('extern "C" __global__ void ')[1:]:
        start = re.match(r"(?:__launch_bounds__\(\d+\) )?(\w+)\(", text)
        assert start is not None
        found[start[1]] = text  # what is declared before is defined later
    named = {kernel["name"] for kernel in json.loads((window / PLACE / "library.json").read_text())["kernels"]}
    assert named and named == set(found)
    assert not [name for name in named if "threadIdx.x" not in found[name] and "blockIdx.x" not in found[name]]


@needs_nvcc
def test_the_library_holds_the_binary_and_not_its_source(window: Path) -> None:
    library = (window / PLACE / "model.so").read_bytes()
    packed = library.index(b"\x05" + b"\0" * 7 + b"cubin")
    code = library.index(b"\x7fELF", packed)
    assert int.from_bytes(library[code + 18 : code + 20], "little") == 190, "ELF for CUDA"
    assert b"__global__" not in library
    assert {path.name for path in (window / PLACE).iterdir()} == {"model.so", "parameters.safetensors", "library.json"}
    manifest = read_manifest(window)
    assert all(state.update == "alias" for state in manifest.states) and "GPU's memory" in manifest.how_to_run


@needs_nvcc
def test_a_machine_without_the_gpu_refuses_the_library(window: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for found, reason in ((None, "no NVIDIA GPU"), ((8, 0), "compute capability 8.0")):
        monkeypatch.setattr(device, "capability", lambda found=found: found)
        monkeypatch.setattr(runner, "capability", lambda found=found: found)
        with pytest.raises(MemcError, match=f"E602 the library is for GPUs of sm_90.*{reason}") as caught:
            TvmBackend().load(window, read_manifest(window), 1)
        assert "\n" not in str(caught.value) and "--target cpu" in str(caught.value.next)
        assert not TvmBackend().runs_here(get_target("nvidia-sm90"))
    monkeypatch.setattr(device, "capability", lambda: (9, 0))
    assert TvmBackend().runs_here(get_target("nvidia-sm90"))
    assert not TvmBackend().runs_here(get_target("nvidia-sm100"))


@needs_nvcc
def test_a_conversion_says_that_it_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "capability", lambda: None)
    program, _ = raw_program("llama")
    document = convert(program, tmp_path / "out", target="nvidia-sm90", backend="tvm", recipe=Recipe(recipe=1))
    assert document.backend == "tvm" and "compiled, not run" in document.forms["library"]
    assert "lowered_logits" not in {check.name for check in document.checks}
    here = lower_again(tmp_path / "out", tmp_path / "here", target="cpu", backend="tvm")
    assert "lowered_logits" in {check.name for check in here.checks}


@needs_nvcc
@pytest.mark.conformance
def test_an_artifact_of_another_target_is_lowered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "capability", lambda: None)
    program, _ = raw_program("llama")
    convert(program, tmp_path / "out", target="cpu", backend="tvm", recipe=Recipe(recipe=1, weights="int8"))
    again = lower_again(tmp_path / "out", tmp_path / "other", target="nvidia-sm80", backend="tvm")
    assert "for sm_80; compiled, not run" in again.forms["library"] and not again.checks
    assert again.weights == "fp32", "the first type that the target takes"


# ---- refusals


def test_triton_stays_what_gpus_take() -> None:
    assert {get_target(f"nvidia-{name}").backend for name in ("sm80", "sm90", "sm100", "sm120")} == {"triton"}


def test_what_has_no_form_is_refused_by_name_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match=r"E601 .*memc::sparse_attention has no form for GPUs") as caught:
        lower(ops.sparse_attention(), tmp_path, target="nvidia-sm90")
    assert "--backend triton" in caught.value.message
    for weights in ("int8", "int4", "bf16"):
        with pytest.raises(MemcError, match=f"E601 tvm does not take {weights}.*fp32 and fp16"):
            lower(ops.norm(), tmp_path, weights=weights, target="nvidia-sm90")
    with pytest.raises(MemcError, match="compiles for CPUs and for NVIDIA's GPUs, amd-gfx942"):
        lower(ops.norm(), tmp_path, target="amd-gfx942")
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary.shutil, "which", lambda name: None)
    with pytest.raises(MemcError, match="E602 nvcc is needed to compile for sm_90") as caught:
        lower(ops.norm(), tmp_path, target="nvidia-sm90")
    assert "CUDA toolkit" in caught.value.next and "\n" not in str(caught.value)
    program, _ = raw_program("llama")
    with pytest.raises(MemcError, match="E602 nvcc is needed"):
        convert(program, tmp_path / "out", target="nvidia-sm90", backend="tvm", recipe=Recipe(recipe=1))
    assert not list(tmp_path.iterdir())


@needs_nvcc
def test_an_artifact_stays_alone_where_the_compiler_is_missing(window: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary.shutil, "which", lambda name: None)
    with pytest.raises(MemcError, match="E602 nvcc is needed to compile for sm_80"):
        lower_again(window, window.parent / "other", target="nvidia-sm80", backend="tvm")
    assert not list(window.parent.glob("other*"))


def test_a_compiler_that_fails_or_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_90 && exit 0\necho "error: no such op" >&2\nexit 2\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(binary, "COMPILER", str(fake))
    with pytest.raises(MemcError, match=r"E602 .*does not compile for sm_90: error: no such op"):
        lower(ops.norm(), tmp_path / "out", target="nvidia-sm90")
    with pytest.raises(MemcError, match=r"E602 .*does not compile for sm_80, but for sm_90"):
        lower(ops.norm(), tmp_path / "out", target="nvidia-sm80")
    assert not (tmp_path / "out").exists()


# ---- what is read and written of other formats


def test_what_the_assembler_tells_of_kernels_is_read() -> None:
    told = (
        "ptxas info    : Compiling entry function 'first' for 'sm_90'\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4352 bytes smem, 380 bytes cmem[0]\n"
        "ptxas info    : Compiling entry function 'second' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 12 registers, used 0 barriers\n"
    )
    first, second = read_kernels(told)
    assert (first.name, first.registers, first.shared, first.spilled) == ("first", 40, 4352, 4)
    assert (second.name, second.registers, second.shared, second.spilled) == ("second", 12, 0, 0)


def test_modules_that_are_packed_otherwise_are_refused() -> None:
    def text(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value

    inside = text(b"cuda") + b"arguments" + text(b"source")
    rest = text(b"_lib") + text(b"cuda") + text(inside) + b"more"
    packed = len(rest).to_bytes(8, "little") + rest
    made = with_binary(packed, "source", b"\x7fELF")
    inside = text(b"cubin") + b"arguments" + text(b"\x7fELF")
    assert made[8:] == text(b"_lib") + text(b"cuda") + text(inside) + b"more"
    assert int.from_bytes(made[:8], "little") == len(made) - 8
    for wrong in (packed[:-1], packed.replace(text(b"_lib"), text(b"_lib") + text(b"cuda"))[8:], b""):
        with pytest.raises(ValueError):
            with_binary(wrong, "source", b"\x7fELF")
    assert backend.GPU_WEIGHTS == ("fp32", "fp16")

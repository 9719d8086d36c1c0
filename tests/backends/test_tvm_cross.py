"""Libraries for other processors link, and single functions run there, under qemu's user emulation, as they do here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import op_programs as ops
import pytest
import tvm
import tvm_ffi
from tvm_support import lower

from memc.api import convert
from memc.artifact import read_manifest
from memc.backends.tvm import TvmBackend
from memc.backends.tvm.isa import isa_of
from memc.backends.tvm.kernels.attention import Range, attention
from memc.backends.tvm.kernels.common import Scores
from memc.backends.tvm.kernels.linear import linear, quantised_linear
from memc.backends.tvm.kernels.memory import linear_memory
from memc.backends.tvm.kernels.memory_chunk import Memory
from memc.conversion.again import lower_again
from memc.errors import MemcError
from memc.recipe import Recipe
from memc.target import get_target
from tests.families import raw_program

DRIVER = Path(__file__).with_name("kernel_driver.c")
ARM = isa_of(get_target("aarch64"))
GCC, QEMU = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

needs_gcc = pytest.mark.skipif(GCC is None, reason="no aarch64-linux-gnu-gcc (apt-get install gcc-aarch64-linux-gnu)")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64-static (apt-get install qemu-user-static)")


def compiled(function: Any, options: dict[str, Any]) -> Any:
    module = tvm.IRModule({"function": function.with_attr("global_symbol", "function")})
    return tvm.compile(module, target=tvm.target.Target(options))


def run_here(function: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    compiled(function, {"kind": "llvm"})["function"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def run_emulated(function: Any, arrays: list[np.ndarray], folder: Path) -> list[np.ndarray]:
    compiled(function, ARM.options).mod.write_to_file(str(folder / "function.o"), "o")
    include = Path(tvm_ffi.__file__).parent / "include"
    sources = [str(DRIVER), str(folder / "function.o"), "-I", str(include)]
    subprocess.run([GCC, "-O1", "-static", "-o", str(folder / "driver"), *sources, "-lm"], check=True)
    with (folder / "tensors").open("wb") as file:
        file.write(np.int64(len(arrays)).tobytes())
        for array in arrays:
            code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
            file.write(np.array([code, array.dtype.itemsize * 8, array.ndim, *array.shape], np.int64).tobytes())
            file.write(array.tobytes())
    subprocess.run([QEMU, str(folder / "driver"), str(folder / "tensors")], check=True)
    data, start, found = (folder / "tensors").read_bytes(), 0, []
    for array in arrays:
        found.append(np.frombuffer(data[start : start + array.nbytes], array.dtype).reshape(array.shape))
        start += array.nbytes
    return found


def cases() -> dict[str, tuple[Any, list[np.ndarray]]]:
    random = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    positions = np.array([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]])
    longer = np.array([[-1, *range(20)], [*range(9), -1, *range(11)]])
    s, m = Scores(6, 2, 8, 10, 0.7, 2.0, True, True), Memory(6, 2, 8, 10, per_channel=True, delta=True)
    codes = random.integers(0, 255, (4, 32, 16), np.uint8)
    zeros = random.integers(0, 15, (4, 2, 16), np.uint8)
    return {
        "linear": (linear(50, 33, ARM.tile, bias=True), [floats(7, 33), floats(4, 33, 16), floats(50), floats(7, 50)]),
        "int4": (
            quantised_linear(50, 64, ARM.tile, bits=4, bias=False),
            [floats(7, 64), codes, floats(4, 2, 16), zeros, floats(1), floats(7, 50)],
        ),
        "attention": (
            attention(s, Range(window=4)),
            [
                floats(2, 6, 5, 8),
                floats(2, 2, 5, 8),
                floats(2, 2, 5, 10),
                positions,
                floats(2, 2, 2, 8, 16),
                floats(2, 2, 20, 10),
                floats(6),
                floats(6),
                floats(2, 6, 5, 10),
            ],
        ),
        "memory": (
            linear_memory(m, ARM.tile),
            [
                floats(2, 6, 21, 8),
                floats(2, 2, 21, 8) / 4,
                floats(2, 2, 21, 10),
                -np.abs(floats(2, 2, 21, 8)),
                longer,
                floats(2, 2, 8, 10),
                np.abs(floats(2, 2, 21)),
                floats(2, 6, 21, 10),
            ],
        ),
    }


@needs_gcc
@needs_qemu
@pytest.mark.parametrize(
    "case",
    ["linear", *(pytest.param(case, marks=pytest.mark.conformance) for case in ("int4", "attention", "memory"))],
)
def test_a_function_runs_on_another_processor_as_here(case: str, tmp_path: Path) -> None:
    function, arrays = cases()[case]
    for here, there in zip(run_here(function, arrays), run_emulated(function, arrays, tmp_path), strict=True):
        np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-4)


@needs_gcc
@pytest.mark.conformance
def test_a_library_for_another_processor_links_and_is_refused_here(tmp_path: Path) -> None:
    lower(ops.llama("attention", layers=1), tmp_path, target="aarch64")
    elf = (tmp_path / "lowered/tvm/model.so").read_bytes()[:20]
    assert elf[:4] == b"\x7fELF" and int.from_bytes(elf[18:20], "little") == 183, "ELF for AArch64"
    assert not TvmBackend().runs_here(get_target("aarch64"))
    with pytest.raises(MemcError, match="the library is for aarch64"):
        TvmBackend().load(tmp_path, read_manifest(tmp_path), 1)


@needs_gcc
@pytest.mark.conformance
def test_a_conversion_for_another_processor_says_that_it_was_not_run(tmp_path: Path) -> None:
    program, _ = raw_program("llama")
    document = convert(program, tmp_path / "out", target="aarch64", recipe=Recipe(recipe=1))
    assert document.backend == "tvm"
    assert "compiled, not run" in document.forms["library"]
    assert "lowered_logits" not in {check.name for check in document.checks}
    again = lower_again(tmp_path / "out", tmp_path / "here", target="cpu", backend="tvm")
    assert "lowered_logits" in {check.name for check in again.checks}


def test_a_missing_linker_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.backends.tvm.build.shutil.which", lambda name: None)
    with pytest.raises(MemcError, match="apt-get install gcc-aarch64-linux-gnu"):
        lower(ops.norm(), tmp_path, target="aarch64")

"""What a GPU would run, run here: the library with its binary, TVM's CUDA runtime, and the CUDA source of its kernels.

The driver is emulated (``emulated_gpu``): the kernels are nvcc's source compiled for this processor, thread for thread
with barriers and shuffles; that nvcc's binary computes the same is all that is left to a GPU.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emulated_gpu
import op_programs as ops
import pytest
from tvm_support import lower

from memc.backends.tvm import build
from memc.backends.tvm.gpu.binary import compile_source
from memc.backends.tvm.gpu.device import capability

TOLERANCE = 1e-4
QUICK = ("llama, window",)
CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.conformance)
    for case in (
        "norm centred with bias",
        "rotary interleaved",
        "full, bias",
        "attention, every option",
        "window, every option",
        "gated",
        "gated delta",
        "bank",
        "llama, dense",
        "llama, product keys",
        "llama, window",
    )
]

pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc") or not shutil.which("g++"), reason="needs nvcc and g++"),
    pytest.mark.skipif(platform.system() != "Linux", reason="emulates the driver of Linux"),
    pytest.mark.skipif(capability() is not None, reason="this machine has a GPU"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    emulated_gpu.build_driver(folder)
    return folder


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CUDA source of what is lowered."""
    found: list[str] = []

    def kept(source: str, arch: str) -> Any:
        found.append(source)
        return compile_source(source, arch)

    monkeypatch.setattr(build, "compile_source", kept)
    yield found


@pytest.mark.parametrize("case", CASES)
def test_a_library_on_an_emulated_gpu_equals_the_reference(
    case: str, driver: Path, sources: list[str], tmp_path: Path
) -> None:
    lower(ops.CASES[case](), tmp_path / "out", target="nvidia-sm90")
    kernels = emulated_gpu.build_kernels(sources[0], tmp_path)
    scenarios = ("one token", "padding", "restart", "restart inside")
    found = emulated_gpu.run(tmp_path / "out", case, kernels, driver, *scenarios)
    assert max(found.values()) < TOLERANCE, found


def test_a_barrier_that_is_missing_is_found(driver: Path, sources: list[str], tmp_path: Path) -> None:
    case = "norm"
    lower(ops.CASES[case](), tmp_path / "out", target="nvidia-sm90")
    faulty = sources[0].replace("__syncthreads();", "")
    assert faulty != sources[0]
    kernels = emulated_gpu.build_kernels(faulty, tmp_path)
    assert not emulated_gpu.run(tmp_path / "out", case, kernels, driver, "prompt")["prompt"] < 100 * TOLERANCE

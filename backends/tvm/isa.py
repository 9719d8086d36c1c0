"""What a target is for TVM: its code generator, the tile that its registers hold, its linker, the flags it needs."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memc.backends.tvm.gpu.device import runs_on_gpu
from memc.target import Target

HOST = "x86_64"


@dataclass(frozen=True)
class Tile:
    """Outputs and rows of a product that stay in registers: ``columns`` is a multiple of the vector's width.

    With ``dots`` the processor adds products of bytes four at a time, for which quantised weights lie in other tiles.
    """

    columns: int
    rows: int
    dots: bool = False


def columns_of(out: int, tile: Tile) -> int:
    """Return the columns of a tile for a product of few outputs: no more than they fill, by 16."""
    return min(tile.columns, -(-out // 16) * 16)


_SSE4 = frozenset({"ssse3", "sse4_1", "sse4_2", "popcnt", "cx16"})
_AVX2 = _SSE4 | frozenset({"avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"})
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
_LATER = frozenset(
    {
        *("avx512ifma", "avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bitalg", "avx512_vpopcntdq"),
        *("avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16", "gfni", "vaes"),
        *("vpclmulqdq", "sha_ni", "aes", "pclmulqdq", "adx", "rdseed", "clflushopt", "clwb", "rdpid", "fsgsbase"),
    }
)
EXTENSIONS = _AVX2 | _AVX512 | _LATER
"""Extensions of x86-64 that a compiler may use when it knows a processor by its name, as Linux names them."""


@dataclass(frozen=True)
class Isa:
    """One instruction set: ``kind`` of TVM's target with its options, and the flags a processor must have to run it."""

    machine: str
    options: dict[str, Any] = field(hash=False)
    tile: Tile
    features: frozenset[str] = frozenset()
    compiler: str | None = None
    """The C compiler that links for it, None for the host's."""
    gpu: bool = False
    """Whether its functions are those for GPUs."""

    @property
    def arch(self) -> str:
        """The kind of NVIDIA GPU that binaries are made for, as nvcc names it; empty for a CPU."""
        return str(self.options["arch"]) if self.options["kind"] == "cuda" else ""

    @property
    def source(self) -> bool:
        """Whether C source is what is made, and the library from it."""
        return bool(self.options["kind"] == "c")


def processor_flags() -> frozenset[str]:
    """Return the flags of this processor as Linux names them; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _cross(triple: str, machine: str, tile: Tile, *features: str) -> Isa:
    options = {"kind": "llvm", "mtriple": triple, **({"mattr": list(features)} if features else {})}
    return Isa(machine, options, tile, compiler=None if platform.machine() == machine else f"{triple}-gcc")


def _host() -> Isa:
    from tvm.target import Target as TvmTarget
    from tvm.target.codegen import llvm_cpu_has_features, llvm_get_system_cpu

    flags = processor_flags()
    # Not "native", for which TVM quietly takes the oldest processor there is.
    options = {"kind": "llvm", "mcpu": str(llvm_get_system_cpu())}
    # A virtual machine may hide what the processor of that name has, and LLVM may not know the processor's name.
    dots = "avx512_vnni" in flags and bool(llvm_cpu_has_features("avx512vnni", TvmTarget(options)))
    tile = Tile(64, 4, dots) if "avx512f" in flags else Tile(32, 2) if "avx2" in flags else Tile(16, 4)
    return Isa(platform.machine(), options, tile, flags & EXTENSIONS)


_MAKERS: dict[str, Callable[[], Isa]] = {
    "host": _host,
    "x86-64-v2": lambda: Isa(HOST, {"kind": "llvm", "mcpu": "x86-64-v2"}, Tile(16, 2), _SSE4),
    "x86-64-v3": lambda: Isa(HOST, {"kind": "llvm", "mcpu": "x86-64-v3"}, Tile(32, 2), _AVX2),
    "x86-64-v4": lambda: Isa(HOST, {"kind": "llvm", "mcpu": "x86-64-v4"}, Tile(64, 4), _AVX2 | _AVX512),
    "aarch64": lambda: _cross("aarch64-linux-gnu", "aarch64", Tile(16, 4), "+neon"),
    "c": lambda: Isa(platform.machine(), {"kind": "c"}, Tile(16, 4), compiler="cc"),
    "riscv64gcv": lambda: _cross("riscv64-linux-gnu", "riscv64", Tile(16, 4), "+m", "+a", "+f", "+d", "+c", "+v"),
}


def knows(target: Target) -> bool:
    """Tell whether this backend compiles for a target."""
    return target.instruction_set in _MAKERS if target.kind != "gpu" else on_nvidia(target)


def on_nvidia(target: Target) -> bool:
    """Tell whether a target is a GPU of NVIDIA's."""
    return target.kind == "gpu" and re.fullmatch(r"sm_\d+", target.instruction_set) is not None


def isa_of(target: Target) -> Isa:
    """Return how to compile for a target that this backend knows; of the host it asks TVM."""
    if on_nvidia(target):
        return Isa(platform.machine(), {"kind": "cuda", "arch": target.instruction_set}, Tile(1, 1), gpu=True)
    return _MAKERS[target.instruction_set]()


def runs_here(target: Target) -> bool:
    """Tell whether this machine has the instructions of a target."""
    if target.instruction_set == "host":
        return True
    if on_nvidia(target):
        return runs_on_gpu(target.instruction_set)
    isa = isa_of(target)
    return isa.machine == platform.machine() and isa.features <= processor_flags()

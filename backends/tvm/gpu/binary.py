"""From CUDA source to a binary for one kind of GPU by nvcc, and from that to what a library holds."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memc.errors import MemcError

COMPILER = "nvcc"
INSTALL = "install the CUDA toolkit (https://developer.nvidia.com/cuda-downloads) and put its nvcc in PATH"

FLAGS = ("-O3", "-Xptxas", "-v")

_KERNEL = re.compile(r"Compiling entry function '(\w+)'.*?(?=Compiling entry function|\Z)", re.DOTALL)
_NUMBERS = {
    "registers": re.compile(r"Used (\d+) registers"),
    "shared": re.compile(r"(\d+) bytes smem"),
    "spilled": re.compile(r"(\d+) bytes spill stores"),
}


@dataclass(frozen=True)
class Kernel:
    """What a kernel takes: registers of a thread, bytes of shared memory of a block, bytes of registers spilled."""

    name: str
    registers: int
    shared: int
    spilled: int


@dataclass(frozen=True)
class Binary:
    """Compiled code of several kernels."""

    data: bytes
    kernels: tuple[Kernel, ...]

    @property
    def summary(self) -> str:
        """One line for the report."""
        spilled = sum(kernel.spilled > 0 for kernel in self.kernels)
        most = max((kernel.registers for kernel in self.kernels), default=0)
        shared = max((kernel.shared for kernel in self.kernels), default=0)
        spills = f"{spilled} with spills" if spilled else "no spills"
        return f"{len(self.kernels)} kernels, at most {most} registers a thread, {shared} bytes shared, {spills}"


def architectures() -> list[str]:
    """Return the kinds of GPUs that nvcc compiles for, none where it does not tell."""
    return subprocess.run([COMPILER, "--list-gpu-code"], capture_output=True, text=True).stdout.split()


def require_compiler(arch: str) -> None:
    """Raise ``MemcError`` E602 where nvcc is missing, or does not know ``arch``."""
    if shutil.which(COMPILER) is None:
        raise MemcError("E602", f"{COMPILER} is needed to compile for {arch}", "backend tvm", INSTALL)
    known = architectures()
    if known and arch not in known:
        message = f"this {COMPILER} does not compile for {arch}, but for {', '.join(known)}"
        raise MemcError("E602", message, "backend tvm", INSTALL)


def compile_source(source: str, arch: str) -> Binary:
    """Compile CUDA source. Raises ``MemcError`` E602 with nvcc's first error.

    Without fast mathematics, whose sines are wrong from a few turns on: rotation takes those of whole positions.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        path.write_text(source)
        command = [COMPILER, "-cubin", f"-arch={arch}", *FLAGS, "-o", str(made), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            reason = lines[0].replace(folder, "").strip("/ ") if lines else f"it ends with {done.returncode}"
            raise MemcError("E602", f"{COMPILER} does not compile for {arch}: {reason[:300]}", "backend tvm", INSTALL)
        return Binary(made.read_bytes(), read_kernels(done.stderr + done.stdout))


def read_kernels(told: str) -> tuple[Kernel, ...]:
    """Read what ``ptxas -v`` tells of each kernel."""
    found = []
    for match in _KERNEL.finditer(told):
        numbers = {name: pattern.search(match.group(0)) for name, pattern in _NUMBERS.items()}
        found.append(Kernel(match.group(1), **{name: int(n.group(1)) if n else 0 for name, n in numbers.items()}))
    return tuple(found)


def with_binary(packed: bytes, source: str, binary: bytes) -> bytes:
    """Return the modules of a library, as TVM packs them, with a binary in the place of CUDA source.

    Every text and every module has its length before it: the length of all, in a module named ``cuda`` its own, then
    the kind of what follows, each kernel's arguments, and the code. Raises ``ValueError`` where it is not so.
    """
    kind, code = _text(b"cuda"), _text(source.encode())
    start = packed.index(code)
    head = packed.rindex(kind, 0, start)  # tells the kind; the module's own length and its name come before
    name = packed.rindex(kind, 0, head)
    (total,), (inside,) = struct.unpack_from("<Q", packed), struct.unpack_from("<Q", packed, name + len(kind))
    end = start + len(code)
    if name + len(kind) + 8 != head or total != len(packed) - 8 or head + inside < end:
        raise ValueError("TVM packs the modules of a library in a way that is not known")
    body = _text(b"cubin") + packed[head + len(kind) : start] + _text(binary) + packed[end : head + inside]
    rest = packed[8 : name + len(kind)] + struct.pack("<Q", len(body)) + body + packed[head + inside :]
    return struct.pack("<Q", len(rest)) + rest


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def packer(source: str, binary: Binary) -> Callable[[Any, bool, str, str], str]:
    """Return what packs the modules that a library imports as an object file, for TVM's export."""

    def pack(module: Any, is_system_lib: bool, prefix: str, folder: str) -> str:
        from tvm_ffi import get_global_func

        packed = get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        symbol = str(get_global_func("runtime.ModuleImportsBlobName")())
        data, written = Path(folder) / "modules.bin", Path(folder) / "modules.s"
        data.write_bytes(with_binary(packed, source, binary.data))
        lines = [".section .rodata", ".balign 16", f".globl {symbol}", f"{symbol}:", f'.incbin "{data}"']
        written.write_text("\n".join([*lines, '.section .note.GNU-stack,"",%progbits', ""]))
        return str(written)

    return pack

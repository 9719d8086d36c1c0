"""TVM's runtime without TVM: the small library that runs what was compiled, opened by itself. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memc.errors import MemcError
from memc.machine import cores

REQUIRED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
"""Versions that work together: with a newer apache-tvm-ffi the compiler crashes when it writes a module down."""

INSTALL = "pip install " + " ".join(f"{name}=={wanted}" for name, wanted in REQUIRED.items())

_TRIAL = """
import numpy, tvm
from tvm import te
x = te.placeholder((4,), name="x")
y = te.compute((4,), lambda i: x[i] + 1, name="y")
built = tvm.compile(te.create_prim_func([x, y]), target=tvm.target.Target({"kind": "llvm"}))
out = tvm.runtime.tensor(numpy.zeros(4, "float32"))
built(tvm.runtime.tensor(numpy.ones(4, "float32")), out)
assert (out.numpy() == 2).all()
tvm.ir.save_json(tvm.tirx.IntImm("int64", 3))
"""
"""Compiles, runs, and writes a module down, which crashes where the two packages do not fit together."""

CPU, CUDA = 1, 2
POOLED = 2
"""Kinds of device and of allocator as the virtual machine counts them."""


def require_tvm() -> None:
    """Check that TVM is installed in the versions that work; raises ``MemcError`` E602 with the command otherwise."""
    for name, wanted in REQUIRED.items():
        try:
            found = version(name)
        except PackageNotFoundError as error:
            raise MemcError("E602", f"{name} is not installed", "backend tvm", INSTALL) from error
        if found != wanted:
            raise MemcError("E602", f"{name} {found} is installed, {wanted} is needed", "backend tvm", INSTALL)


@cache
def try_compiler() -> str:
    """Run a trial of the compiler in a process of its own and return what went wrong, empty when it works."""
    try:
        done = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "TVM's compiler hangs in a trial"
    if done.returncode == 0:
        return ""
    ended = (
        f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
    )
    return f"TVM's compiler does not pass a trial ({ended}): {INSTALL}"


@contextmanager
def _without_torch() -> Iterator[None]:
    """Keep ``tvm_ffi`` from importing torch, as it does wherever torch is installed: it would take seconds."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, which tvm_ffi provides for
    try:
        yield
    finally:
        del sys.modules["torch"]


@cache
def load_runtime() -> Any:
    """Open the runtime library and return ``tvm_ffi``; raises ``MemcError`` E602 where it does not load."""
    require_tvm()
    # Else the runtime ties the calling thread to the first processor, and whatever else the process does with it.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    with _without_torch():
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes

    # Its symbols must be seen by the compiler's library, should that be opened later in this process.
    _open("tvm_runtime", load_lib_ctypes)
    return tvm_ffi


@cache
def load_cuda() -> None:
    """Open the part of the runtime for NVIDIA GPUs; raises ``MemcError`` E602 where it does not load."""
    load_runtime()
    from tvm_ffi.libinfo import load_lib_ctypes

    _open("tvm_runtime_cuda", load_lib_ctypes)


def _open(name: str, load: Callable[..., Any]) -> None:
    found = find_spec("tvm")
    assert found is not None and found.submodule_search_locations
    folder = Path(next(iter(found.submodule_search_locations))) / "lib"
    try:
        load("tvm", name, "RTLD_GLOBAL", extra_lib_paths=[folder])
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise MemcError("E602", f"TVM's runtime does not load: {reason}", str(folder), INSTALL) from error


def open_machine(path: Path, device: int = CPU) -> Any:
    """Open a compiled library and return its virtual machine, on the CPU or the first device of another kind."""
    tvm_ffi = load_runtime()
    machine = tvm_ffi.load_module(str(path))["vm_load_executable"]()
    # A GPU's machine computes sizes on the CPU.
    machine["vm_initialization"](*(() if device == CPU else (device, 0, POOLED)), CPU, 0, POOLED)
    return machine


def set_threads(count: int | None) -> None:
    """Let functions run on ``count`` threads, None: as many as the runtime chooses; later calls may ask for others."""
    runtime = load_runtime()
    if count is None:
        count = int(runtime.get_global_func("runtime.NumThreads")())
    configure = runtime.get_global_func("runtime.config_threadpool")
    for used in (max(count, cores()), count):  # the first to come decides how many threads there can be
        # As many names of processors, which nothing is tied to: without them every loop asks the system how many it
        # has, by reading files, for as long as a small product takes.
        configure(1, used, [str(processor) for processor in range(used)])

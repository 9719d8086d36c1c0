"""Runs a compiled library: numpy in, numpy out, states written in place. Imports no torch."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from memc.artifact import Manifest, Port, check_digest
from memc.backends.tvm.gpu.device import capability, runs_on_gpu
from memc.backends.tvm.isa import processor_flags
from memc.backends.tvm.library import CPU, CUDA, REQUIRED, load_cuda, load_runtime, open_machine, set_threads
from memc.backends.tvm.tiles import Tuned
from memc.errors import MemcError
from memc.runtime.slots import Array, SlotRunner

LIBRARY = Path("lowered") / "tvm" / "model.so"
PARAMETERS = "parameters.safetensors"
INFO = "library.json"

ALIGNMENT = 64
"""Bytes at whose multiples the compiled functions expect every array to begin."""


class LibraryInfo(BaseModel):
    """``library.json``: what the library is for, and how its function is called.

    ``entry`` takes ``inputs``, then the states, then ``parameters`` (names in the parameter file), and returns the
    outputs, then the next values of the states in ``returned``; other states are written in place. ``limits`` bounds
    the ids that an input may hold. ``kernels`` are those of a GPU, with their names and what a thread and a block of
    threads take. ``tuned`` are products whose tiles were measured, on the processor ``tuned_on``.
    """

    model_config = ConfigDict(extra="forbid")

    entry: str
    machine: str
    features: list[str]
    options: dict[str, str | list[str]]
    versions: dict[str, str]
    inputs: list[str]
    states: list[str]
    parameters: list[str]
    limits: dict[str, int]
    returned: list[str] = []
    kernels: list[dict[str, str | int]] = []
    tuned: list[Tuned] = []
    tuned_on: str = ""


class TvmRunner(SlotRunner):
    """A compiled library and its parameters."""

    device = CPU

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        """Open a library with ``threads`` threads (None: the runtime's choice).

        Raises ``MemcError`` E402 where a file is not the one that was written, E602 where this machine or the installed
        runtime cannot run it, E309 where the parameters do not read.
        """
        super().__init__(manifest)
        path = folder / manifest.lowered
        for name in (path.name, PARAMETERS, INFO):
            check_digest(folder, manifest, path.parent / name)
        self.info = read_info(path.parent / INFO)
        _check_machine(self.info, manifest, folder)
        self._ffi = load_runtime()
        set_threads(threads)
        if self.device == CUDA:
            load_cuda()
        try:
            self._machine = open_machine(path, self.device)
        except (RuntimeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise MemcError("E602", f"the library does not load: {reason}", str(path), "convert again") from error
        self._entry = self._machine[self.info.entry]
        self._parameters = [self.place(array) for array in _read(path.parent / PARAMETERS, self.info.parameters)]

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return memory for a state, filled with zeros."""
        return _aligned(shape, dtype)

    def call(
        self, feeds: dict[str, Array], sizes: Mapping[str, int], state: Any, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the library once; see ``SlotRunner.call``. Raises ``MemcError`` E200 for ids out of range."""
        self._check_ids(feeds, sizes)
        given = [self._wrap(_fed(feeds[port.name], port)) for port in self.manifest.inputs]
        held = [self._wrap(state.current[name]) for name in self.info.states]
        outputs = self._entry(*given, *held, *self._parameters)
        for name, output in zip(self.info.returned, list(outputs)[1:], strict=True):
            state.current[name][...] = np.from_dlpack(output)
        logits: Any = np.from_dlpack(outputs[0])
        return logits  # type: ignore[no-any-return]

    def _check_ids(self, feeds: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
        limits = {**self.info.limits, **({self.keep: sizes["T"]} if self.keep is not None else {})}
        for name, rows in limits.items():
            if feeds[name].size and not (feeds[name].min() >= 0 and feeds[name].max() < rows):
                message = f"an input is out of range: {name} holds ids that are not below {rows}"
                raise MemcError("E200", message, self.manifest.source)

    def place(self, array: Array) -> Any:
        """Return a parameter as the library takes it."""
        return self._wrap(array)

    def _wrap(self, array: Array) -> Any:
        return self._ffi.from_dlpack(array)


def _aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Allocate zeros that begin at a multiple of ``ALIGNMENT``; memory is touched only as it is used."""
    kind = np.dtype(dtype)
    count = math.prod(shape) * kind.itemsize
    memory = np.zeros(count + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + count].view(kind).reshape(shape)


def _copied(array: Array, dtype: str) -> Array:
    made = _aligned(array.shape, dtype)
    made[...] = array
    return made


def _fed(array: Array, port: Port) -> Array:
    """Return an input as the library takes it: what is fetched, large and read where it lies, may begin anywhere."""
    if port.role == "fetched":
        return np.ascontiguousarray(array, port.dtype)
    return _copied(array, port.dtype)


def read_info(path: Path) -> LibraryInfo:
    """Read ``library.json``; raises ``MemcError`` E309 where it is no such file."""
    try:
        return LibraryInfo.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise MemcError("E309", f"the library's description does not read: {reason}", str(path)) from error


def _check_machine(info: LibraryInfo, manifest: Manifest, folder: Path) -> None:
    """Refuse a library that this machine cannot run, before it is opened: it would end the process."""
    hint = f"memc lower {folder} -o OUT --target cpu"
    if info.options["kind"] == "cuda":
        _check_gpu(str(info.options["arch"]), manifest, hint)
    if info.machine != platform.machine():
        message = f"the library is for {info.machine}, this machine is {platform.machine()}"
        raise MemcError("E602", message, manifest.target, hint)
    if missing := sorted(set(info.features) - processor_flags()):
        message = f"the library needs {', '.join(missing)}, which this processor does not have"
        raise MemcError("E602", message, manifest.target, hint)
    for name, wanted in info.versions.items():
        if REQUIRED.get(name) != wanted:
            message = f"the library is made with {name} {wanted}, this memc runs {REQUIRED.get(name)}"
            raise MemcError("E602", message, manifest.target, hint)


def _check_gpu(arch: str, manifest: Manifest, hint: str) -> None:
    if runs_on_gpu(arch):
        return
    found = capability()
    here = "this machine has no NVIDIA GPU that its driver shows"
    if found is not None:
        here = f"this GPU is of compute capability {found[0]}.{found[1]}"
    raise MemcError("E602", f"the library is for GPUs of {arch}, {here}", manifest.target, hint)


def _read(path: Path, names: list[str]) -> list[Array]:
    """Read parameters into one piece of memory: the system gives pages of megabytes to no smaller ones."""
    try:
        with safe_open(path, framework="np") as file:
            memory, end = _aligned((path.stat().st_size + ALIGNMENT * len(names),), np.uint8), 0
            read = []
            for name in names:
                values = file.get_tensor(name)
                start, end = end, end + -(-values.nbytes // ALIGNMENT) * ALIGNMENT
                read.append(memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape))
                read[-1][...] = values
            return read
    except (SafetensorError, OSError) as error:
        raise MemcError("E309", f"parameter file does not read: {error}", str(path), "convert again") from error

"""Launch kernels that were compiled ahead of time, through the vendor's own binding of its driver; no Triton."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memc.backends.triton.bundle import Bundle
from memc.backends.triton.compiler import Binary
from memc.backends.triton.variants import variant_of
from memc.errors import MemcError
from memc.kernels.launch import Gpu, Launch, Tile, device_of

ALIGNMENT = 16
"""Bytes at whose multiples the binaries expect every tensor to begin."""

STATIC_SHARED = 49_152
"""Bytes of shared memory that a block gets without being asked for."""


class Driver(Protocol):
    """What a launcher asks of a driver."""

    def load(self, binary: bytes, symbol: str, shared: int) -> Any:
        """Load a binary and return its kernel, allowed ``shared`` bytes of shared memory to a block."""

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, stream: int, values: Sequence[Any]
    ) -> None:
        """Launch a kernel on a stream; ``values`` are its arguments in order, of types of ``ctypes``."""


class Cuda:
    """NVIDIA's driver, through ``cuda-bindings``."""

    def __init__(self) -> None:
        """Raises ``MemcError`` E602 where the binding is not installed."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            hint = "pip install cuda-bindings"
            raise MemcError("E602", "cuda-bindings is not installed", "backend triton", hint) from error
        self._driver = driver

    def load(self, binary: bytes, symbol: str, shared: int) -> Any:
        """Load a cubin."""
        module = self._checked(self._driver.cuModuleLoadData(binary), symbol)
        kernel = self._checked(self._driver.cuModuleGetFunction(module, symbol.encode()), symbol)
        if shared > STATIC_SHARED:
            most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._checked(self._driver.cuFuncSetAttribute(kernel, most, shared), symbol)
        return kernel

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, stream: int, values: Sequence[Any]
    ) -> None:
        """Launch on the current context."""
        given = (tuple(value.value or 0 for value in values), tuple(type(value) for value in values))
        self._checked(self._driver.cuLaunchKernel(kernel, *grid, threads, 1, 1, shared, stream, given, 0), "launch")

    def _checked(self, result: tuple[Any, ...], what: str) -> Any:
        code, *values = result
        if code != self._driver.CUresult.CUDA_SUCCESS:
            name = str(getattr(code, "name", code))
            hint = (
                "the driver may be older than the compiler that made the kernel: update it, or convert on this machine"
            )
            raise MemcError("E602", f"the GPU's driver says {name}", what, hint)
        return values[0] if values else None


class Hip:
    """AMD's driver, through ``hip-python``."""

    def __init__(self) -> None:
        """Raises ``MemcError`` E602 where the binding is not installed."""
        try:
            from hip import hip
        except ImportError as error:
            hint = "pip install hip-python of the version of ROCm"
            raise MemcError("E602", "hip-python is not installed", "backend triton", hint) from error
        self._hip = hip

    def load(self, binary: bytes, symbol: str, shared: int) -> Any:
        """Load a code object; shared memory need not be asked for."""
        module = self._checked(self._hip.hipModuleLoadData(binary), symbol)
        return self._checked(self._hip.hipModuleGetFunction(module, symbol.encode()), symbol)

    def launch(
        self, kernel: Any, grid: tuple[int, int, int], threads: int, shared: int, stream: int, values: Sequence[Any]
    ) -> None:
        """Launch on the current device."""
        self._checked(
            self._hip.hipModuleLaunchKernel(
                kernel,
                gridDimX=grid[0],
                gridDimY=grid[1],
                gridDimZ=grid[2],
                blockDimX=threads,
                blockDimY=1,
                blockDimZ=1,
                sharedMemBytes=shared,
                stream=stream,
                kernelParams=None,
                extra=tuple(values),
            ),
            "launch",
        )

    def _checked(self, result: tuple[Any, ...], what: str) -> Any:
        code, *values = result
        if code != self._hip.hipError_t.hipSuccess:
            raise MemcError("E602", f"the GPU's driver says {getattr(code, 'name', code)}", what, "update ROCm")
        return values[0] if values else None


@dataclass
class BundleLauncher:
    """Launches what a bundle holds; what it does not hold is refused by name, never compiled on the way."""

    gpu: Gpu
    bundle: Bundle
    folder: Path
    driver: Driver
    tiles: Mapping[str, Mapping[str, Tile]] = field(default_factory=dict)
    _loaded: dict[str, tuple[Binary, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the binaries by the name of what they were made from."""
        self._known = {binary.variant.key: binary for binary in self.bundle.binaries}
        self._keys: dict[Any, str] = {}

    def __call__(self, launch: Launch) -> None:
        """Launch on the current stream. Raises ``MemcError`` E602 for a kernel that the bundle does not hold."""
        binary, kernel = self._kernel(launch)
        device = device_of(launch)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        # What is not aligned is a view that somebody cut; outputs are whole allocations, so a copy is only read.
        values = [_aligned(x) if isinstance(x, Tensor) else x for x in launch.arguments.values()]
        given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else ctypes.c_int(x) for x in values]
        given += [ctypes.c_void_p(0)] * binary.scratch
        self.driver.launch(kernel, launch.grid, binary.threads, binary.shared, stream, given)

    def _kernel(self, launch: Launch) -> tuple[Binary, Any]:
        key = self._key(launch)
        if key not in self._loaded:
            if key not in self._known:
                sizes = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
                message = f"the bundle holds no {launch.kernel} for this call"
                raise MemcError("E602", message, sizes, "convert again with this version of memc")
            binary = self._known[key]
            code = (self.folder / binary.file).read_bytes()
            self._loaded[key] = binary, self.driver.load(code, binary.symbol, binary.shared)
        return self._loaded[key]

    def _key(self, launch: Launch) -> str:
        """Return the name of a launch's variant; hashing it at every launch would cost more than the launch."""
        kinds = tuple(x.dtype if isinstance(x, Tensor) else int for x in launch.arguments.values())
        quick = launch.kernel, kinds, tuple(launch.constants.items()), launch.warps, launch.stages
        if quick not in self._keys:
            self._keys[quick] = variant_of(launch).key
        return self._keys[quick]


def _aligned(x: Tensor) -> Tensor:
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()

"""How kernels reach a GPU: host code says what to launch, a launcher of the moment does it.

An op's folder may hold ``triton.py``, the kernels, and ``device.py``, the host code that allocates outputs and says
which kernels to launch with what. ``device.py`` does not import Triton: on a machine without it the same host code is
served by kernels that were compiled ahead of time, and compiling ahead of time is running it on ``meta`` tensors with a
launcher that takes notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from memc.dialect.base import Arguments

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels take; they sum in float32."""


@dataclass(frozen=True)
class Gpu:
    """What host code may ask of a GPU.

    ``shared_memory`` in bytes is the most that one block may have, ``warp`` its threads that go in step,
    ``multiprocessors`` how many blocks at least are needed to fill it.
    """

    name: str
    shared_memory: int
    warp: int = 32
    multiprocessors: int = 108


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("nvidia-sm80", 166_912, 32, 108),
        Gpu("nvidia-sm90", 232_448, 32, 132),
        Gpu("nvidia-sm100", 232_448, 32, 148),
        Gpu("nvidia-sm120", 101_376, 32, 170),
        Gpu("amd-gfx942", 65_536, 64, 304),
        Gpu("amd-gfx950", 163_840, 64, 256),
    )
}
"""GPUs by the names of their targets (vendors' guides: CUDA C++ Programming Guide, table of technical specifications;
AMD Instinct instruction set guides, local data share)."""

INTERPRETER = Gpu("interpreter", 1 << 30, 32, 4)
"""Triton's interpreter, which runs kernels in numpy and has no limits of memory."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: its block sizes by name, warps to a block, and stages of its software pipeline."""

    sizes: Mapping[str, int]
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    ``kernel`` is ``OP.FUNCTION`` for the function of that name in ``memc.kernels.OP.triton``. ``arguments`` are its
    run-time arguments in its order: tensors, which are contiguous, and integers below 2^31. ``constants`` are its
    ``tl.constexpr`` arguments, among them every real number, such as a scale. ``grid`` is the number of blocks.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Tensor | int]
    constants: Mapping[str, int | float | bool | str]
    warps: int = 4
    stages: int = 2


class Launcher(Protocol):
    """Something that launches kernels on a GPU."""

    @property
    def gpu(self) -> Gpu:
        """The GPU that it launches on."""

    @property
    def tiles(self) -> Mapping[str, Mapping[str, Tile]]:
        """The tiles tuned for it, by kernel and then by shape."""

    def __call__(self, launch: Launch) -> None:
        """Launch a kernel on the current stream of the tensors' device."""


@dataclass(frozen=True)
class Jit:
    """Launch through Triton's own compiler, which compiles at the first launch; also in its interpreter."""

    gpu: Gpu
    tiles: Mapping[str, Mapping[str, Tile]] = field(default_factory=dict)

    def __call__(self, launch: Launch) -> None:
        """Compile where that has not been done, and launch."""
        options = {} if self.gpu == INTERPRETER else {"enable_fp_fusion": True}
        function(launch.kernel)[launch.grid](
            *launch.arguments.values(),
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
            **options,
        )


@dataclass
class Notes:
    """Launch nothing and note it: with ``meta`` tensors, what a program needs on a GPU that is not there."""

    gpu: Gpu
    tiles: Mapping[str, Mapping[str, Tile]] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)

    def __call__(self, launch: Launch) -> None:
        """Note a launch."""
        self.launches.append(launch)


@dataclass(frozen=True)
class DeviceKernels:
    """The host code of an op: ``forward`` and ``backward`` take what its reference takes and return the same.

    ``refuses(gpu, arguments)`` returns why the kernels do not take a call, in a few words, or "" where they do. It
    looks at shapes, types and options alone.
    """

    forward: Callable[..., Any]
    refuses: Callable[..., str]
    backward: Callable[..., Any] | None = None
    in_place: Callable[..., Any] | None = None
    """Runs the form of ``memc.dialect.in_place``, on the same arguments, and changes the states that it is given."""


def power_of_two(size: int) -> int:
    """Return the least power of two that is not below ``size``: Triton's blocks are of such sizes."""
    return 1 << max(0, size - 1).bit_length()


def function(kernel: str) -> Any:
    """Return the Triton function that a launch names."""
    op, name = kernel.split(".")
    return getattr(import_module(f"memc.kernels.{op}.triton"), name)


@cache
def device_kernels(op: str) -> DeviceKernels | None:
    """Return the host code of ``memc::op``, None for an op without kernels of its own."""
    if find_spec(f"memc.kernels.{op}.device") is None:
        return None
    kernels = import_module(f"memc.kernels.{op}.device").KERNELS
    assert isinstance(kernels, DeviceKernels)
    return kernels


_active: list[tuple[Launcher | None, str]] = []


@contextmanager
def launching(launcher: Launcher | None, device: str = "") -> Iterator[None]:
    """Launch through ``launcher`` meanwhile, for tensors on one kind of ``device``, by default on any.

    None: run the references, also on a GPU. Of the process, not of the thread: autograd runs a backward pass on threads
    of its own.
    """
    entry = (launcher, device)
    _active.append(entry)
    try:
        yield
    finally:
        # The last that is this one: another thread may have added its own since.
        index = next(i for i in reversed(range(len(_active))) if _active[i] is entry)
        del _active[index]


def launcher_of(device: torch.device) -> Launcher | None:
    """Return what launches kernels for tensors on ``device``, None where nothing does."""
    for launcher, kind in reversed(_active):
        if kind in ("", device.type):
            return launcher
    return _jit(device.index or 0) if device.type == "cuda" else None


def launch(call: Launch) -> None:
    """Launch through the launcher of the moment."""
    launcher = launcher_of(device_of(call))
    assert launcher is not None, "host code runs where there is a launcher"
    launcher(call)


def tile(kernel: str, shape: str, default: Tile, device: torch.device) -> Tile:
    """Return how ``kernel`` is best cut for a ``shape``, as tuned on this GPU, else ``default``."""
    launcher = launcher_of(device)
    return default if launcher is None else launcher.tiles.get(kernel, {}).get(shape, default)


def gpu_of(device: torch.device) -> Gpu:
    """Return the GPU that host code is working for."""
    launcher = launcher_of(device)
    assert launcher is not None, "host code runs where there is a launcher"
    return launcher.gpu


def precision(device: torch.device, *kinds: torch.dtype) -> str:
    """Return how Triton is to multiply matrices of these types; those of different types are widened to float32.

    That on NVIDIA's tensor cores is three products in tf32, nearly as exact as float32 itself.
    """
    wide = torch.float32 in kinds or len(set(kinds)) > 1
    return "tf32x3" if wide and gpu_of(device).name.startswith("nvidia") else "ieee"


def device_of(call: Launch) -> torch.device:
    """Return the device of a launch's tensors."""
    return next(value.device for value in call.arguments.values() if isinstance(value, Tensor))


def dispatch(
    op: str, reference: Callable[..., Any], form: Literal["forward", "backward", "in_place"] = "forward"
) -> Callable[..., Any]:
    """Return what runs a form of ``memc::op``: its kernels where there is a launcher and they take the call.

    Else it is ``reference``; without a launcher, as on a CPU, that is one look at a list.
    """

    def run(args: Arguments, *gradients: Tensor) -> Any:
        launcher = launcher_of(args.device)
        kernels = device_kernels(op) if launcher is not None else None
        own = None if kernels is None else getattr(kernels, form)
        if launcher is None or kernels is None or own is None or kernels.refuses(launcher.gpu, args):
            return reference(args, *gradients)
        return own(args, *gradients)

    return run


def name_of(index: int) -> str:
    """Return the name of the target that a GPU which torch sees is of."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"amd-{properties.gcnArchName.split(':')[0]}"
    return f"nvidia-sm{properties.major}{properties.minor}"


@cache
def _jit(index: int) -> Launcher | None:
    """Return the launcher for a GPU that torch sees, None without Triton."""
    if find_spec("triton") is None:
        return None
    name, properties = name_of(index), torch.cuda.get_device_properties(index)
    warp = 64 if torch.version.hip else 32
    known = GPUS.get(name)
    memory = known.shared_memory if known else 49_152
    from memc.kernels.tiles import tiles_of

    return Jit(Gpu(name, memory, warp, properties.multi_processor_count), tiles_of(name))

"""Where training computes: on this machine's GPU if torch sees one, else on its CPU.

Everything around the training (rewriting, saving, verification) stays on the CPU, so programs are lent to the GPU for
the part that trains and are back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from memc.machine import memory_bytes, multiplies_bfloat16
from memc.program import Program, named_tensors
from memc.recipe import Shard
from memc.train.parallel import local_count, own_gpu

CPU = torch.device("cpu")

FILLED = 0.75
"""Share of a device's memory that programs and what is kept of their training may fill; the rest is for activations."""

TRAINED = 6
"""How often the bytes of what learns are there, beside the program: its own value, the gradient and its average over
processes, two moments, and the best so far."""


def accelerator(rank: int = 0) -> torch.device:
    """Return the device that a process trains on: its own GPU, where there is one."""
    return torch.device("cuda", own_gpu(rank)) if torch.cuda.is_available() else CPU


def products_on(device: torch.device) -> torch.dtype | None:
    """Return the type of products with pretrained weights while something learns; None for that of the weights."""
    return torch.bfloat16 if device != CPU or multiplies_bfloat16() else None


def name_of(device: torch.device) -> str:
    """Return what a device is called in reports."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


def too_large(
    shard: Shard,
    device: torch.device,
    programs: Collection[Program],
    products: torch.dtype | None,
    trained: Collection[Tensor] = (),
) -> bool:
    """Tell whether a process is not to have all of some programs on ``device`` while ``trained`` of them learns.

    Where a recipe's ``shard`` leaves it open that is decided from their bytes, and those of weights that are rounded to
    the type of ``products``, before any is there.
    """
    if shard != "auto":
        return shard == "always"
    total, sharing = memory_bytes(), local_count()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        sharing = math.ceil(sharing / torch.cuda.device_count())
    if total is None:
        return False
    held = {id(value): value for program in programs for _, value in named_tensors(program.module)}
    needed = sum(value.nbytes for value in held.values()) + TRAINED * sum(value.nbytes for value in trained)
    if products is not None:
        wide = (v for v in held.values() if v.is_floating_point() and v.dim() > 1 and v.itemsize > products.itemsize)
        needed += sum(value.numel() * products.itemsize for value in wide)
    return needed > FILLED * total / sharing


@contextmanager
def lent(device: torch.device, *programs: Program, streams: bool = False) -> Iterator[None]:
    """Keep programs on ``device`` for as long as this lasts, with matrix products in TensorFloat-32 there.

    Parameters stay the same objects, in place: what two programs share they share on both sides. What nothing has
    changed is not copied back, so that weights mapped from a file stay mapped. With ``streams`` the weights that the
    model came with stay at home, none of which may learn then, and each op is given copies of those that it reads.
    """
    if device == CPU:
        yield
        return
    precision = torch.get_float32_matmul_precision()
    held = {id(value): value for program in programs for _, value in named_tensors(program.module)}
    for value in _pretrained(programs) if streams else ():
        held.pop(id(value), None)
    homes = {key: value.data for key, value in held.items()}
    torch.set_float32_matmul_precision("high")
    try:
        for value in held.values():
            value.data = value.data.to(device)
        for program in programs:
            program.make_tensors_on(device)
        with Streamed(device) if streams else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for key, value in held.items():
            value.data = _unless_equal(value.data.cpu(), homes[key])
        for program in programs:
            program.make_tensors_on(CPU)


def _unless_equal(now: Tensor, before: Tensor) -> Tensor:
    return before if torch.equal(now, before) else now


def _pretrained(programs: Collection[Program]) -> Iterator[Tensor]:
    for program in programs:
        for name, value in named_tensors(program.module):
            if name in program.provenance and program.provenance[name].source:
                yield value


class Streamed(TorchFunctionMode):
    """Gives the ops of a graph their tensors on a device, copies of those that are at home."""

    def __init__(self, device: torch.device) -> None:
        """Note the device."""
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, if it is an op of a graph on nothing that is at home."""
        given = args, dict(kwargs or {})
        if isinstance(func, OpOverload):
            given = pytree.tree_map_only(Tensor, self._there, given)
        return func(*given[0], **given[1])

    def _there(self, value: Tensor) -> Tensor:
        # A single number may be anywhere, and what stands for a tensor where a graph is traced has no values.
        home = type(value) in (Tensor, torch.nn.Parameter) and value.dim() and value.device != self._device
        return value.to(self._device) if home else value

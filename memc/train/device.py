"""Where training computes: on this machine's GPU if torch sees one, else on its CPU.

Everything around the training (rewriting, saving, verification) stays on the CPU, so programs are lent to the GPU for
the part that trains and are back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from memc.machine import multiplies_bfloat16
from memc.program import Program, named_tensors

CPU = torch.device("cpu")


def accelerator(rank: int = 0) -> torch.device:
    """Return the device that a process trains on: GPUs are dealt out to the processes of a machine by their rank."""
    return torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else CPU


def products_on(device: torch.device) -> torch.dtype | None:
    """Return the type of products with pretrained weights while something learns; None for that of the weights."""
    return torch.bfloat16 if device != CPU or multiplies_bfloat16() else None


def name_of(device: torch.device) -> str:
    """Return what a device is called in reports."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else device.type


@contextmanager
def lent(device: torch.device, *programs: Program) -> Iterator[None]:
    """Keep programs on ``device`` for as long as this lasts, with matrix products in TensorFloat-32 there.

    Parameters stay the same objects, in place: what two programs share they share on both sides. What nothing has
    changed is not copied back, so that weights mapped from a file stay mapped.
    """
    if device == CPU:
        yield
        return
    precision = torch.get_float32_matmul_precision()
    held = {id(value): value for program in programs for _, value in named_tensors(program.module)}
    homes = {key: value.data for key, value in held.items()}
    torch.set_float32_matmul_precision("high")
    try:
        for value in held.values():
            value.data = value.data.to(device)
        for program in programs:
            program.make_tensors_on(device)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for key, value in held.items():
            value.data = _unless_equal(value.data.cpu(), homes[key])
        for program in programs:
            program.make_tensors_on(CPU)


def _unless_equal(now: Tensor, before: Tensor) -> Tensor:
    return before if torch.equal(now, before) else now

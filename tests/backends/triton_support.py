"""Run what the triton backend lowers on a CPU, its kernels in Triton's interpreter."""

from __future__ import annotations

import torch

from memc.backend import LowerOptions
from memc.backends.triton.backend import describe
from memc.backends.triton.graph import prepare
from memc.backends.triton.runner import TritonRunner
from memc.kernels.launch import INTERPRETER, Jit
from memc.program import Program
from tests.backends.runs import manifest_of
from tests.kernels.triton_support import interpreted  # noqa: F401 - has the kernels interpreted


def interpret(program: Program, context: int = 40) -> TritonRunner:
    """Return a runner of what ``program`` becomes, on the CPU."""
    prepared = prepare(program)
    lowered = describe(program, prepared, LowerOptions(context=context), {})
    manifest = manifest_of(lowered, program, "fp32", "triton")
    return TritonRunner(prepared, manifest, torch.device("cpu"), Jit(INTERPRETER))

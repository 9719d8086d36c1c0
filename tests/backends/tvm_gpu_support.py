"""The functions for GPUs on this processor: as they are written, and as TVM's rules map them to threads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tvm
from tvm import tirx
from tvm.relax.backend.cpu_generic import pipeline as generic
from tvm_ffi import structural_map
from tvm_support import lower

from memc.artifact import read_manifest
from memc.backends.tvm import build
from memc.backends.tvm.gpu.runner import DeviceRunner
from memc.backends.tvm.gpu.schedule import mapping_passes, target_of
from memc.backends.tvm.isa import Isa, isa_of
from memc.backends.tvm.library import CPU
from memc.program import Program
from memc.target import get_target

GPU = isa_of(get_target("nvidia-sm90"))
HERE: Isa = replace(GPU, options=isa_of(get_target("cpu")).options)
"""The functions for GPUs, compiled for this processor."""


class OnProcessor(DeviceRunner):
    """Runs them as on a GPU: what it reads and writes is memory of its own."""

    device = CPU


def emulate(
    program: Program, folder: Path, patch: pytest.MonkeyPatch, *, weights: str = "fp32", threads: bool = False
) -> OnProcessor:
    """Lower a program with the functions for GPUs for this processor, and open it.

    ``threads``: mapped to the threads of a GPU, which are gone through one after another.
    """
    patch.setattr("memc.backends.tvm.backend.isa_of", lambda target: HERE)
    if threads:
        patch.setattr(build, "_compile", compile_mapped)
    lower(program, folder, weights=weights, target="nvidia-sm90")
    return OnProcessor(folder, read_manifest(folder), 1)


def compile_mapped(module: Any, target: Any) -> Any:
    """Compile what is mapped to threads for a processor without any.

    In what the rules make, each loop over threads goes through all of them, and all that one does lies within it: taken
    one after another, they compute the same.
    """
    for_gpu = target_of(GPU)
    with for_gpu:
        module = tvm.transform.Sequential(mapping_passes(for_gpu))(module)
    for name, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc):
            module.update_func(name, one_after_another(function))
    steps = [*generic.dataflow_lower_passes(target), *generic.finalize_passes(target)]
    with target:
        return tvm.compile(module, target=target, relax_pipeline=tvm.transform.Sequential(steps))


def serial(loop: tirx.For) -> tirx.For:
    """Return a loop that goes through the threads of one over threads, others as they are."""
    if loop.kind != tirx.ForKind.THREAD_BINDING:
        return loop
    return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)


def one_after_another(function: Any) -> Any:
    """Replace loops over threads by loops."""
    return function.with_body(structural_map(function.body, [(tirx.For, serial)]))

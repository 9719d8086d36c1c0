"""What TVM is told of a GPU, how loops are mapped to its threads, and the CUDA source that is made."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.backend.cuda import pipeline as cuda
from tvm.s_tir import dlight
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx import PrimFunc

from memc.backends.tvm.gpu.kernels.common import OPAQUE
from memc.backends.tvm.isa import Isa

LIMITS = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 48 << 10, "thread_warp_size": 32}
"""What every NVIDIA GPU has: TVM would ask the one of this machine, and there may be none."""


def target_of(isa: Isa) -> Any:
    """Return TVM's target; the host of a GPU is any processor of this machine's kind."""
    if not isa.arch:
        return tvm.target.Target(isa.options)
    return tvm.target.Target({**isa.options, **LIMITS}, host=tvm.target.Target({"kind": "llvm"}))


RULES = (
    dlight.gpu.Matmul(),
    dlight.gpu.GEMV(),
    dlight.gpu.Reduction(),
    dlight.gpu.GeneralReduction(),
    dlight.gpu.Fallback(),
)
"""TVM's rules in the order of its own pipeline; the last one gives a thread to every place of the outer loops."""


def pipeline(target: Any) -> Any:
    """Return TVM's pipeline for NVIDIA GPUs, in which a rule that stops at a function leaves it to the next."""
    lowered = [*cuda.dataflow_lower_passes(target), *cuda.finalize_passes(target)]
    return tvm.transform.Sequential([*mapping_passes(target), *lowered])


def mapping_passes(target: Any) -> list[Any]:
    """Return the passes up to where the loops of every function are mapped to threads."""

    def map_all(module: Any, _: Any) -> Any:
        for name, function in module.functions_items():
            if isinstance(function, PrimFunc) and not function.attrs.get("tirx.is_scheduled", False):
                module.update_func(name, mapped(function, target))
        return module

    relaxed = relax.transform
    fuse = [relaxed.LegalizeOps(), relaxed.AnnotateTIROpPattern(), relaxed.FoldConstant()]
    fuse += [relaxed.FuseOps(), relaxed.FuseTIR(), tvm.transform.module_pass(map_all, opt_level=0)]
    return [*cuda.library_dispatch_passes(target), *fuse]


def mapped(function: Any, target: Any) -> Any:
    """Return a function whose loops are mapped to threads by the first rule that knows it.

    One that writes a state is left to the last rule: the others take its blocks, with loops of their own, for what they
    are not. One that no rule knows stays as it is: TVM's own sorting starts threads itself, and the compiler refuses a
    function that starts none.
    """
    opaque = function.attrs.get("op_pattern") == OPAQUE
    for rule in RULES[-1:] if opaque else RULES:
        try:
            made = rule.apply(function, target, False)
        except (ScheduleError, RuntimeError, AssertionError):
            continue
        if made is not None:
            return made.mod["main"].with_attr("tirx.is_scheduled", True)
    return function


def device_source(executable: Any) -> str:
    """Return the CUDA source of all kernels of a library. Raises ``ValueError`` where there is not one module of it."""
    found, todo = [], [executable.mod]
    while todo:
        module = todo.pop()
        found += [module] if module.kind == "cuda" else []
        todo += list(module.imports)
    if len(found) != 1:
        raise ValueError(f"{len(found)} modules for the GPU instead of one")
    return str(found[0].inspect_source())

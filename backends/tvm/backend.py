"""Lowering to a library: check, rewrite, compile, store the parameters."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch.fx import Node

from memc.backend import Lowered, LowerOptions, No, Yes
from memc.backends.tvm import support
from memc.backends.tvm.gpu.binary import Binary
from memc.backends.tvm.isa import Isa, isa_of, knows, runs_here
from memc.backends.tvm.library import INSTALL, REQUIRED, require_tvm, try_compiler
from memc.backends.tvm.runner import INFO, LIBRARY, PARAMETERS, LibraryInfo, read_info
from memc.backends.tvm.text import FROM_SOURCE, HOW_TO_RUN, ON_A_GPU
from memc.backends.tvm.tiles import Tiles, Tuned
from memc.errors import MemcError
from memc.machine import cpu_name
from memc.prepare import capacity_of, forms_of, is_memc, ports
from memc.program import Program
from memc.target import Target
from memc.tensor_file import LateTensor, write_tensors

WEIGHTS = ("fp32", "int8", "int4")
GPU_WEIGHTS = ("fp32", "fp16")
"""Weight types for CPUs, and for GPUs."""


def supports(node: Node, target: Target) -> Yes | No:
    """Tell whether and how a node is lowered; ATen ops are proven by the import itself."""
    if reason := _refuses_target(target):
        return No(reason)
    if not is_memc(node.target):
        return Yes("Relax, fused by TVM")
    return support.gpu_form(node) if target.kind == "gpu" else support.form(node)


def refuses_weights(weights: str, target: Target) -> str | None:
    """Tell why a weight type is refused on a target, or None."""
    if reason := _refuses_target(target):
        return reason
    if target.kind == "gpu":
        taken = " and ".join(GPU_WEIGHTS)
        return None if weights in GPU_WEIGHTS else f"its functions for GPUs read {taken}, not {weights}"
    if weights in ("fp16", "bf16"):
        return f"the functions of the tvm backend compute in float32: {weights} would be cast at every step"
    if weights not in WEIGHTS:
        return f"unknown weight type {weights!r}: {', '.join(WEIGHTS)}"
    return None


def refuses_tuning(target: Target) -> str | None:
    """Tell why products cannot be timed for a target, or None."""
    if reason := _refuses_target(target):
        return reason
    if target.kind == "gpu":
        return "TVM's rules map products to a GPU's threads, there are no tiles to time"
    return None if runs_here(target) else f"this machine does not run what is compiled for {target.name}"


def lower(program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
    """Write library, parameters and description under ``folder/lowered/tvm``; see ``Backend.lower``."""
    forms = forms_of(program, target, "tvm", supports)
    require_tvm()
    if reason := try_compiler():
        raise MemcError("E602", reason, "backend tvm", INSTALL)
    from memc.backends.tvm.build import ENTRY, SOURCE, build
    from memc.backends.tvm.gpu.weights import PlainParameters
    from memc.backends.tvm.graph import prepare
    from memc.backends.tvm.weights import Parameters

    isa = isa_of(target)
    measured = tuned(program, isa, options)
    tiles = Tiles.of(isa.tile, measured)
    prepared = prepare(program, (PlainParameters if isa.gpu else Parameters)(tiles, options.weights))
    path = folder / LIBRARY
    binary = build(program, prepared, isa, tiles, path)
    stored = {p.source: LateTensor(p.dtype, p.shape, p.make) for p in prepared.parameters}
    write_tensors(path.parent / PARAMETERS, stored)
    in_place = frozenset(state.name for state in prepared.states)
    inputs, outputs, states, symbols = ports(program, prepared.states, in_place, keep=prepared.keep)
    info = LibraryInfo(
        entry=ENTRY,
        machine=isa.machine,
        features=sorted(isa.features),
        options=isa.options,
        versions=REQUIRED,
        inputs=[port.name for port in inputs],
        states=[state.input for state in states],
        parameters=list(stored),
        limits=prepared.limits,
        returned=list(prepared.returned),
        kernels=[asdict(kernel) for kernel in binary.kernels] if binary is not None else [],
        tuned=measured,
        tuned_on=cpu_name() if measured else "",
    )
    (path.parent / INFO).write_text(info.model_dump_json(indent=1) + "\n")
    before = FROM_SOURCE.format(folder=LIBRARY.parent / SOURCE) if isa.source else ON_A_GPU if isa.gpu else ""
    return Lowered(
        str(LIBRARY),
        inputs,
        outputs,
        states,
        capacity_of(program, options, grows=any(state.grows is not None for state in states)),
        symbols,
        before + HOW_TO_RUN.format(path=LIBRARY),
        {
            **forms,
            "weights": prepared.summary,
            "library": _library(isa, target, binary),
            **({"tuned": _gains(measured)} if measured else {}),
        },
    )


def tuned(program: Program, isa: Isa, options: LowerOptions) -> list[Tuned]:
    """Return the products that are timed now, or were for another artifact on a processor like this one."""
    from memc.backends.tvm.graph import prepare
    from memc.backends.tvm.weights import Parameters

    if options.tune:
        from memc.backends.tvm.tune import tune

        plain = Parameters(Tiles(isa.tile), options.weights)
        prepare(program, plain)
        return tune(plain.products, isa, options.tune, options.threads)
    path = options.tuned / LIBRARY.parent / INFO if options.tuned is not None else None
    if path is None or not path.is_file():
        return []
    before = read_info(path)
    same = before.tuned_on == cpu_name() and before.options == isa.options
    return list(before.tuned) if same else []


def _gains(measured: Sequence[Tuned]) -> str:
    """Say of how many products another tile is used, and what it gains."""
    faster = [one for one in measured if any(gain != 1 for gain in one.gain.values())]
    if not faster:
        return f"{len(measured)} kinds of products timed, none faster in another tile"
    gains = {rows: statistics.geometric_mean(one.gain[rows] for one in faster) for rows in faster[0].gain}
    by_rows = ", ".join(f"{gain:.2f} times as fast with {rows} rows" for rows, gain in gains.items())
    return f"{len(faster)} of {len(measured)} kinds of products in another tile: {by_rows}"


def _library(isa: Isa, target: Target, binary: Binary | None) -> str:
    """Say for what the library is, and where it has not been run."""
    if binary is not None:
        run = "" if runs_here(target) else "; compiled, not run: this machine has no such GPU"
        return f"{binary.summary}, for {isa.arch}{run}"
    if isa.source:
        return f"C source, compiled here for {isa.machine}"
    options = ", ".join(f"{name} {value}" for name, value in isa.options.items() if name != "kind")
    return f"{isa.machine} ({options})" + ("" if runs_here(target) else "; compiled, not run: this machine lacks it")


def _refuses_target(target: Target) -> str | None:
    if not knows(target):
        what = f"{target.name} is a {target.kind} target ({target.instruction_set})"
        return f"the tvm backend compiles for CPUs and for NVIDIA's GPUs, {what}"
    return None

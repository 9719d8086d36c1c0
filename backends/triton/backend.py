"""Lowering for a GPU: check, rewrite, find the kernels that are needed, compile them, store the program."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

import memc.kernels  # noqa: F401 - the ops that programs are made of
from memc.artifact import Manifest, check_digest
from memc.backend import Lowered, LowerOptions, No, Runner, Yes
from memc.backends.eager.precision import WEIGHT_TYPES, store_weights
from memc.backends.triton.bundle import INFO, build, fit, read_bundle
from memc.backends.triton.graph import Prepared, prepare
from memc.backends.triton.launcher import BundleLauncher, Cuda, Driver, Hip
from memc.backends.triton.runner import TritonRunner
from memc.backends.triton.variants import Variant, on_nothing
from memc.dialect import op_spec
from memc.dialect.in_place import in_place
from memc.errors import MemcError
from memc.infer import infer
from memc.kernels.launch import GPUS, device_kernels, name_of
from memc.prepare import capacity_of, forms_of, is_memc, ports
from memc.program import Program
from memc.program_io import GRAPH, PARAMETERS, load_program, save_program
from memc.target import Target, get_target

PLACE = Path("lowered") / "triton"
KERNELS = "kernels"
HOW_TO_RUN = (
    "memc.runtime.load(OUT) on a GPU of the target's kind; it needs torch and memc, and no Triton: the kernels are in"
    f" {PLACE.as_posix()}/{KERNELS}"
)
COMPILE = "MEMC_TORCH_COMPILE"


def refuses_target(target: Target) -> str | None:
    """Return why a target is not compiled for, None where it is."""
    if target.name in GPUS:
        return None
    return f"the triton backend compiles for {', '.join(GPUS)}, not for {target.name}"


def supports(node: Node, target: Target) -> Yes | No:
    """Tell whether and how a node is lowered: by a kernel, or by torch on the GPU."""
    if reason := refuses_target(target):
        return No(reason)
    spec = op_spec(node.target)
    if spec is None:
        return No(f"{node.target} is no dialect op") if is_memc(node.target) else Yes("torch")
    if spec.states and in_place(spec) is None:
        return No("its state has no form that is written in place on a GPU; --backend eager runs it in torch")
    kernels = device_kernels(spec.name)
    if kernels is None:
        return Yes("torch on the GPU")
    if reason := kernels.refuses(GPUS[target.name], on_nothing(spec, node)):
        return No(f"{reason}; --backend eager runs it in torch")
    return Yes("Triton kernels" + (", state in place" if spec.states else ""))


def lower(program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
    """Write program, kernels and description under ``folder/lowered/triton``; see ``Backend.lower``."""
    forms = forms_of(program, target, "triton", supports)
    stored = store_weights(program, WEIGHT_TYPES[options.weights]).copy()
    infer(stored)  # with a symbol for each size that changes, by which the kernels for each size are found
    prepared = prepare(stored)
    gpu = GPUS[target.name]
    bundle = fit(stored, prepared.module, target, gpu, folder / PLACE / KERNELS)
    save_program(stored, folder / PLACE)
    return describe(stored, prepared, options, {**forms, "kernels": _kernels(bundle.binaries, target)})


def describe(program: Program, prepared: Prepared, options: LowerOptions, forms: dict[str, str]) -> Lowered:
    """Describe what was lowered from ``program``, for whoever runs it."""
    written = frozenset(spec.name for spec in program.states) - frozenset(prepared.swapped)
    inputs, outputs, states, symbols = ports(program, program.states, written, keep=prepared.keep, halves=True)
    grows = any(state.grows is not None for state in states)
    capacity = capacity_of(program, options, grows=grows)
    return Lowered((PLACE / GRAPH).as_posix(), inputs, outputs, states, capacity, symbols, HOW_TO_RUN, forms)


def _kernels(binaries: list[Any], target: Target) -> str:
    """Say what was compiled, and where it has not been run."""
    most = max((binary.registers for binary in binaries), default=0)
    run = "" if runs_here(target) else "; compiled, not run: this machine has no such GPU"
    return f"{len(binaries)} binaries for {target.instruction_set}, at most {most} registers a thread, no spills{run}"


def here() -> str:
    """Return the name of the target of the GPU that torch sees, "" without one."""
    return name_of(0) if torch.cuda.is_available() else ""


def runs_here(target: Target) -> bool:
    """Tell whether the GPU of this machine is of the target's kind.

    A binary for compute capability 8.0 runs on all of 8.x; those for later ones are for one alone.
    """
    found = here()
    return found == target.name or (target.name == "nvidia-sm80" and found.startswith("nvidia-sm8"))


def load(folder: Path, manifest: Manifest) -> Runner:
    """Load a lowered program; see ``Backend.load``."""
    target = get_target(manifest.target)
    if not runs_here(target):
        found = here()
        message = f"the kernels are for {target.name}, this GPU is {found}" if found else "torch sees no GPU here"
        hint = f"memc lower {folder} -o OUT --target {found or 'cpu'}"
        raise MemcError("E602", message, manifest.target, hint)
    place = folder / PLACE
    bundle = read_bundle(place / KERNELS / INFO)
    names = [INFO, *(binary.file for binary in bundle.binaries)]
    for path in (place / GRAPH, place / PARAMETERS, *(place / KERNELS / name for name in names)):
        check_digest(folder, manifest, path)
    driver: Driver = Hip() if torch.version.hip else Cuda()
    launcher = BundleLauncher(GPUS[target.name], bundle, place / KERNELS, driver, bundle.tiles)
    device = torch.device("cuda")
    program = load_program(place)
    program.module.to(device)
    program.make_tensors_on(device)
    program.module.requires_grad_(False)
    return TritonRunner(prepare(program), manifest, device, launcher, compiled=os.environ.get(COMPILE) == "1")


@cache
def try_compiler() -> str:
    """Compile a small kernel for one GPU and return what goes wrong, empty when it works."""
    trial = Variant(
        kernel="norm.normalise",
        arguments={"x": "*fp32", "weight": "*fp32", "bias": "*fp32", "out": "*fp32", "rows": "i32"},
        constants={
            "size": 64,
            "eps": 1e-5,
            "center": False,
            "weighted": False,
            "biased": False,
            "block_rows": 1,
            "block_size": 64,
        },
        warps=4,
        stages=2,
    )
    target = get_target("nvidia-sm80")
    try:
        with tempfile.TemporaryDirectory() as folder:
            build([trial], target, GPUS[target.name], Path(folder))
    except MemcError as error:
        return error.message
    return ""

"""What the eager backend takes, and how it writes and loads a program."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch.fx import Node

import memc.kernels  # noqa: F401 - the implementations that this backend runs
from memc.artifact import Manifest, Port, State
from memc.backend import Backend, Lowered, LowerOptions, No, Runner, Yes
from memc.backends.eager.precision import WEIGHT_TYPES, fold_casts, store_weights
from memc.backends.eager.runner import EagerRunner
from memc.dialect import op_spec
from memc.errors import MemcError
from memc.program import InputSpec, OutputSpec, Program, StateSpec
from memc.program_io import GRAPH, load_program, save_program
from memc.target import Target, get_target

_HOW_TO_RUN = "memc.runtime.load(OUT); it needs torch and memc, use another backend for a file that runs without"


class EagerBackend(Backend):
    """Run a program in torch, op by op, with states that grow as the graph has them."""

    name: ClassVar[str] = "eager"
    weights: ClassVar[tuple[str, ...]] = tuple(WEIGHT_TYPES)

    def runs_here(self, target: Target) -> bool:
        """Tell whether torch sees a GPU where the target is one; it runs what is for any processor."""
        return target.kind != "gpu" or torch.cuda.is_available()

    def supports(self, node: Node, target: Target) -> Yes | No:
        """Take every op that torch has an implementation of, on any target that torch runs on."""
        if target.kind == "source":
            return No(f"torch does not run on {target.name}")
        if node.op != "call_function" or op_spec(node.target) is not None:
            return Yes("torch reference")
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in ("aten", "prims"):
            return No(f"{node.target} is no dialect op")
        return Yes("aten")

    def refuses_weights(self, weights: str, target: Target) -> str | None:
        """Take float types only."""
        if weights in WEIGHT_TYPES:
            return None
        return f"the eager backend stores weights as {', '.join(WEIGHT_TYPES)}; quantised ones need onnx"

    def lower(self, program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
        """Write the program with its weights in the asked type under ``folder/lowered/eager``.

        Raises ``MemcError`` E601 for weights or an op that it does not take, before anything is written.
        """
        forms: dict[str, str] = {}
        for node in program.module.graph.nodes:
            match self.supports(node, target):
                case No(reason):
                    raise MemcError("E601", reason, where=node.name, next="memc targets lists each target's backend")
                case Yes(how):
                    spec = op_spec(node.target)
                    forms.update({f"memc::{spec.name}": how} if spec else {})
        if refusal := self.refuses_weights(options.weights, target):
            raise MemcError("E601", refusal, where=options.weights, next="add --weights fp32 or --backend onnx")
        stored = store_weights(program, WEIGHT_TYPES[options.weights])
        place = Path("lowered") / self.name
        save_program(stored, folder / place)
        return Lowered(
            path=(place / GRAPH).as_posix(),
            inputs=[_port(spec, spec.role) for spec in stored.inputs],
            outputs=[_port(spec, "logits" if spec.name == "logits" else "other") for spec in stored.outputs],
            states=[_state(spec) for spec in stored.states],
            capacity=_capacity(stored, options.context),
            how_to_run=_HOW_TO_RUN,
            forms=forms,
        )

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Load a lowered program onto the manifest's target.

        Raises ``MemcError`` E602 when the target is a GPU and this machine shows none to torch.
        """
        device = "cuda" if get_target(manifest.target).kind == "gpu" else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            hint = f"memc lower {folder} --target cpu"
            raise MemcError("E602", "torch sees no GPU on this machine", where=manifest.target, next=hint)
        if threads is not None:
            torch.set_num_threads(threads)
        program = load_program((folder / manifest.lowered).parent)
        fold_casts(program)
        return EagerRunner(program, manifest, device)


def _capacity(program: Program, context: int | None) -> int | None:
    """Return the most tokens a sequence may have: the model's own limit only where it embeds positions."""
    limit = program.model.longest
    if context is None or limit is None:
        return limit if context is None else context
    return min(limit, context)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _port(spec: InputSpec | OutputSpec, role: str) -> Port:
    return Port.model_validate(
        {"name": spec.name, "role": role, "dtype": _dtype(spec.dtype), "shape": list(spec.shape)}
    )


def _state(spec: StateSpec) -> State:
    return State(
        input=spec.name,
        output=spec.output,
        dtype=_dtype(spec.dtype),
        shape=list(spec.shape),
        init=spec.init,
        grows=spec.grows,
    )

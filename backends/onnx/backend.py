"""Lowering to ONNX Runtime: check, rewrite, export, place the weights, write, load once."""

from __future__ import annotations

from pathlib import Path

from torch.fx import Node

from memc.backend import Lowered, LowerOptions, No, Yes
from memc.backends.onnx import support
from memc.backends.onnx.bank import PARTS
from memc.backends.onnx.capability import has_kernel, require_runtime
from memc.backends.onnx.export import export
from memc.backends.onnx.graph import prepare
from memc.backends.onnx.text import how_to_run
from memc.backends.onnx.weights import place, tables, write
from memc.prepare import capacity_of, forms_of, is_memc, ports
from memc.program import Program
from memc.target import Target

FILE = Path("lowered") / "onnx" / "model.onnx"


def supports(node: Node, target: Target) -> Yes | No:
    """Tell whether and how a node is lowered; ATen ops are proven by the export itself."""
    if target.kind != "cpu":
        return No(f"the onnx backend runs on CPUs, {target.name} is a {target.kind} target")
    if is_memc(node.target):
        return support.form(node)
    return Yes("torch.onnx")


def lower(program: Program, target: Target, folder: Path, options: LowerOptions, *, portable: bool = False) -> Lowered:
    """Write ``folder/lowered/onnx/model.onnx`` and its data file; see ``Backend.lower``.

    ``portable`` refuses the runtime's special kernels and takes the plain forms everywhere.
    """
    require_runtime()
    forms = forms_of(program, target, "onnx", supports)
    prepared = prepare(program, portable=portable)
    model = export(program, prepared)
    weights = place(model, options.weights, prepared.late)
    write(model, folder / FILE)
    capacity = capacity_of(program, options, grows=bool(prepared.buffers))
    inputs, outputs, states, symbols = ports(program, prepared.states, prepared.in_place, keep=prepared.keep)
    inputs = [
        port.model_copy(update={"parts": {f"{port.name}_{part}": count for part, count in PARTS.items()}})
        if port.name in prepared.parts
        else port
        for port in inputs
    ]
    return Lowered(
        str(FILE),
        inputs,
        outputs,
        states,
        capacity,
        symbols,
        how_to_run(str(FILE), inputs, states),
        {**forms, "weights": weights.summary},
        tables(folder, FILE),
    )


def refuses_weights(weights: str, target: Target) -> str | None:
    """Tell why a weight type is refused on a target, or None."""
    if target.kind != "cpu":
        return f"the onnx backend runs on CPUs, {target.name} is a {target.kind} target"
    if weights in ("fp16", "bf16"):
        return f"ONNX Runtime's CPU kernels compute in float32: {weights} would be cast at every step"
    if weights in ("int8", "int4") and not has_kernel("MatMulNBits", "com.microsoft"):
        return "this ONNX Runtime has no CPU kernel for MatMulNBits"
    if weights not in ("fp32", "int8", "int4"):
        return f"unknown weight type {weights!r}: fp32, int8 or int4"
    return None

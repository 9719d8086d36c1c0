"""Lowering to ONNX Runtime: check, rewrite, export, place the weights, write, load once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch.fx import Node

from memc.artifact import Port, State
from memc.backend import Lowered, LowerOptions, No, Yes
from memc.backends.onnx import support
from memc.backends.onnx.capability import has_kernel, require_runtime
from memc.backends.onnx.export import export
from memc.backends.onnx.graph import Prepared, prepare, source_of
from memc.backends.onnx.text import how_to_run
from memc.backends.onnx.weights import place, write
from memc.errors import MemcError
from memc.program import OutputSpec, Program
from memc.target import Target

FILE = Path("lowered") / "onnx" / "model.onnx"

SYMBOLS = {
    "B": "sequences",
    "T": "new tokens",
    "U": "tokens of the decoder of an encoder-decoder",
    "K": "columns whose logits are wanted",
    "S": "slots: capacity + 1",
}

DEFAULT_CAPACITY = 4096
"""Tokens that a growing state holds when neither the user nor the model names a limit."""


def supports(node: Node, target: Target) -> Yes | No:
    """Tell whether and how a node is lowered; ATen ops are proven by the export itself."""
    if target.kind != "cpu":
        return No(f"the onnx backend runs on CPUs, {target.name} is a {target.kind} target")
    if support.is_memc(node.target):
        return support.form(node)
    return Yes("torch.onnx")


def lower(program: Program, target: Target, folder: Path, options: LowerOptions, *, portable: bool = False) -> Lowered:
    """Write ``folder/lowered/onnx/model.onnx`` and its data file; see ``Backend.lower``.

    ``portable`` refuses the runtime's special kernels and takes the plain forms everywhere.
    """
    require_runtime()
    forms = _check(program, target)
    prepared = prepare(program, portable=portable)
    model = export(program, prepared)
    weights = place(model, options.weights, prepared.late)
    write(model, folder / FILE)
    capacity = _capacity(program, prepared, options)
    inputs, outputs, states = _ports(program, prepared)
    used = {size for shapes in (inputs, outputs, states) for port in shapes for size in port.shape}
    symbols = {symbol: meaning for symbol, meaning in SYMBOLS.items() if symbol in used}
    symbols |= {size: f"pages: ceil(S / {size[2:]})" for size in sorted(map(str, used)) if size.startswith("S/")}
    return Lowered(
        str(FILE),
        inputs,
        outputs,
        states,
        capacity,
        symbols,
        how_to_run(str(FILE), inputs, states),
        {**forms, "weights": weights.summary},
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


def _check(program: Program, target: Target) -> dict[str, str]:
    """Return the form of each dialect op, the commonest first; raises E601 at the first op that has none."""
    forms: dict[str, Counter[str]] = {}
    for node in program.module.graph.nodes:
        if node.op != "call_function":
            continue
        match supports(node, target):
            case No(reason):
                raise MemcError("E601", f"onnx cannot lower {node.target}: {reason}", where=source_of(node))
            case Yes(how) if support.is_memc(node.target):
                forms.setdefault(node.target.name().partition("::")[2], Counter())[how] += 1
    return {op: "; ".join(f"{how} (x{n})" for how, n in found.most_common()) for op, found in forms.items()}


def _capacity(program: Program, prepared: Prepared, options: LowerOptions) -> int | None:
    limit = program.model.longest
    if prepared.buffers:
        return options.context or program.model.max_positions or DEFAULT_CAPACITY
    return min(filter(None, (options.context, limit)), default=None) if limit else None


def _ports(program: Program, prepared: Prepared) -> tuple[list[Port], list[Port], list[State]]:
    inputs = [
        Port(name=spec.name, role=spec.role, dtype=_dtype(spec.dtype), shape=list(spec.shape))
        for spec in program.inputs
    ]
    if prepared.keep:
        inputs.append(Port(name="keep", role="keep", dtype="int64", shape=["K"]))
    outputs = [_output(spec, index, prepared.keep) for index, spec in enumerate(program.outputs)]
    states = [
        State(
            input=spec.name,
            output=spec.output,
            dtype=_dtype(spec.dtype),
            shape=list(spec.shape),
            init=spec.init,
            update="alias" if spec.name in prepared.in_place else "swap",
            grows=spec.grows,
        )
        for spec in prepared.states
    ]
    return inputs, outputs, states


def _output(spec: OutputSpec, index: int, keep: bool) -> Port:
    shape = list(spec.shape)
    if index == 0 and keep:
        shape[1] = "K"
    return Port(name=spec.name, role="logits" if index == 0 else "other", dtype=_dtype(spec.dtype), shape=shape)


def _dtype(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    return "float32" if name in ("float16", "bfloat16") else name

"""From the prepared graph to an ONNX model: torch's exporter for ATen, our functions for the dialect."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx.parser
import onnx_ir as ir
import torch
from torch._C import DispatchKey
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from memc.backends.onnx.alike import Sample, repeat
from memc.backends.onnx.bank import PARTS
from memc.backends.onnx.calls import DOMAIN
from memc.backends.onnx.capability import OPSET
from memc.backends.onnx.graph import Prepared
from memc.errors import MemcError
from memc.infer import Propagation
from memc.prepare import TensorSpec, export_module, first_line, named_node, source_of
from memc.program import InputSpec, Program

_aten = torch.ops.aten
WHOLE = frozenset({_aten.sym_size.int, _aten.reshape.default, _aten.matmul.default, _aten.where.ScalarOther})
"""Composite ops that the exporter writes as well as what they are made of, or better."""


def export(program: Program, prepared: Prepared) -> ir.Model:
    """Export to an ONNX model with named inputs and outputs and symbolic sizes; weights stay where they are.

    Raises ``MemcError`` E601 that names the op which the exporter refuses, and the source line where it is known.
    """
    specs = _input_specs(program, prepared)
    run = Propagation(prepared.module, [InputSpec(name, "other", *spec) for name, spec in specs.items()])
    with _reporting(program):
        for node in prepared.module.graph.nodes:
            run.step(node)
    sample = Sample(prepared.module, run)
    model = _export(program, sample.module, specs)
    if not repeat(model, sample):  # the exporter mixed kinds up
        model = _export(program, prepared.module, specs)
    outputs = [spec.name for spec in program.outputs] + [spec.output for spec in prepared.states]
    _name_ports(model, list(specs), outputs, [shape for _, shape in specs.values()], _output_shapes(program, prepared))
    _attach(model, prepared)
    _strip(model)
    return model


class _Functional(ExportedProgram):
    """A program whose ops torch's exporter writes as they are: tracing it twice more to decompose nothing is left out.

    That took half of a lowering's time. A program with an op that is decomposed, or changes what it reads, is traced.
    """

    def run_decompositions(
        self, decomp_table: dict[OperatorBase, Callable[..., Any]] | None = None, *args: Any, **kwargs: Any
    ) -> ExportedProgram:
        if decomp_table is None or any(is_decomposed(n, decomp_table) for n in self.graph.nodes):
            traced: ExportedProgram = super().run_decompositions(decomp_table, *args, **kwargs)
            return traced
        return self


def is_decomposed(node: Node, table: Mapping[OperatorBase, Callable[..., Any]]) -> bool:
    """Whether torch's exporter writes a node as others: by a table, as a composite, or because it changes its input."""
    target = node.target
    if not isinstance(target, OpOverload) or target in WHOLE:
        return False
    composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
    return target in table or composite or bool(target._schema.is_mutable)


def _export(program: Program, module: GraphModule, specs: Mapping[str, TensorSpec]) -> ir.Model:
    """Run torch's exporters on a module whose placeholders are among ``specs``."""
    with _reporting(program), _quiet(), torch.no_grad():
        exported = export_module(program, module, specs)
        exported.__class__ = _Functional
        onnx_program = torch.onnx.export(exported, (), dynamo=True, opset_version=OPSET, verbose=False)
    assert onnx_program is not None
    return onnx_program.model


def _input_specs(program: Program, prepared: Prepared) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for spec in program.inputs:
        dtype = torch.float32 if spec.dtype.is_floating_point else spec.dtype
        if spec.name in prepared.parts:
            batch, _, *sizes = spec.shape
            specs |= {f"{spec.name}_{part}": (dtype, (count, batch, *sizes)) for part, count in PARTS.items()}
        else:
            specs[spec.name] = (dtype, spec.shape)
    if prepared.keep:
        specs["keep"] = (torch.int64, ("K",))
    for state in prepared.states:
        specs[state.name] = (state.dtype, state.shape)
    return specs


def _output_shapes(program: Program, prepared: Prepared) -> list[tuple[int | str, ...]]:
    shapes = [spec.shape for spec in program.outputs]
    if prepared.keep:
        shapes[0] = ("B", "K", *shapes[0][2:])
    return shapes + [spec.shape for spec in prepared.states]


def _name_ports(
    model: ir.Model,
    inputs: list[str],
    outputs: list[str],
    input_shapes: list[tuple[int | str, ...]],
    output_shapes: list[tuple[int | str, ...]],
) -> None:
    """Give inputs, outputs and their sizes the manifest's names.

    Inner shapes are dropped: the runtime infers them, and those of our functions are bounds, not sizes.
    """
    graph = model.graph
    for value, name, shape in zip(graph.inputs, inputs, input_shapes, strict=True):
        value.name, value.shape = name, ir.Shape(list(shape))
    kept = set()
    for index, (name, shape) in enumerate(zip(outputs, output_shapes, strict=True)):
        value = graph.outputs[index]
        if value in kept or value.is_graph_input():
            dtype = value.dtype
            node = ir.node("Identity", [value])
            graph.append(node)
            value = graph.outputs[index] = node.outputs[0]
            value.dtype = dtype
        value.name, value.shape = name, ir.Shape(list(shape))
        kept.add(value)
    for node in graph:
        for value in node.outputs:
            if value not in kept:
                value.shape = None
                value.type = None


def _attach(model: ir.Model, prepared: Prepared) -> None:
    """Add the functions that the graph calls."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for name, function in sorted(prepared.functions.items()):
        if name in called:
            made = ir.serde.deserialize_function(onnx.parser.parse_function(function.text))
            model.functions[made.identifier()] = made
    model.opset_imports[DOMAIN] = 1
    model.opset_imports["com.microsoft"] = 1


def _strip(model: ir.Model) -> None:
    """Drop what the exporter notes about this process (stack traces, paths, versions): same program, same bytes."""
    model.producer_name, model.producer_version = "memc", None
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.name = "memc"
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for index, node in enumerate(model.graph):
        node.name = f"n{index}_{node.op_type}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress notes off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _reporting(program: Program) -> Iterator[None]:
    """Turn what torch's exporters raise into E601 with the op and, where raising recorded it, the source line."""
    try:
        yield
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        text = f"{error} {error.__cause__ or ''}"
        node = named_node(program, text)
        what = str(node.target) if node is not None else "this program"
        reason = first_line(error.__cause__ or error)
        where = source_of(node) if node is not None else ""
        message = f"onnx cannot lower {what}: {reason}"
        raise MemcError("E601", message, where, "memc passes, or another backend") from error

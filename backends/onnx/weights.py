"""Weights of the lowered file: linear layers as MatMul or block-quantised MatMulNBits, written one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from memc.artifact import Table
from memc.backends.onnx.calls import DOMAIN, LINEAR
from memc.backends.onnx.capability import has_kernel
from memc.quantise import BITS, BLOCK, NARROW, quantise

TABLE = 1 << 20
"""Bytes of a weight below which its rows are not worth reading one by one."""


@dataclass
class Weights:
    """What became of the matrices: how many were quantised or are too narrow for it, and which others stay float32."""

    kind: str
    quantised: int = 0
    narrow: set[str] = field(default_factory=set)
    float32: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for the report."""
        if self.kind == "fp32":
            return "float32"
        rest = ", ".join(self.float32) or "none"
        narrow = f", {len(self.narrow)} narrow ones (gates)" if self.narrow else ""
        last = ", the last in int8" if self.kind == "int4" else ""
        return f"{self.quantised} matrices in {self.kind} (blocks of {BLOCK}{last}); float32 matrices: {rest}{narrow}"


def late_value(name: str, tensor: torch.Tensor) -> ir.LazyTensor:
    """Make a float32 tensor whose values are converted when they are written."""
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.float().numpy(), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(list(tensor.shape)),
        name=name,
    )


def place(model: ir.Model, kind: str, late: Mapping[str, torch.Tensor]) -> Weights:
    """Give late tensors their values and turn every linear marker into its form; unused initializers are dropped."""
    graph = model.graph
    for name, tensor in late.items():
        if name in graph.initializers:
            graph.initializers[name].const_value = late_value(name, tensor)
    report = Weights(kind)
    _pack(graph)
    markers = _markers(graph)
    for node in markers:
        # The last matrix makes the logits: an error there falls on every one of them, so it keeps 8 bits.
        _linear(graph, node, report, 8 if node is markers[-1] else BITS.get(kind, 8))
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    _report_rest(graph, report)
    return report


def _markers(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.domain == DOMAIN and node.op_type == LINEAR]


def _sizes(node: ir.Node) -> tuple[int, int]:
    """Return the number of outputs and of inputs."""
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    rows, columns = (int(n) for n in weight.shape)
    return (columns, rows) if node.attributes["turned"].as_int() else (rows, columns)


def _narrow(node: ir.Node) -> bool:
    out, into = _sizes(node)
    return out * NARROW < into


def _pack(graph: ir.Graph) -> None:
    """Make one product of all that read the same input (query, key, value; gate and up), and split its result.

    The numbers stay the same; a product of one token costs less than its parts, and threads meet less often.
    """
    groups: dict[tuple[ir.Value | None, bool], list[ir.Node]] = {}
    for node in _markers(graph):
        weight = node.inputs[1]
        if len(node.inputs) == 2 and weight is not None and len(weight.uses()) == 1:
            groups.setdefault((node.inputs[0], _narrow(node)), []).append(node)
    for (x, _), nodes in groups.items():
        if len(nodes) > 1:
            _pack_group(graph, x, nodes)


def _pack_group(graph: ir.Graph, x: ir.Value | None, nodes: list[ir.Node]) -> None:
    parts = [(node.inputs[1].const_value, bool(node.attributes["turned"].as_int())) for node in nodes]
    widths = [_sizes(node)[0] for node in nodes]
    name = "+".join(node.inputs[1].name or "" for node in nodes)
    _add(graph, name, _stacked(name, parts, sum(widths)))
    _add(graph, f"{name}.parts", ir.Tensor(np.array(widths, np.int64), name=f"{name}.parts"))
    turned = [ir.AttrInt64("turned", 0)]
    product = ir.Node(DOMAIN, LINEAR, [x, graph.initializers[name]], turned)
    product.outputs[0].name = f"{name}.product"
    last = [ir.AttrInt64("axis", -1)]
    split = ir.Node(
        "", "Split", [product.outputs[0], graph.initializers[f"{name}.parts"]], last, num_outputs=len(nodes)
    )
    graph.insert_before(nodes[0], [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.name, part.type, part.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _stacked(name: str, parts: list[tuple[ir.TensorProtocol | None, bool]], rows: int) -> ir.LazyTensor:
    tensors = [(tensor, turned) for tensor, turned in parts if tensor is not None]
    first, turned = tensors[0]
    return ir.LazyTensor(
        lambda: ir.Tensor(np.concatenate([t.numpy().T if flip else t.numpy() for t, flip in tensors]), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([rows, int(first.shape[0 if turned else 1])]),
        name=name,
    )


def _linear(graph: ir.Graph, node: ir.Node, report: Weights, bits: int) -> None:
    x, weight, *bias = node.inputs
    assert x is not None and weight is not None and weight.const_value is not None and weight.name is not None
    turned = bool(node.attributes["turned"].as_int())
    product = (
        ir.Value(name=f"{node.outputs[0].name}.product") if bias else ir.Value(name=f"{node.outputs[0].name}.value")
    )
    if report.kind == "fp32" or _narrow(node):
        made = _float_product(graph, x, weight, turned, product)
        report.narrow.add(str(made[-1].inputs[1].name))
    else:
        made = [_quantised_product(graph, x, weight, turned, product, bits)]
        report.quantised += 1
    last = made[-1].outputs[0]
    if bias:
        made.append(ir.node("Add", [product, bias[0]]))
        last = made[-1].outputs[0]
    old = node.outputs[0]
    last.name, last.type, last.shape = old.name, old.type, old.shape
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(old, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _float_product(graph: ir.Graph, x: ir.Value, weight: ir.Value, turned: bool, product: ir.Value) -> list[ir.Node]:
    """``x`` times the weight ``[in, out]``; one that a table look-up reads too is multiplied as it lies, not copied."""
    if turned:
        return [ir.Node("", "MatMul", [x, weight], outputs=[product])]
    shared = any(use.node.op_type != LINEAR for use in weight.uses())
    if not shared:
        name = f"{weight.name}.T"
        if name not in graph.initializers:
            _add(graph, name, _transposed(name, weight.const_value))
        return [ir.Node("", "MatMul", [x, graph.initializers[name]], outputs=[product])]
    if has_kernel("FusedMatMul", "com.microsoft"):
        turn = [ir.AttrInt64("transB", 1)]
        return [ir.Node("com.microsoft", "FusedMatMul", [x, weight], turn, outputs=[product])]
    transpose = ir.node("Transpose", [weight], {"perm": [1, 0]})
    transpose.outputs[0].name = f"{product.name}.weight"
    return [transpose, ir.Node("", "MatMul", [x, transpose.outputs[0]], outputs=[product])]


def _quantised_product(
    graph: ir.Graph, x: ir.Value, weight: ir.Value, turned: bool, product: ir.Value, bits: int
) -> ir.Node:
    assert weight.const_value is not None
    out, into = (int(n) for n in weight.const_value.shape)
    if turned:
        out, into = into, out
    name = f"{weight.name}{'.T' if turned else ''}.q{bits}"  # one that is read both ways is stored both ways
    if name not in graph.initializers:
        _add_quantised(graph, name, weight.const_value, turned, (out, into), bits)
    parts = [name, f"{name}.scale", *([f"{name}.zero"] if bits == 4 else [])]
    sizes = {"K": into, "N": out, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    return ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [x, *(graph.initializers[part] for part in parts)],
        [ir.AttrInt64(key, value) for key, value in sizes.items()],
        outputs=[product],
    )


def _add_quantised(
    graph: ir.Graph, name: str, tensor: ir.TensorProtocol, turned: bool, sizes: tuple[int, int], bits: int
) -> None:
    """Add codes, scales and zero points that are computed when the first of them is written, and dropped after all."""
    out, into = sizes
    blocks = -(-into // BLOCK)
    parts: dict[str, tuple[ir.DataType, list[int]]] = {
        "codes": (ir.DataType.UINT8, [out, blocks, BLOCK * bits // 8]),
        "scales": (ir.DataType.FLOAT, [out, blocks]),
    }
    if bits == 4:
        parts["zeros"] = (ir.DataType.UINT8, [out, -(-blocks // 2)])
    waiting: dict[str, np.ndarray] = {}

    def take(part: str) -> np.ndarray:
        if part not in waiting:
            values = tensor.numpy()
            made = quantise(values.T if turned else values, bits)
            waiting.update({each: getattr(made, each) for each in parts})
        return waiting.pop(part)

    for part, (dtype, shape) in parts.items():
        full = name + {"codes": "", "scales": ".scale", "zeros": ".zero"}[part]
        made = ir.LazyTensor(
            lambda part=part, full=full: ir.Tensor(take(part), name=full),
            dtype=dtype,
            shape=ir.Shape(shape),
            name=full,
        )
        _add(graph, full, made)


def _transposed(name: str, tensor: ir.TensorProtocol | None) -> ir.LazyTensor:
    assert tensor is not None
    rows, columns = (int(n) for n in tensor.shape)
    return ir.LazyTensor(
        lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy().T), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([columns, rows]),
        name=name,
    )


def _add(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> None:
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)


def _report_rest(graph: ir.Graph, report: Weights) -> None:
    if report.kind != "fp32":
        report.float32 = [
            name
            for name, value in graph.initializers.items()
            if value.dtype == ir.DataType.FLOAT and value.shape is not None and len(value.shape) == 2
            if not name.endswith(".scale") and name not in report.narrow
        ]


def write(model: ir.Model, path: Path) -> None:
    """Write the model and, beside it, one file of weights, in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def tables(folder: Path, file: Path) -> list[Table]:
    """Return the weights of a written ``file`` below ``folder`` that nothing but ``Gather`` reads, row by row."""
    found = []
    for value in ir.load(folder / file).graph.initializers.values():
        held, uses = value.const_value, value.uses()
        rows = all(use.node.op_type == "Gather" and not use.idx and not use.node.domain for use in uses)
        if isinstance(held, ir.ExternalTensor) and held.nbytes >= TABLE and uses and rows:
            where, kind = (file.parent / held.location).as_posix(), np.dtype(held.dtype.numpy()).name
            shape = [int(n) for n in held.shape]
            found.append(Table(name=held.name or "", file=where, offset=held.offset or 0, dtype=kind, shape=shape))
    return found

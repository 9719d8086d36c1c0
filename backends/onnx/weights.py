"""Weights of the lowered file: linear layers as MatMul or block-quantised MatMulNBits, written one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from memc.backends.onnx.calls import DOMAIN, LINEAR
from memc.backends.onnx.capability import has_kernel

BLOCK = 32
"""Consecutive input channels that share one scale."""

BITS = {"int8": 8, "int4": 4}

Floats = npt.NDArray[np.float32]


@dataclass
class Weights:
    """What became of the matrices: how many were quantised, and which tensors stay float32 though they are large."""

    kind: str
    quantised: int = 0
    float32: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One line for the report."""
        if self.kind == "fp32":
            return "float32"
        rest = ", ".join(self.float32) or "none"
        return f"{self.quantised} matrices in {self.kind} (blocks of {BLOCK}, symmetric); float32 matrices: {rest}"


def quantise(weight: Floats, bits: int) -> tuple[npt.NDArray[np.uint8], Floats]:
    """Quantise ``weight [out, in]`` symmetrically in blocks of 32 input channels.

    Returns codes ``[out, blocks, 32 * bits / 8]`` and scales ``[out, blocks]`` as MatMulNBits takes them:
    value = scale (code - 2^(bits - 1)). The value of largest size in a block gets the code 0 exactly.
    """
    out, into = weight.shape
    blocks = -(-into // BLOCK)
    padded = np.zeros((out, blocks * BLOCK), np.float32)
    padded[:, :into] = weight
    grouped = padded.reshape(out, blocks, BLOCK)
    half = 1 << (bits - 1)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1, keepdims=True), -1)
    scale = extreme / np.float32(-half)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.rint(grouped * inverse) + half, 0, 2 * half - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return codes, np.ascontiguousarray(scale[..., 0])


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
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == LINEAR:
            _linear(graph, node, report)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    _report_rest(graph, report)
    return report


def _linear(graph: ir.Graph, node: ir.Node, report: Weights) -> None:
    x, weight, *bias = node.inputs
    assert x is not None and weight is not None and weight.const_value is not None and weight.name is not None
    turned = bool(node.attributes["turned"].as_int())
    product = (
        ir.Value(name=f"{node.outputs[0].name}.product") if bias else ir.Value(name=f"{node.outputs[0].name}.value")
    )
    if report.kind == "fp32":
        made = _float_product(graph, x, weight, turned, product)
    else:
        made = [_quantised_product(graph, x, weight, turned, product, BITS[report.kind])]
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
    codes_name, scales_name = f"{weight.name}.q{bits}", f"{weight.name}.q{bits}.scale"
    if codes_name not in graph.initializers:
        values = weight.const_value.numpy()
        codes, scales = quantise(np.ascontiguousarray(values.T) if turned else values, bits)
        _add(graph, codes_name, ir.Tensor(codes, name=codes_name))
        _add(graph, scales_name, ir.Tensor(scales, name=scales_name))
    sizes = {"K": into, "N": out, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
    return ir.Node(
        "com.microsoft",
        "MatMulNBits",
        [x, graph.initializers[codes_name], graph.initializers[scales_name]],
        [ir.AttrInt64(key, value) for key, value in sizes.items()],
        outputs=[product],
    )


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
            if not name.endswith(".scale")
        ]


def write(model: ir.Model, path: Path) -> None:
    """Write the model and, beside it, one file of weights, in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)

"""The lowered form of ``memc::bank_ffn``, as an ONNX function; sizes as in ``functions``, R hidden units of width C."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

import memc.dialect  # noqa: F401 - defines the op
from memc.backends.onnx.functions import Function, float_, function, ints

_ACTIVATIONS = {
    "silu": "s = Sigmoid(gate)\na = Mul(gate, s)",
    "gelu": "a = Gelu(gate)",
    "gelu_tanh": 'a = Gelu<approximate = "tanh">(gate)',
    "quick_gelu": f"{float_('scale', 1.702)}\nscaled = Mul(gate, scale)\ns = Sigmoid(scaled)\na = Mul(gate, s)",
    "relu": "a = Relu(gate)",
    "relu2": "positive = Relu(gate)\na = Mul(positive, positive)",
    "sigmoid": "a = Sigmoid(gate)",
    "tanh": "a = Tanh(gate)",
    "softplus": "a = Softplus(gate)",
    "elu": "a = Elu(gate)",
    "mish": "s = Softplus(gate)\nt = Tanh(s)\na = Mul(gate, t)",
}


PARTS = {"gate_up": 2, "down": 1}
"""How many matrices of a block each input of the function has: to cut a block within the file copies it every time."""


def bank_ffn(activation: str, kernel: bool) -> Function:
    """Map ``x [B,T,C]`` by ``gate_up [2,B,R,C]`` and ``down [1,B,R,C]``, multiplied as they lie where a kernel can."""
    product = "com.microsoft.FusedMatMul<transB = 1>(rows, gate_up)" if kernel else "MatMul(rows, turned)"
    body = f"""
    {ints("parts", 0)}
    rows = Unsqueeze(x, parts)
    {"" if kernel else "turned = Transpose<perm = [0, 1, 3, 2]>(gate_up)"}
    products = {product}
    gate, up = Split<axis = 0, num_outputs = 2>(products)
    {_ACTIVATIONS[activation]}
    h = Mul(a, up)
    made = MatMul(h, down)
    y = Squeeze(made, parts)
    """
    return function("BankFfn", "x, gate_up, down", "y", body)


def matrices(graph: Graph, block: Node) -> dict[str, Node]:
    """Return ``PARTS`` of ``block [B,3,R,C]`` by name, the number of matrices first.

    What only ``memc::bank_ffn`` reads of the program's inputs is taken in these parts instead.
    """
    if block.op == "placeholder" and all(user.target is torch.ops.memc.bank_ffn.default for user in block.users):
        with graph.inserting_before(block):
            return {part: graph.placeholder(f"{block.target}_{part}") for part in PARTS}
    turned = graph.call_function(torch.ops.aten.transpose.int, (block, 0, 1))
    found, start = {}, 0
    for part, size in PARTS.items():
        found[part] = graph.call_function(torch.ops.aten.slice.Tensor, (turned, 0, start, start + size))
        start += size
    return found

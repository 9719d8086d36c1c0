"""What converters are made of: sizes of what is imported, and calls of TIR functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from typing import Any

import numpy as np
from torch.fx import Node
from tvm import relax, tirx

from memc.backends.tvm.kernels.common import PrimFunc, Scores

Var = Any
Importer = Any
Converter = Callable[[Node, Importer], Var]


class Maker:
    """Makes the functions of one program; calls that agree on sizes and options share one."""

    def __init__(self) -> None:
        """Start with no functions."""
        self._made: dict[Hashable, Any] = {}

    def function(self, importer: Importer, make: Callable[..., PrimFunc], *args: Any, **options: Any) -> Any:
        """Return what a call of the function names, which is made where there is none yet."""
        key = (make.__name__, args, tuple(sorted(options.items())))
        if key not in self._made:
            self._made[key] = importer.block_builder.add_func(make(*args, **options), make.__name__)
        return self._made[key]


def arguments(node: Node) -> list[Any]:
    """Return the arguments of a node."""
    return list(node.args)


def scores_of(q: Var, v: Var, scale: float, softcap: float, slopes: Node | None, sinks: Node | None) -> Scores:
    """Read the sizes and the scores of an attention-like op from its tensors ``[B,H,T,D]`` and ``[B,G,S,E]``."""
    sizes = size(q, 1), size(v, 1), size(q, 3), size(v, 3)
    return Scores(*sizes, float(scale), float(softcap), slopes is not None, sinks is not None)


def call(importer: Importer, function: Any, inputs: Sequence[Var], sizes: Sequence[Any], dtype: str = "float32") -> Var:
    """Call a function with one result of these sizes."""
    out = relax.TensorType(list(sizes), dtype)
    return importer.block_builder.emit(relax.call_tir(function, list(inputs), out_ty=out))


def calls(
    importer: Importer,
    function: Any,
    inputs: Sequence[Var],
    shapes: Sequence[Sequence[Any]],
    dtypes: Sequence[str] | None = None,
) -> Var:
    """Call a function with several results, float32 where ``dtypes`` does not say otherwise."""
    kinds = dtypes or ["float32"] * len(shapes)
    out = [relax.TensorType(list(sizes), kind) for sizes, kind in zip(shapes, kinds, strict=True)]
    return importer.block_builder.emit(relax.call_tir(function, list(inputs), out_ty=out))


def or_nothing(importer: Importer, node: Any) -> Var:
    """Return the tensor of a node, or what is passed where there is none."""
    return nothing(importer, "float32", 1) if node is None else importer.env[node]


def nothing(importer: Importer, dtype: str, rank: int) -> Var:
    """Return what is passed for a tensor that a function does not read."""
    return importer.block_builder.emit(relax.const(np.zeros((1,) * rank, dtype), dtype))


def flat(importer: Importer, x: Var) -> Var:
    """View all axes of ``x`` but the last as one."""
    *rows, width = shape(x)
    return reshape(importer, x, [product(rows), width])


def reshape(importer: Importer, x: Var, sizes: Sequence[Any]) -> Var:
    """View a tensor with other sizes."""
    return importer.block_builder.emit(relax.op.reshape(x, list(sizes)))


def product(sizes: Sequence[Any]) -> Any:
    """Return the product of sizes."""
    return reduce(operator.mul, sizes, tirx.IntImm("int64", 1))


def shape(x: Var) -> list[Any]:
    """Return the sizes of a tensor; raises ``ValueError`` where the import lost them."""
    if x.ty.shape is None:
        raise ValueError("the sizes of what it reads are lost in the import")
    return list(x.ty.shape)


def size(x: Var, axis: int) -> Any:
    """Return a size as a number where it is fixed."""
    found = shape(x)[axis]
    return int(found) if isinstance(found, tirx.IntImm) else found


def is_one(extent: Any) -> bool:
    """Tell whether a size is known to be 1."""
    return isinstance(extent, tirx.IntImm) and int(extent) == 1

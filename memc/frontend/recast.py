"""Change the floating dtype that a captured program computes in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memc.program import Program
from memc.weights import program_dtype


def recast(program: Program, dtype: torch.dtype) -> Program:
    """Return a program that computes in ``dtype`` wherever the given one computes in its parameters' dtype.

    What the model raises to float32 by itself (norms, rotary angles) stays float32. Parameters must still be fake.
    """
    old = program_dtype(program)
    result = program.copy()
    module = result.module
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is None or value.dtype != old:
                continue
            if id(value) not in made:
                made[id(value)] = nn.Parameter(value.detach().to(dtype))
            owner._parameters[name] = made[id(value)]

    def change(item: Any) -> Any:
        return dtype if item is old else item

    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, change)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, change)
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and value.dtype == old:
            node.meta["val"] = value.to(dtype)
    module.recompile()
    outputs = tuple(replace(o, dtype=dtype) if o.dtype == old else o for o in result.outputs)
    return replace(result, outputs=outputs)

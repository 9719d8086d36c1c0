"""``memc::linear_memory`` in Triton; the folder's page has the maths and how it is cut."""

from __future__ import annotations

from memc.kernels.linear_memory.triton.backward import grad_gates, grad_keys, grad_values, states_back
from memc.kernels.linear_memory.triton.delta import invert, overlaps
from memc.kernels.linear_memory.triton.forward import gates, outputs, states, step

__all__ = [
    "gates",
    "grad_gates",
    "grad_keys",
    "grad_values",
    "invert",
    "outputs",
    "overlaps",
    "states",
    "states_back",
    "step",
]

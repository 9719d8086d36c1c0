"""The ops of ``memc.dialect.in_place``: by the functional form and a copy where an op has nothing better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memc.dialect import OpSpec
from memc.dialect.in_place import IN_PLACE, outputs
from memc.kernels.attention.slots import forward as attention
from memc.kernels.common import DEVICES
from memc.kernels.launch import dispatch
from memc.kernels.sparse_attention.slots import forward as sparse_attention

REFERENCES: dict[str, Callable[..., Any]] = {"attention": attention, "sparse_attention": sparse_attention}
"""Ops whose state is laid out in another way in place than in the functional form."""


def _copied(spec: OpSpec) -> Callable[..., Any]:
    """Run the functional form and copy the next states over those that it was given."""

    def run(*args: Any, **options: Any) -> Any:
        results = spec.overload(*args, **options)
        given = spec.bind(args, options)
        for name, index in spec.states.items():
            given[name].copy_(results[index])
        return outputs(spec, results)

    return run


for _spec in IN_PLACE.values():
    _run = dispatch(_spec.name, REFERENCES.get(_spec.name) or _copied(_spec), "in_place")
    torch.library.register_kernel(f"memc::{_spec.name}_", DEVICES, _run)

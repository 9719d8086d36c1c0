"""Ops that write their state where it lies: what lowering puts in place of ``memc::NAME`` is ``memc::NAME_``.

They take the same arguments, states as buffers that they change, and return the outputs but for the states. Programs
hold the functional forms alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memc.dialect.attention import attention
from memc.dialect.base import LIBRARY, OpSpec
from memc.dialect.compact_attention import compact_attention
from memc.dialect.events import events
from memc.dialect.linear_memory import linear_memory
from memc.dialect.quantised_attention import quantised_attention
from memc.dialect.refreshed_attention import refreshed_attention
from memc.dialect.sparse_attention import sparse_attention
from memc.dialect.window_memory import window_memory

IN_PLACE: dict[torch._ops.OpOverload, OpSpec] = {}
"""The functional op of each form that writes in place."""


def _fake(spec: OpSpec) -> Callable[..., Any]:
    def fake(*args: Any, **options: Any) -> Any:
        return outputs(spec, spec.overload(*args, **options))

    return fake


def outputs(spec: OpSpec, results: tuple[Any, ...]) -> Any:
    """Return what the functional form returns without its states: one tensor, or several."""
    kept = tuple(result for index, result in enumerate(results) if index not in spec.states.values())
    return kept[0] if len(kept) == 1 else kept


def in_place(spec: OpSpec) -> torch._ops.OpOverload | None:
    """Return the form of an op that writes its state in place, None where there is none."""
    return next((overload for overload, functional in IN_PLACE.items() if functional is spec), None)


for _spec in (
    attention,
    window_memory,
    linear_memory,
    sparse_attention,
    refreshed_attention,
    quantised_attention,
    compact_attention,
    events,
):
    _schema = _spec.schema(returns=len(_spec.returns) - len(_spec.states), written=tuple(_spec.states))
    LIBRARY.define(f"{_spec.name}_{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memc::{_spec.name}_", _fake(_spec))
    IN_PLACE[getattr(torch.ops.memc, f"{_spec.name}_").default] = _spec

"""The dialect: one file an op, each with schema, fake kernel, states, split rule and cost; kernels implement it.

Importing this package defines the ops; importing ``memc.kernels`` makes them run.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from memc.dialect.attention import attention
from memc.dialect.bank_ffn import bank_ffn
from memc.dialect.base import Cost, OpSpec
from memc.dialect.compact_attention import compact_attention
from memc.dialect.events import events
from memc.dialect.full_attention import full_attention
from memc.dialect.linear_memory import linear_memory
from memc.dialect.norm import norm
from memc.dialect.quantised_attention import quantised_attention
from memc.dialect.refreshed_attention import refreshed_attention
from memc.dialect.rotary import rotary
from memc.dialect.sparse_attention import sparse_attention
from memc.dialect.window_memory import window_memory

OPS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        attention,
        full_attention,
        rotary,
        norm,
        window_memory,
        linear_memory,
        sparse_attention,
        refreshed_attention,
        quantised_attention,
        compact_attention,
        events,
        bank_ffn,
    )
}

_BY_OVERLOAD = {spec.overload: spec for spec in OPS.values()}


def op_spec(target: Any) -> OpSpec | None:
    """Return the dialect row of a node's target, or None for any other target."""
    try:
        return _BY_OVERLOAD.get(target)
    except TypeError:
        return None


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a dialect node by name, defaults filled in.

    Raises ``ValueError`` for a node that is no dialect op.
    """
    spec = op_spec(node.target)
    if spec is None:
        raise ValueError(f"{node} is not a memc:: op")
    return spec.bind(node.args, node.kwargs)


__all__ = ["OPS", "Cost", "OpSpec", "arguments", "op_spec"]

"""Which form each node takes, and what the backend refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from memc.backend import No, Yes
from memc.backends.tvm.kernels.common import Scores
from memc.dialect import arguments, op_spec
from memc.dialect.selectors import SELECTORS
from memc.prepare import shape


def scores(a: Mapping[str, Any]) -> Scores:
    """Read the sizes and the scores of an attention-like node from its arguments."""
    query, value = shape(a["query"]), shape(a["value"])
    return Scores(
        heads=query[1],
        groups=value[1],
        key_dim=query[3],
        value_dim=value[3],
        scale=float(a["scale"]),
        softcap=float(a["softcap"]),
        slopes=a.get("slopes") is not None,
        sink_logits=a["sink_logits"] is not None,
    )


def form(node: Node) -> Yes | No:
    """Tell how a dialect node is lowered; ``No`` for an op that has no function here."""
    spec = op_spec(node.target)
    if spec is None:
        return No(f"{node.target} is not a dialect op that this backend knows")
    match spec.name:
        case "rotary":
            return Yes("own function, angles computed once")
        case "norm":
            return Yes("own function")
        case "attention":
            return Yes("own function over slots in place (slot = position), online softmax")
        case "full_attention":
            return Yes("own function, online softmax")
        case "window_memory":
            return Yes("own function over a ring of slots in place, prompts by chunks")
        case "linear_memory":
            a = arguments(node)
            return Yes(f"own function, {a['update']}, prompts by chunks, state in place")
        case "sparse_attention":
            a = arguments(node)
            if SELECTORS[a["method"]].grouped:
                return No(f"its function has one softmax over tokens, and none by pages as method {a['method']}")
            if SELECTORS[a["method"]].choice == "tree" or a["mass"] < 1:
                what = f"a mass of {a['mass']:g}" if a["mass"] < 1 else f"method {a['method']}"
                return No(f"its function takes what fills the budget of all that it has scored, and has no {what}")
            return Yes(f"own function, {SELECTORS[a['method']].choice} ranked by {a['method']}, state in place")
        case "bank_ffn":
            return Yes("own function, blocks read where they lie")
    return No(f"memc::{spec.name} has no lowered form in this backend")


GPU_FORMS = {
    "rotary": "plain loops, angles computed once",
    "norm": "plain loops",
    "attention": "scores of all slots (slot = position), state in place",
    "full_attention": "scores of all keys",
    "window_memory": "scores of a ring of slots and of the new tokens, state in place",
    "linear_memory": "token by token, a thread to a column of the state, in place",
    "bank_ffn": "plain loops over blocks where they lie",
}
"""The ops that have a form for GPUs, and which."""


def gpu_form(node: Node) -> Yes | No:
    """Tell how a dialect node is lowered for a GPU; ``No`` for an op that has no form there."""
    spec = op_spec(node.target)
    if spec is None:
        return No(f"{node.target} is not a dialect op that this backend knows")
    if spec.name not in GPU_FORMS:
        return No(f"memc::{spec.name} has no form for GPUs in this backend; --backend triton has")
    return Yes(f"{GPU_FORMS[spec.name]}, mapped to threads by TVM")

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
        case "sparse_attention" | "refreshed_attention":
            a = arguments(node)
            choice = SELECTORS[a["method"]].choice
            what = {"tree": "pages searched for", "levels": "pages ranked in two levels"}.get(
                choice, f"{choice} ranked"
            )
            if SELECTORS[a["method"]].eventful:
                if a["events"] is None or a["events"].op != "placeholder":
                    return No("the numbers of its events are no state, whose slots are by position")
                what = "tokens of whole events ranked"
            shared = f", a choice for {a['refresh']} tokens" if "refresh" in a else ""
            return Yes(f"own function, {what} by {a['method']}{shared}, state in place")
        case "quantised_attention":
            return Yes(f"own function, keys and values in {arguments(node)['bits']} bits, state in place")
        case "compact_attention":
            a = arguments(node)
            if a["inv_freq"].op != "get_attr":
                return No("its function turns keys by a table of angles, and the frequencies are computed here")
            return Yes(f"own function, pages ranked by {a['method']}, keys turned as they are read, state in place")
        case "events":
            return Yes(f"own function, ends of events by {arguments(node)['refine']}")
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

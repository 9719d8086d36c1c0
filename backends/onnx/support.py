"""Which form each dialect op takes on the installed runtime, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch.fx import Node

from memc.backend import No, Yes
from memc.backends.onnx.attend import Scores
from memc.backends.onnx.capability import has_kernel
from memc.backends.onnx.functions import Memory
from memc.dialect import arguments, op_spec
from memc.kernels.events.rule import Segmentation
from memc.kernels.sparse_attention.choose import Rule
from memc.prepare import shape, used_outputs

MICROSOFT = "com.microsoft"

_WITH_LSE = (
    "window_memory",
    "sparse_attention",
    "refreshed_attention",
    "quantised_attention",
    "compact_attention",
)


def scores(node: Node, a: Mapping[str, Any]) -> Scores:
    """Read what an attention-like node needs of its scores."""
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
        bias=a.get("bias") is not None,
        mask="key_positions" not in a or a["key_positions"] is not None,
        lse=op_spec(node.target).name in _WITH_LSE and 1 in used_outputs(node),  # type: ignore[union-attr]
    )


def rule(a: Mapping[str, Any]) -> Rule:
    """Read how a node that chooses what it reads does so; what it does not say is as the rule has it."""
    return Rule(**{field.name: a[field.name] for field in fields(Rule) if field.name in a})


def memory(a: Mapping[str, Any]) -> Memory:
    """Read the sizes and the rule of a ``linear_memory`` node."""
    query, state, decay = shape(a["query"]), shape(a["state"]), shape(a["log_decay"])
    return Memory(query[1], state[1], state[2], state[3], decay[3] == state[2] and decay[3] > 1, str(a["update"]))


def segmentation(a: Mapping[str, Any]) -> Segmentation:
    """Read the sizes and the rule of an ``events`` node."""
    (_, groups, count, size), history = shape(a["past_keys"]), shape(a["past_surprises"])[1]
    sizes = shape(a["logits"])[2], groups, size, history
    return Segmentation(*sizes, count - 1, float(a["gamma"]), str(a["refine"]))


def plain_reason(s: Scores) -> str | None:
    """Tell why the Attention op of opset 24 does not serve, or None when it does."""
    if not has_kernel("Attention"):
        return "this runtime has no kernel for Attention"
    needs = (
        ("soft-capping", s.softcap),
        ("slopes", s.slopes),
        ("sink logits", s.sink_logits),
    )
    wanted = [name for name, needed in needs if needed] + (["an additive bias"] if s.bias else [])
    return f"Attention gives no {' and '.join(wanted)}" if wanted else None


def form(node: Node) -> Yes | No:
    """Tell how a dialect node is lowered on the installed runtime; ``No`` for an op that is not in the table."""
    spec = op_spec(node.target)
    if spec is None:
        return No(f"{node.target} is not a dialect op that this backend knows")
    a = arguments(node)
    match spec.name:
        case "rotary":
            if has_kernel("RotaryEmbedding"):
                return Yes("RotaryEmbedding-23, angles computed once")
            return Yes("Mul, Add: this runtime has no kernel for RotaryEmbedding")
        case "norm":
            op = "LayerNormalization" if a["center"] else "RMSNormalization"
            if a["weight"] is None:
                return Yes(f"ReduceMean, Sqrt, Div: {op} needs a weight")
            return Yes(op if has_kernel(op) else f"ReduceMean, Sqrt, Div: this runtime has no kernel for {op}")
        case "full_attention" | "window_memory":
            reason = plain_reason(scores(node, a))
            return Yes("Attention-24 with a mask from positions" if reason is None else f"MatMul, Softmax: {reason}")
        case "attention":
            reason = plain_reason(scores(node, a))
            product = "Attention-24" if reason is None else f"MatMul, Softmax ({reason})"
            return Yes(
                f"ScatterND in place (slot = position), {product}, of a single token MatMul and Softmax of what lies"
                " there: GroupQueryAttention takes no batch of several new tokens on a held context"
            )
        case "sparse_attention" | "refreshed_attention":
            reason = plain_reason(scores(node, a))
            product = "Attention-24" if reason is None else f"MatMul, Softmax ({reason})"
            below = f", {product} below {a['dense_below']} tokens" if a["dense_below"] else ""
            if rule(a).by_tree:
                every = f" every {a['refresh']} tokens, prompts turn by turn" if "refresh" in a else ""
                return Yes(
                    f"ScatterND in place (slot = position), GatherND and Scan, a Loop that halves ranges{every}{below}"
                )
            if spec.name == "refreshed_attention":
                every = f", TopK every {a['refresh']} tokens, prompts turn by turn"
                return Yes(f"ScatterND in place (slot = position), GatherND and Scan{every}{below}")
            many = ", a softmax of pages over one of tokens" if rule(a).grouped else ""
            many += ", events by ScatterElements" if rule(a).by_event else ""
            many += ", masks where many choose" + (", as many as hold the mass" if a["mass"] < 1 else "")
            return Yes(f"ScatterND in place (slot = position), TopK, GatherND and Scan{many}{below}")
        case "events":
            return Yes("ReduceLogSumExp, Scan, a cut of the graph of keys where an event ends")
        case "quantised_attention":
            return Yes(f"codes of {a['bits']} bits in place, TopK, GatherND and Scan, masks where many choose")
        case "compact_attention":
            return Yes("ScatterND in place (slot = position), TopK, GatherND and Scan, keys rotated as they are read")
        case "linear_memory":
            if not has_kernel("LinearAttention", MICROSOFT):
                return Yes("Scan, one step a token: this runtime has no kernel for LinearAttention")
            return Yes("com.microsoft LinearAttention")
        case "bank_ffn":
            if has_kernel("FusedMatMul", MICROSOFT):
                return Yes("FusedMatMul with each sequence's block, float32")
            return Yes("Transpose, MatMul with each sequence's block, float32: this runtime has no FusedMatMul")
    return No(f"memc::{spec.name} has no lowered form in this backend")

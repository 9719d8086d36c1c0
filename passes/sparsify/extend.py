"""What goes for the methods that read beyond the length that a model was trained on."""

from __future__ import annotations

import torch
from torch.fx import Node

from memc import sites
from memc.blocks import AttentionBlock
from memc.dialect import arguments
from memc.dialect.compact_attention import span
from memc.errors import MemcError
from memc.program import Program, get_tensor


def check_length(program: Program, method: str, *, budget: int, window: int, dense_below: int) -> None:
    """Raise ``MemcError`` E203 where a method would rotate by more than what the model was trained on."""
    longest, trained = span(method, budget, window, dense_below), program.model.max_positions
    if trained is None or longest <= trained:
        return
    options = f"window={window}" if method == "infllm" else f"budget={budget},dense_below={dense_below}"
    message = f"{method} would rotate by up to {longest - 1} positions, the model was trained on {trained}"
    shorter = f"window={trained - 1}" if method == "infllm" else f"budget and dense_below of at most {trained}"
    raise MemcError("E203", message, f"sparsify:method={method},{options}", f"write {shorter}")


def refuse(program: Program, block: AttentionBlock, method: str) -> sites.Refusal | None:
    """Tell why a block's keys cannot be held before rotation, or cannot be described, or None when they can."""
    if not _rotates_alike(program, block.query, block.key):
        return "no_rotary", f"{method} rotates what it reads anew, and the layer rotates no queries and keys alike"
    if method == "longheads" and block.value_dim != block.head_dim:
        return (
            "value_size",
            f"{method} asks keys by values, which have {block.value_dim} and not {block.head_dim} channels",
        )
    return None


def _rotates_alike(program: Program, query: Node, key: Node) -> bool:
    if {query.target, key.target} != {torch.ops.memc.rotary.default}:
        return False
    (q, k), fixed = (arguments(query), arguments(key)), ("positions", "interleaved", "scaling")
    if any(q[name] != k[name] for name in fixed):
        return False
    # A model that computes angles for each of the two has them twice.
    frequencies = [turn["inv_freq"] for turn in (q, k)]
    if frequencies[0] is frequencies[1] or any(node.op != "get_attr" for node in frequencies):
        return frequencies[0] is frequencies[1]
    first, second = (get_tensor(program.module, str(node.target)) for node in frequencies)
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-4, atol=1e-9)

"""The states and the op by which ``method=em`` finds events, once for the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import AttentionBlock
from memc.dialect import arguments, op_spec
from memc.program import StateSpec
from memc.rewrite import Editor

HISTORY = 256
"""Tokens whose surprises one is measured by."""

NUMBERS = "event_numbers"
"""The state that holds the number of each token's event."""


def add_states(editor: Editor, last: AttentionBlock) -> dict[str, Node]:
    """Add the states that grow with the tokens, behind those of the last block that is rewritten, and return them."""
    after, made = arguments(last.attention)["past_positions"], dict[str, Node]()
    for name, state in (("past_events", NUMBERS), ("past_positions", "event_positions")):
        after = made[name] = editor.add_state(StateSpec(state, torch.int64, ("B", "S"), -1, 1), after)
    return made


def find_events(
    editor: Editor, last: AttentionBlock, grown: Mapping[str, Node], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Insert ``memc::events`` behind the logits, with ``options`` ``gamma``, ``longest`` and ``refine``.

    Likeness is that of the keys of the ``last`` block that is rewritten, before rotation, as all heads have them.
    ``grown`` are what :func:`add_states` returns. Returns what the report tells of that block.
    """
    logits, (tokens, positions) = editor.output(0), editor.program.placeholders()[:2]
    groups, size, vocabulary = last.num_kv_heads, last.head_dim, int(logits.meta["val"].shape[2])
    fixed = {
        "past_logits": StateSpec("event_logits", torch.float32, ("B", vocabulary)),
        "past_surprises": StateSpec("event_surprises", torch.float32, ("B", HISTORY)),
        "past_keys": StateSpec("event_keys", torch.float32, ("B", groups, options["longest"] + 1, size)),
    }
    inputs = {"logits": logits, "tokens": tokens, "positions": positions, "key": last.key_pre_rotary, **grown}
    after = grown["past_positions"]
    for name, spec in fixed.items():
        after = inputs[name] = editor.add_state(spec, after)
    row = op_spec(torch.ops.memc.events.default)
    assert row is not None

    def found(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        results = row.overload(**t, **options)
        return tuple(results[index] for index in row.states.values())

    made = editor.insert(found, inputs, editor.graph.output_node(), last.path, (row.name, *options.items()))
    for name, value in zip(row.states, made, strict=True):
        editor.set_next(inputs[name], value)
    return {"event_bytes": sum(spec.bytes(0) for spec in fixed.values())}

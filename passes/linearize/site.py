"""The rewrite of one site: states, parameters and the layer in place of the attention, of all heads or of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import Alibi, AttentionBlock
from memc.dialect import arguments
from memc.head_split import HeadSplit, attend_kept, join_heads, of_others, split_states
from memc.objective import BlockObjective
from memc.passes.linearize.layers import LayerConfig, lizard_layer, shared_layer
from memc.passes.linearize.objective import LizardObjective, SharedObjective
from memc.passes.linearize.parameters import lizard_parameters, shared_parameters
from memc.program import Program, StateSpec
from memc.rewrite import Editor, New, result_of, window_states

if TYPE_CHECKING:
    from memc.passes.linearize.rewrite import Linearize

SEED = 20250709

PARAMETERS = "memc.linearize.layers."
"""What the names of new parameters begin with, before the number of the layer."""


def rewrite_site(
    options: Linearize, editor: Editor, block: AttentionBlock, split: HeadSplit
) -> tuple[dict[str, Any], BlockObjective]:
    """Rewrite the heads of a block that ``split`` does not keep; returns facts for the report, and how to train it."""
    node, label = block.attention, _free_label(editor.program, block.layer)
    bound = arguments(node)
    sinks = options.sinks if options.form == "shared" else 0
    config = LayerConfig(
        options.feature_map, options.gate, options.update, bound["scale"], bound["softcap"], options.window, sinks
    )
    old = result_of(node, 0)
    assert old is not None and block.hidden is not None
    inputs = {name: value for name, value in bound.items() if isinstance(value, Node)}
    slots, kept = options.window + sinks, None
    if split.kept:
        states, specs = split_states(editor, node, len(split.kept), slots)
        kept = attend_kept(editor, block, split)
        inputs.update(states)
    else:
        specs = window_states(editor, node, slots)
    linear = replace(block, num_heads=len(split.heads(split.others)), num_kv_heads=len(split.others))
    if isinstance(block.bias, Alibi):
        linear = replace(linear, bias=Alibi(tuple(block.bias.slopes[head] for head in split.heads(split.others))))
    columns = block.value_dim + (options.update == "gated")
    shape = ("B", linear.num_kv_heads, options.feature_size, columns)
    specs = (*specs, StateSpec(f"layer{label}_memory", torch.float32, shape))
    inputs["memory"] = editor.add_state(specs[-1], inputs["past_positions"])
    inputs["hidden"] = block.hidden
    if options.form == "lizard":
        inputs.update(query=block.query_pre_rotary, key=block.key_pre_rotary)
    new = _parameters(options, linear)
    added = editor.add_parameters(f"{PARAMETERS}{label}", new, SEED + block.layer, "linearize", node)
    output, *rest = _insert(editor, block, {**inputs, **added}, options.form, config, split)
    after, watched = rest[:4], rest[4:]
    whole = output if kept is None else join_heads(editor, block, split, kept, output)
    old.replace_all_uses_with(whole)
    for name, value in zip(("past_key", "past_value", "past_positions", "memory"), after, strict=True):
        editor.set_next(inputs[name], value)
    facts: dict[str, Any] = {
        "window": options.window,
        "sinks": sinks,
        "state_bytes": sum(spec.bytes(0) for spec in specs),
        "new_parameters": sum(item.count for item in new.values()),
    }
    objective = _objective(options, block, config, added, [output, *watched], old)
    if kept is not None:
        facts["kept_heads"] = list(split.kept)
        facts["state_bytes_per_token"] = sum(spec.bytes(1) for spec in editor.states_of(node).values())
        objective = replace(objective, heads=split.heads(split.others), whole=whole.name)
    return facts, objective


def _insert(
    editor: Editor, block: AttentionBlock, inputs: Mapping[str, Node], form: str, config: LayerConfig, split: HeadSplit
) -> tuple[Node, ...]:
    layer = shared_layer if form == "shared" else lizard_layer

    def trace(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return layer(config, of_others(split, t))

    return editor.insert(trace, inputs, block.attention, block.path, (form, config, split))


def _objective(
    options: Linearize,
    block: AttentionBlock,
    config: LayerConfig,
    parameters: Mapping[str, Node],
    results: Sequence[Node],
    old: Node,
) -> BlockObjective:
    names = {name: str(node.target) for name, node in parameters.items()}
    watched = tuple(node.name for node in results)
    if options.form == "lizard":
        return LizardObjective(block.layer, block.path, names, old.name, (), watched, 0)
    assert block.hidden is not None
    bound = arguments(block.attention)
    reads = [bound[name] for name in ("query", "key", "positions", "sink_logits") if bound[name] is not None]
    return SharedObjective(
        block.layer,
        block.path,
        names,
        old.name,
        tuple(node.name for node in reads),
        watched,
        options.window,
        config,
        block.hidden.name,
        bound["window"],
        block.bias.slopes if isinstance(block.bias, Alibi) else (),
    )


def _parameters(options: Linearize, block: AttentionBlock) -> dict[str, New]:
    assert block.hidden is not None
    width, o = int(block.hidden.meta["val"].shape[-1]), options
    if o.form == "lizard":
        return lizard_parameters(block, width, o.feature_map, o.feature_size, o.gate, o.meta)
    return shared_parameters(block, width, o.feature_map, o.feature_size, o.gate, o.update)


def _free_label(program: Program, layer: int) -> str:
    """Return the layer's number, with a suffix where two towers or two runs of the pass number layers alike."""
    taken = {name for name, _ in program.module.named_modules()}
    labels = (str(layer) if n == 1 else f"{layer}_{n}" for n in count(1))
    return next(label for label in labels if f"{PARAMETERS}{label}" not in taken)

"""Layers of which some heads stay as they are: the two parts of the heads, and the attention of those kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import AttentionBlock
from memc.compensation import compensated_window, sums_state
from memc.dialect import arguments, op_spec
from memc.program import StateSpec
from memc.rewrite import Editor


@dataclass(frozen=True)
class HeadSplit:
    """The key-value heads of a layer, each with the query heads that read it, in two parts: ``kept`` and the others.

    ``size`` query heads read one of the ``groups`` key-value heads.
    """

    groups: int
    size: int
    kept: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        """Groups that are not kept."""
        return tuple(group for group in range(self.groups) if group not in self.kept)

    def heads(self, groups: Iterable[int]) -> tuple[int, ...]:
        """Return the query heads of some groups."""
        return tuple(group * self.size + head for group in groups for head in range(self.size))

    def take(self, x: Tensor, groups: tuple[int, ...], axis: int = 1) -> Tensor:
        """Select groups, in order, along an axis of query heads or of key-value heads."""
        if len(groups) == self.groups:
            return x
        size = x.shape[axis] // self.groups
        # Runs of slices: an index tensor would be a constant of the graph.
        runs = [[group for _, group in run] for _, run in groupby(enumerate(groups), lambda pair: pair[1] - pair[0])]
        return _joined([_cut(x, axis, run[0] * size, len(run) * size) for run in runs], axis)

    def join(self, kept: Tensor, others: Tensor) -> Tensor:
        """Put the outputs ``[B,.,T,E]`` of both parts together in the order of the layer's query heads."""
        parts, done = [], {True: 0, False: 0}
        for stays, run in groupby(range(self.groups), lambda group: group in self.kept):
            length = len(list(run)) * self.size
            parts.append(_cut(kept if stays else others, 1, done[stays], length))
            done[stays] += length
        return _joined(parts, 1)


def split_states(
    editor: Editor, attention: Node, kept: int, slots: int
) -> tuple[dict[str, Node], tuple[StateSpec, ...]]:
    """Leave the growing states of a ``memc::attention`` node to ``kept`` of its key-value heads.

    The other heads get states of their own, named after those, that hold ``slots`` tokens. Returns their placeholders
    by the name of the node's argument, and their specifications. Their next values are still to be set.
    """
    bound, made, specs = arguments(attention), dict[str, Node](), list[StateSpec]()
    last: Node = bound["past_positions"]
    for name, spec in editor.states_of(attention).items():
        assert spec.grows is not None
        heads, rest = spec.shape[1 : spec.grows], spec.shape[spec.grows + 1 :]  # positions have no heads
        others = [int(total) - kept for total in heads]
        editor.reshape_state(bound[name], replace(spec, shape=("B", *(kept for _ in heads), "S", *rest)))
        shape = ("B", *others, slots, *rest)
        specs.append(replace(spec, name=f"{spec.name}_window", shape=shape, grows=None))
        last = made[name] = editor.add_state(specs[-1], last)
    return made, tuple(specs)


def of_others(split: HeadSplit, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors with query, key, value, slopes and sink logits of the heads that are not kept."""
    return {**t, **_part(split, t, split.others)}


def of_kept(split: HeadSplit, t: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a layer's tensors with query, key, value, slopes and sink logits of the heads that are kept."""
    return {**t, **_part(split, t, split.kept)}


def attend_window(
    editor: Editor,
    block: AttentionBlock,
    split: HeadSplit,
    inputs: Mapping[str, Node],
    window: int,
    sinks: int,
    *,
    compensation: bool = False,
) -> Node:
    """Insert ``memc::window_memory`` of the heads that are not kept and return its output's node.

    ``inputs`` are the block's by the op's argument names, the states those that hold the window and the sink tokens.
    With ``compensation`` there is a state more, of what :func:`memc.compensation.compensated_window` reads beside them.
    """
    row, bound = op_spec(torch.ops.memc.window_memory.default), arguments(block.attention)
    assert row is not None
    options = {"scale": bound["scale"], "window": window, "sinks": sinks, "softcap": bound["softcap"]}
    states = [*row.states]
    if compensation:
        sums = sums_state(*(editor.spec_of(inputs[name]) for name in ("past_key", "past_value")))
        inputs = {**inputs, "dropped": editor.add_state(sums, inputs["past_positions"])}
        states.append("dropped")

    def layer(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if compensation:
            return compensated_window(of_others(split, t), **options)
        results = torch.ops.memc.window_memory.default(**of_others(split, t), **options)
        return (results[0], *(results[index] for index in row.states.values()))

    key = ("window", compensation, *options.items(), split)
    output, *after = editor.insert(layer, inputs, block.attention, block.path, key)
    for name, following in zip(states, after, strict=True):
        editor.set_next(inputs[name], following)
    return output


def attend_kept(editor: Editor, block: AttentionBlock, split: HeadSplit) -> Node:
    """Insert the attention of the kept heads, whose states must be theirs alone, and return its output's node."""
    bound = arguments(block.attention)
    inputs = {name: value for name, value in bound.items() if isinstance(value, Node)}
    options = {name: bound[name] for name in ("scale", "window", "softcap")}

    def trace(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.ops.memc.attention.default(**of_kept(split, t), **options))

    output, *after = editor.insert(trace, inputs, block.attention, block.path, (split, *options.values()))
    for name, value in zip(("past_key", "past_value", "past_positions"), after, strict=True):
        editor.set_next(inputs[name], value)
    return output


def join_heads(editor: Editor, block: AttentionBlock, split: HeadSplit, kept: Node, others: Node) -> Node:
    """Insert what puts the outputs of kept and other heads together, and return its node."""

    def trace(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return (split.join(t["kept"], t["others"]),)

    (whole,) = editor.insert(trace, {"kept": kept, "others": others}, block.attention, block.path, ("join", split))
    return whole


def _part(split: HeadSplit, t: Mapping[str, Tensor], groups: tuple[int, ...]) -> dict[str, Tensor]:
    part = {name: split.take(t[name], groups) for name in ("query", "key", "value")}
    return part | {name: split.take(t[name], groups, axis=0) for name in ("slopes", "sink_logits") if name in t}


def _cut(x: Tensor, axis: int, start: int, length: int) -> Tensor:
    return torch.ops.aten.slice.Tensor(x, axis, start, start + length)  # type: ignore[no-any-return]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)

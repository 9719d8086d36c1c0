"""The attention of the heads that retrieve, inserted with the states that it reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from memc.blocks import AttentionBlock
from memc.dialect import OpSpec, arguments, op_spec
from memc.dialect.quantised_attention import code_bytes
from memc.dialect.refreshed_attention import most_chosen
from memc.dialect.selectors import SELECTORS
from memc.dialect.sparse_attention import described_tokens, description
from memc.head_split import HeadSplit, of_kept
from memc.program import StateSpec
from memc.rewrite import Editor

_SIZES = ("page", "budget", "sinks", "window", "dense_below")


def attend_retrieving(
    editor: Editor, block: AttentionBlock, split: HeadSplit, inputs: dict[str, Node], options: Mapping[str, Any]
) -> tuple[Node, dict[str, Any]]:
    """Insert the attention of the heads that retrieve, whose states must be theirs alone, as the pass's options say.

    Returns its output's node, and what the report tells of it.
    """
    page, method = options["page"], options["method"]
    size = int(editor.states_of(block.attention)["past_key"].shape[3])
    sizes, facts = {name: options[name] for name in _SIZES}, {"budget": options["budget"], "page": page}
    if SELECTORS[method].extends:
        output, (pages,) = attend_compact(editor, block, split, inputs, {**sizes, "method": method})
        return output, facts | {"page_bytes_per_token": pages.bytes(page) / page}
    sizes["rerank"] = options["rerank"]
    if options["bits"]:
        output, states = attend_quantised(editor, block, split, inputs, {**sizes, "bits": options["bits"]})
        held = sum(spec.bytes(page) for spec in states if spec.grows is not None)
        return output, facts | {"bits": options["bits"], "held_bytes_per_token": held / page}
    sizes |= {"method": method, "mass": options["mass"]}
    if SELECTORS[method].scorer == "channels":
        sizes["channels"] = min(size, options["channels"] or max(1, size // 8))
    if SELECTORS[method].choice == "levels":
        sizes["beam"] = options["beam"]
    if SELECTORS[method].eventful:
        sizes |= {name: options[name] for name in ("contiguity", "delay")}
    if options["refresh"] > 1:
        sizes["refresh"] = options["refresh"]
    output, (pages, *choice) = attend_sparse(editor, block, split, inputs, sizes)
    if choice:
        facts |= {"refresh": options["refresh"], "choice_bytes": choice[0].bytes(0)}
    piece = described_tokens(method, page)
    return output, facts | {"page_bytes_per_token": pages.bytes(piece) / piece}


def attend_sparse(
    editor: Editor, block: AttentionBlock, split: HeadSplit, inputs: Mapping[str, Node], options: Mapping[str, Any]
) -> tuple[Node, tuple[StateSpec, ...]]:
    """Insert ``memc::sparse_attention`` of the kept heads, whose growing states must be theirs alone.

    With ``refresh`` among the options it is ``memc::refreshed_attention``. Returns its output's node, and the states
    that it has beside those.
    """
    held, page = editor.states_of(block.attention)["past_key"], options["page"]
    sizes = description(options["method"], page, int(held.shape[3]))
    count = f"S/{described_tokens(options['method'], page)}"
    pages = replace(held, name=_named(held, "pages"), shape=(*held.shape[:2], count, *sizes))
    more, op = {"past_pages": pages}, torch.ops.memc.sparse_attention
    if "refresh" in options:
        most = most_chosen(*(options[name] for name in ("method", "page", "budget", "rerank")))
        more["past_choice"] = StateSpec(_named(held, "choice"), torch.int64, (*held.shape[:2], most), init=-1)
        op = torch.ops.memc.refreshed_attention
    inputs = {**inputs, **_added(editor, inputs["past_positions"], more)}
    row = op_spec(op.default)
    assert row is not None
    return _insert(editor, block, split, row, inputs, options), tuple(more.values())


def attend_compact(
    editor: Editor, block: AttentionBlock, split: HeadSplit, inputs: Mapping[str, Node], options: Mapping[str, Any]
) -> tuple[Node, tuple[StateSpec, ...]]:
    """Insert ``memc::compact_attention``, whose keys are held as they are before rotation.

    Returns its output's node, and the states that it has beside those of the attention.
    """
    held, turn = editor.states_of(block.attention)["past_key"], arguments(block.key)
    shape = (*held.shape[:2], f"S/{options['page']}", 2 * int(held.shape[3]))
    pages = replace(held, name=_named(held, "pages"), shape=shape, dtype=torch.float32)
    inputs = {**inputs, "query": block.query_pre_rotary, "key": block.key_pre_rotary, "inv_freq": turn["inv_freq"]}
    inputs |= _added(editor, inputs["past_positions"], {"past_pages": pages})
    row = op_spec(torch.ops.memc.compact_attention.default)
    assert row is not None
    options = {**options, "interleaved": turn["interleaved"], "scaling": turn["scaling"]}
    return _insert(editor, block, split, row, inputs, options), (pages,)


def attend_quantised(
    editor: Editor, block: AttentionBlock, split: HeadSplit, inputs: Mapping[str, Node], options: Mapping[str, Any]
) -> tuple[Node, tuple[StateSpec, ...]]:
    """Insert ``memc::quantised_attention`` of the kept heads, whose growing states become codes.

    Returns its output's node, and the states that hold keys and values: codes, their ranges, and the tails.
    """
    states, page, bits = editor.states_of(block.attention), options["page"], options["bits"]
    key, value = states["past_key"], states["past_value"]
    leading, size, value_size = key.shape[:2], int(key.shape[3]), int(value.shape[3])
    in_pages = (*leading, f"S/{page}", page, code_bytes(size, bits))
    by_token = (*leading, "S", code_bytes(value_size, bits))
    coded = {
        "past_key": replace(key, dtype=torch.uint8, shape=in_pages),
        "past_value": replace(value, dtype=torch.uint8, shape=by_token),
    }
    for name, spec in coded.items():
        editor.reshape_state(inputs[name], spec)
    more = {
        "past_pages": replace(key, name=_named(key, "pages"), shape=(*leading, f"S/{page}", 2 * size)),
        "past_ranges": replace(value, name=_named(key, "ranges"), shape=(*leading, "S", 2)),
        "past_key_tail": replace(key, name=f"{key.name}_tail", shape=(*leading, page, size), grows=None),
        "past_value_tail": replace(value, name=f"{value.name}_tail", shape=(*leading, page, value_size), grows=None),
    }
    inputs = {**inputs, **_added(editor, inputs["past_positions"], more)}
    row = op_spec(torch.ops.memc.quantised_attention.default)
    assert row is not None
    return _insert(editor, block, split, row, inputs, options), (*coded.values(), *more.values())


def _named(key: StateSpec, what: str) -> str:
    return key.name.replace("_key", f"_{what}")


def _added(editor: Editor, after: Node, specs: Mapping[str, StateSpec]) -> dict[str, Node]:
    """Add states behind one another and return their placeholders."""
    made: dict[str, Node] = {}
    for name, spec in specs.items():
        after = made[name] = editor.add_state(spec, after)
    return made


def _insert(
    editor: Editor,
    block: AttentionBlock,
    split: HeadSplit,
    row: OpSpec,
    inputs: Mapping[str, Node],
    options: Mapping[str, Any],
) -> Node:
    """Insert an op over the kept heads, make its results the next states, and return its output's node."""
    bound = arguments(block.attention)
    fixed = {**options, "scale": bound["scale"], "softcap": bound["softcap"]}

    def layer(t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        results = row.overload(**of_kept(split, t), **fixed)
        return (results[0], *(results[index] for index in row.states.values()))

    output, *after = editor.insert(layer, inputs, block.attention, block.path, (row.name, split, *fixed.items()))
    for name, value in zip(row.states, after, strict=True):
        editor.set_next(inputs[name], value)
    return output

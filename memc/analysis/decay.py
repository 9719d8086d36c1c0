"""How attention decays with the distance, whatever stands there: the mean query and the mean key of every head.

A head whose mean query, rotated, prefers mean keys that are near attends to a window whatever the text says, and loses
little when it streams. kvpress, ``duo_attention_on_the_fly``, ranks heads so for DuoAttention (arXiv 2410.10819), on
text. Here the means are those of the random tokens of :mod:`memc.analysis.heads`, so that no data are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memc.analysis.heads import attention_weights, head_facts, repeated_tokens
from memc.dialect import arguments
from memc.program import Program
from memc.sites import Group, attention_blocks
from memc.train.blocks import Teacher
from memc.verify.inputs import token_limit

DISTANCES = 500
"""Positions over which the decay is measured, as in kvpress; fewer where a model has no more."""

FIXED = ("slopes", "sink_logits")


@dataclass(frozen=True)
class LayerDecay:
    """For every query head of a layer, the area under its attention summed from the first key on: 1 is all on that.

    Attention to all keys alike has half of that, attention to the last alone next to nothing.
    """

    layer: int
    path: str
    groups: int
    areas: tuple[float, ...]

    @property
    def of_groups(self) -> tuple[float, ...]:
        """That of each key-value head: the mean of the query heads that read it."""
        size = len(self.areas) // self.groups
        return tuple(sum(self.areas[start : start + size]) / size for start in range(0, len(self.areas), size))


@torch.no_grad()
def head_decay(program: Program) -> tuple[LayerDecay, ...]:
    """Measure every query head of every ``memc::attention`` of a raised decoder with weights."""
    assert not program.is_fake, "means come from weights"
    blocks = [b for b in attention_blocks(program) if b.attention.target is torch.ops.memc.attention.default]
    bound = [arguments(block.attention) for block in blocks]
    turns = [arguments(block.key) if block.rotary is not None else None for block in blocks]
    nodes = []
    for block, a, turn in zip(blocks, bound, turns, strict=True):
        named = {"query": block.query_pre_rotary, "key": block.key_pre_rotary}
        named |= {name: a[name] for name in FIXED if a[name] is not None}
        named |= {"inv_freq": turn["inv_freq"]} if turn is not None else {}
        nodes.append({name: node.name for name, node in named.items()})
    found = [torch.zeros(block.num_heads, dtype=torch.float64) for block in blocks]
    tokens, _ = repeated_tokens(token_limit(program), program.model.max_positions)
    tokens = tokens.to(next(program.module.parameters()).device)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    distances = min(DISTANCES, program.model.max_positions or DISTANCES)

    def score(index: int, values: dict[str, Tensor]) -> None:
        given = {name: values[node] for name, node in nodes[index].items()}
        with torch.no_grad():
            found[index] += areas({**bound[index], **given}, turns[index], distances).double().cpu() / len(tokens)

    teacher = Teacher(program, [tuple(chosen.values()) for chosen in nodes])
    for row in range(len(tokens)):
        teacher.run(tokens[row : row + 1], positions, score)
    return tuple(
        LayerDecay(block.layer, block.path, block.num_kv_heads, tuple(area.tolist()))
        for block, area in zip(blocks, found, strict=True)
    )


def areas(a: Mapping[str, Any], turn: Mapping[str, Any] | None, distances: int) -> Tensor:
    """Return the area ``[H]`` of each head: the mean over ``distances`` keys of the attention to those up to there.

    ``a`` are the arguments of ``memc::attention`` by name, query ``[1,H,T,D]`` and key ``[1,G,T,D]`` before rotation,
    and ``inv_freq`` with the ``turn`` that are those of ``memc::rotary``. The attention is that of the mean query at
    the last position to mean keys at all.
    """
    at = torch.arange(distances, device=a["query"].device)
    query, key = (a[name].float().mean(2, keepdim=True).expand(-1, -1, distances, -1) for name in ("query", "key"))
    if turn is not None:
        options = {name: turn[name] for name in ("interleaved", "scaling")}
        query, key = (torch.ops.memc.rotary.default(x, at[None], a["inv_freq"], **options) for x in (query, key))
    weights = attention_weights(a, query[:, :, -1:], key, at[-1:])
    return weights[0, :, 0].cumsum(-1).mean(-1)


def decay_facts(layers: Collection[LayerDecay], kept: Collection[Group]) -> dict[str, Any]:
    """Render the areas for a pass's report, with the key-value heads that were kept."""
    places = [(one.layer, one.path, one.groups) for one in layers]
    return head_facts(0.5, places, [{"decay": list(one.areas)} for one in layers], kept)


def farthest(layers: Collection[LayerDecay], share: float, among: Collection[tuple[int, str]]) -> list[Group]:
    """Return a share of the key-value heads of some blocks (layer, path): those that decay least."""
    scored = [
        (-score, (one.layer, group))
        for one in layers
        if (one.layer, one.path) in among
        for group, score in enumerate(one.of_groups)
    ]
    return sorted(group for _, group in sorted(scored)[: round(share * len(scored))])

"""How far heads reach: the attention that a window and the first tokens do not hold, measured on text.

What a head that streams loses, which neither its scores on repeated tokens (:mod:`memc.analysis.heads`) nor the decay
of its rotation with the distance tell: by both, heads that look far on ordinary text may be taken for such as do not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memc.analysis.heads import BLOCK_SCORES, attention_weights
from memc.analysis.stream import Stream
from memc.blocks import AttentionBlock
from memc.dialect import arguments
from memc.pipeline import Calibration
from memc.program import Program, get_tensor
from memc.sites import Group

INPUTS = ("query", "key", "slopes", "sink_logits")


@dataclass(frozen=True)
class Reach:
    """The mean attention of one layer's query heads on what is neither in the window nor among the first tokens."""

    layer: int
    groups: int
    beyond: tuple[float, ...]

    @property
    def of_groups(self) -> tuple[float, ...]:
        """That of each key-value head: the highest of the query heads that read it."""
        size = len(self.beyond) // self.groups
        return tuple(max(self.beyond[start : start + size]) for start in range(0, len(self.beyond), size))


@torch.no_grad()
def reaches(
    program: Program, blocks: Sequence[AttentionBlock], text: Calibration, *, window: int, sinks: int
) -> tuple[Reach, ...]:
    """Measure the ``memc::attention`` of some blocks, in the order of the graph, over sequences from their start.

    The mean is over the tokens that have more than ``window + sinks`` tokens to read; 0 where no sequence is so long.
    """
    stream, found = Stream(program, text), []
    for block in blocks:
        bound = arguments(block.attention)
        given = {name: bound[name] for name in INPUTS if bound[name] is not None}
        nodes = {name: node for name, node in given.items() if node.op != "get_attr"}
        fixed = {
            name: get_tensor(program.module, str(node.target)) for name, node in given.items() if name not in nodes
        }
        total = torch.zeros(block.num_heads, dtype=torch.float64)
        for seen in stream.advance(block.attention, set(nodes.values())):
            values = {name: seen[node] for name, node in nodes.items()}
            total += beyond({**bound, **fixed, **values}, window, sinks).double().cpu()
        tokens = len(text.tokens) * max(0, text.tokens.shape[1] - window - sinks)
        found.append(Reach(block.layer, block.num_kv_heads, tuple((total / max(1, tokens)).tolist())))
    return tuple(found)


def beyond(a: Mapping[str, Any], window: int, sinks: int) -> Tensor:
    """Return the attention ``[H]``, summed over tokens, to those at least ``window`` back and not the first ``sinks``.

    ``a`` are the arguments of ``memc::attention`` by name, tensors in place of nodes, for a sequence from its start.
    """
    query: Tensor = a["query"].float()
    key: Tensor = a["key"].float()
    batch, heads, tokens, _ = query.shape
    found = torch.zeros(heads, device=query.device)
    there = torch.arange(tokens, device=query.device)
    rows = max(1, BLOCK_SCORES // (batch * heads * tokens))
    for first in range(window + sinks, tokens, rows):
        at = there[first : first + rows]
        weights = attention_weights(a, query[:, :, at], key, at)
        far = (at[:, None] - there >= window) & (there >= sinks)
        found += (weights * far).sum((0, 2, 3))
    return found


def farthest(layers: Collection[Reach], share: float) -> list[Group]:
    """Return a share of the key-value heads of some layers: those that reach beyond the window most."""
    scored = [(-score, (one.layer, group)) for one in layers for group, score in enumerate(one.of_groups)]
    return sorted(group for _, group in sorted(scored)[: round(share * len(scored))])

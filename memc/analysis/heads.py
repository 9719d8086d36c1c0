"""Head roles: which attention heads look up earlier tokens, found without data on repeated random tokens.

Where a sequence of random tokens comes again, nothing but the earlier copy tells what follows. An *echo* head attends
from a token to its earlier occurrence, an *induction* head to the token after it (RazorAttention, arXiv 2407.15891,
section 3.2; induction heads, Olsson et al. 2022). Both find by content, at any distance.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memc.dialect import arguments
from memc.plugins import load_kernels
from memc.program import Program
from memc.report.files import HeadFacts, LayerHeads
from memc.sites import Group, attention_blocks
from memc.train.blocks import Teacher
from memc.verify.inputs import token_limit

LENGTH = 256
"""Most random tokens, all different, of one copy."""

COPIES = 2

SEQUENCES = 4

SEED = 2407

ABOVE_CHANCE = 2.0
"""Least score of a head that looks up, in those of a head that attends to all tokens alike."""

BLOCK_SCORES = 1 << 22
"""Most attention weights that are held at once."""


@dataclass(frozen=True)
class LayerRoles:
    """The mean attention of one layer's query heads on earlier occurrences, and on the tokens after them."""

    layer: int
    path: str
    groups: int
    induction: tuple[float, ...]
    echo: tuple[float, ...]

    @property
    def of_groups(self) -> tuple[float, ...]:
        """Retrieval score of each key-value head: the highest sum of both scores of the query heads that read it."""
        retrieval = [a + b for a, b in zip(self.induction, self.echo, strict=True)]
        size = len(retrieval) // self.groups
        return tuple(max(retrieval[start : start + size]) for start in range(0, len(retrieval), size))


@dataclass(frozen=True)
class HeadRoles:
    """Scores of every head; ``chance`` is the sum of both that attending to all tokens alike would give."""

    layers: tuple[LayerRoles, ...]
    chance: float

    def best(self, share: float, among: Collection[tuple[int, str]]) -> list[Group]:
        """Return a share of the key-value heads of some blocks (layer, path): those of the highest retrieval scores.

        Fewer where no more look up at all.
        """
        scored = [
            (-score, (roles.layer, group))
            for roles in self.layers
            if (roles.layer, roles.path) in among
            for group, score in enumerate(roles.of_groups)
        ]
        first = sorted(scored)[: round(share * len(scored))]
        return sorted(group for score, group in first if -score >= ABOVE_CHANCE * self.chance)

    def to_json(self, kept: Collection[Group]) -> dict[str, Any]:
        """Render the scores for a pass's report, with the key-value heads that were kept."""
        scores = [{"induction": list(roles.induction), "echo": list(roles.echo)} for roles in self.layers]
        places = [(roles.layer, roles.path, roles.groups) for roles in self.layers]
        return head_facts(self.chance, places, scores, kept)


def head_facts(
    chance: float,
    places: Iterable[tuple[int, str, int]],
    scores: Iterable[Mapping[str, list[float]]],
    kept: Collection[Group],
) -> dict[str, Any]:
    """Render scores of query heads for a pass's report, layer by layer, with the key-value heads that were kept.

    ``places`` are each layer's number, path and number of key-value heads, ``scores`` its scores by name.
    """
    layers = [
        LayerHeads(
            layer=layer,
            path=path,
            kv_heads=groups,
            kept=[group for group in range(groups) if (layer, group) in kept],
            **found,
        )
        for (layer, path, groups), found in zip(places, scores, strict=True)
    ]
    return HeadFacts(chance=chance, layers=layers).model_dump(mode="json")


@torch.no_grad()
def head_roles(program: Program) -> HeadRoles:
    """Score every query head of every ``memc::attention`` of a raised decoder with weights."""
    assert not program.is_fake, "scores come from weights"
    load_kernels()
    blocks = [b for b in attention_blocks(program) if b.attention.target is torch.ops.memc.attention.default]
    device = next(program.module.parameters()).device
    tokens, length = repeated_tokens(token_limit(program), program.model.max_positions)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    bound = [arguments(block.attention) for block in blocks]
    names = ("query", "key", "slopes", "sink_logits")
    nodes = [{name: a[name].name for name in names if a[name] is not None} for a in bound]
    found = [torch.zeros(2, block.num_heads, dtype=torch.float64) for block in blocks]

    def score(index: int, values: dict[str, Tensor]) -> None:
        given = {name: values[node] for name, node in nodes[index].items()}
        with torch.no_grad():
            found[index] += earlier_mass({**bound[index], **given}, length).double().cpu() / len(tokens)

    teacher = Teacher(program, [tuple(chosen.values()) for chosen in nodes])
    for row in range(len(tokens)):
        teacher.run(tokens[row : row + 1].to(device), positions[row : row + 1].to(device), score)
    layers = [
        LayerRoles(block.layer, block.path, block.num_kv_heads, tuple(mass[0].tolist()), tuple(mass[1].tolist()))
        for block, mass in zip(blocks, found, strict=True)
    ]
    return HeadRoles(tuple(layers), chance(length))


def repeated_tokens(vocabulary: int, most: int | None) -> tuple[Tensor, int]:
    """Draw sequences ``[N, COPIES L]`` of L different random tokens that come again; returns them and L."""
    length = min(LENGTH, vocabulary, (most or LENGTH * COPIES) // COPIES)
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randperm(vocabulary, generator=generator)[:length].repeat(COPIES) for _ in range(SEQUENCES)]
    return torch.stack(rows), length


def chance(length: int) -> float:
    """Return the mass on earlier occurrences and the tokens after them of a head that attends to all tokens alike."""
    at = torch.arange(length, COPIES * length)
    return float((2.0 * (at // length) / (at + 1)).mean())


def earlier_mass(a: Mapping[str, Any], length: int) -> Tensor:
    """Return the mean attention ``[2,H]`` from tokens that came before to the tokens after those, and to those.

    ``a`` are the arguments of ``memc::attention`` by name, tensors in place of nodes, for a sequence from its start
    that repeats every ``length`` tokens. Scores are made for some queries at a time.
    """
    query: Tensor = a["query"].float()
    key: Tensor = a["key"].float()
    batch, heads, tokens, _ = query.shape
    found = torch.zeros(2, heads, device=query.device)
    rows = max(1, BLOCK_SCORES // (batch * heads * tokens))
    for first in range(length, tokens, rows):
        at = torch.arange(first, min(first + rows, tokens), device=query.device)
        weights = attention_weights(a, query[:, :, at], key, at)
        for back in range(length, tokens, length):
            for role, where in enumerate((at - back + 1, at - back)):
                mass = weights[:, :, torch.arange(len(at)), where.clamp_min(0)]
                found[role] += (mass * (at >= back)).sum((0, 2))
    return found / (batch * (tokens - length))


def attention_weights(a: Mapping[str, Any], query: Tensor, key: Tensor, at: Tensor) -> Tensor:
    """Return the attention ``[B,H,R,T]`` of the queries ``[B,H,R,D]`` of tokens ``at``."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores: Tensor = a["scale"] * torch.einsum("bghrd,bgtd->bghrt", grouped, key).flatten(1, 2)
    if a["softcap"]:
        scores = a["softcap"] * torch.tanh(scores / a["softcap"])
    here, there = at[:, None], torch.arange(key.shape[2], device=key.device)
    if a["slopes"] is not None:
        scores = scores + a["slopes"].float()[:, None, None] * (there - here)
    seen = there <= here
    if a["window"]:
        seen &= here - there < a["window"]
    if a["chunk"]:
        seen &= here // a["chunk"] == there // a["chunk"]
    if a["prefix"]:
        seen |= (here < a["prefix"]) & (there < a["prefix"])
    scores = scores.masked_fill(~seen, -torch.inf)
    if a["sink_logits"] is not None:
        sinks = a["sink_logits"].float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., : key.shape[2]]

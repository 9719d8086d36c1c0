"""Whole blocks and layers that go: what each of them is worth, and which are taken out of the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.analysis.stream import Stream
from memc.blocks import Block
from memc.passes.prune import measure
from memc.passes.prune.curves import ROWS, Predictions
from memc.passes.prune.groups import Branch, Groups
from memc.passes.prune.moments import require_finite
from memc.passes.prune.rewrite import Cut
from memc.pipeline import Calibration
from memc.program import Program
from memc.raising import find_blocks
from memc.raising.feed_forward import linear_input
from memc.train.blocks import logits_node

GREEDY_ROWS = 1
"""Calibration sequences on which the perplexity without a block is measured, as in 2SSP."""


@dataclass(frozen=True)
class Removal:
    """Blocks that can be taken out of the residual stream together, and how many parameters their projections have."""

    number: int
    branches: tuple[Branch, ...]
    cost: int

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks."""
        return tuple(branch.block for branch in self.branches)

    @property
    def where(self) -> str:
        """Name it for messages: the layer, or the block."""
        block = self.branches[0].block
        return f"layer {self.number}" if len(self.branches) > 1 else f"layer {self.number} {block.path}".strip()


def runs(removals: Sequence[Removal], count: int) -> list[range]:
    """Return the indices of every so many removals that lie next to one another in the model."""
    numbers = [removal.number for removal in removals]
    starts = range(len(removals) - count + 1)
    return [range(i, i + count) for i in starts if numbers[i + count - 1] - numbers[i] == count - 1]


def choose(
    program: Program,
    groups: Groups,
    removals: Sequence[Removal],
    count: int,
    score: str,
    calibration: Calibration,
    cuts: Sequence[Cut],
) -> tuple[list[int], list[float]]:
    """Return the indices of what goes by a score, and the score of each removal (of each run by ``similarity``).

    The lowest go. ``2ssp`` looks at the model as it is after ``cuts``, the others at the original.
    """
    match score:
        case "similarity":
            distances = similarity(program, groups, removals, count, calibration)
            first = min(range(len(distances)), key=distances.__getitem__)
            return list(runs(removals, count)[first]), distances
        case "2ssp":
            return greedy(program, removals, count, calibration, cuts)
        case "position":
            values = position(program, removals, calibration)
        case _:
            values = influence(program, groups, removals, calibration)
    return sorted(sorted(range(len(values)), key=values.__getitem__)[:count]), values


def influence(program: Program, groups: Groups, removals: Sequence[Removal], calibration: Calibration) -> list[float]:
    """Return 1 - cos of the residual stream with and without what a removal adds, the mean over all tokens.

    Of a whole layer that is its block influence, 1 - E cos(h_in, h_out) (ShortGPT, Men et al. 2024, eq. 1); of a block
    alone the same of its own (He et al. 2024, arXiv 2406.15786, section 3).
    """
    ends = [groups.stream_of(removal.branches)[1] for removal in removals]
    nodes = {*ends, *(branch.addend for removal in removals for branch in removal.branches)}
    found = torch.zeros(len(removals), dtype=torch.float64)
    for seen in Stream(program, calibration).advance(max(nodes), nodes):
        for index, (removal, after) in enumerate(zip(removals, ends, strict=True)):
            require_finite(seen[after], removal.where)
            added = sum(seen[branch.addend].double() for branch in removal.branches)
            found[index] += float(turned(seen[after].double() - added, seen[after].double()).mean())
    return (found / len(calibration.tokens)).tolist()


def turned(before: Tensor, after: Tensor) -> Tensor:
    """Return 1 - cos of each token ``[..., D]``."""
    return 1 - functional.cosine_similarity(before, after, dim=-1)


def similarity(
    program: Program, groups: Groups, layers: Sequence[Removal], count: int, calibration: Calibration
) -> list[float]:
    """Return the angular distance arccos(cos(h_in, h_out)) / pi over each run of ``count`` layers.

    Of the last token of each sequence, the mean (Gromov et al. 2024, arXiv 2403.17887).
    """
    ends = [groups.stream_of(layer.branches) for layer in layers]
    nodes = {node for pair in ends for node in pair}
    places = runs(layers, count)
    found = torch.zeros(len(places), dtype=torch.float64)
    for seen in Stream(program, calibration).advance(max(nodes), nodes):
        for index, place in enumerate(places):
            before, after = (seen[node][:, -1].double() for node in (ends[place[0]][0], ends[place[-1]][1]))
            require_finite(after, layers[place[-1]].where)
            cosine = functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
            found[index] += float(torch.arccos(cosine).mean()) / math.pi
    return (found / len(calibration.tokens)).tolist()


def position(program: Program, removals: Sequence[Removal], calibration: Calibration) -> list[float]:
    """Return by how much the predictions move without each removal alone, times exp((B - i) / B) for layer i of B.

    Of two that change as much the later goes first: early layers lay out what later ones refine (after
    HierarchicalPrune, arXiv 2508.04663, where a change is one of image quality; here it is the KL divergence of
    next-token predictions).
    """
    original = Stream(program, calibration).fork(ROWS)
    predictions = Predictions(program, original.fork())
    layers = 1 + max(block.layer for block in find_blocks(program))
    return [
        predictions.kl(without(original.fork(), [removal])) * math.exp((layers - removal.number) / layers)
        for removal in removals
    ]


def greedy(
    program: Program, removals: Sequence[Removal], count: int, calibration: Calibration, cuts: Sequence[Cut]
) -> tuple[list[int], list[float]]:
    """Take out one after the other what leaves the least perplexity without it (2SSP, arXiv 2501.17771, stage 2).

    Returns the indices that go and the mean negative log-likelihood of the text without each in the first round.
    """
    base = Stream(program, calibration).fork(GREEDY_ROWS)
    for cut in cuts:
        if cut.removed:
            fitted = cut if cut.fit is not None else measure.unfitted(program, cut)
            base.replace(cut.group.exit, linear_input(cut.group.exit), fitted.exit_function())
    texts = list(zip(calibration.tokens[:GREEDY_ROWS], calibration.positions[:GREEDY_ROWS], strict=True))
    gone, first = list[int](), list[float]()
    for _ in range(count):
        found = {
            index: _likelihood(program, without(base.fork(), [removals[i] for i in (*gone, index)]), texts)
            for index in range(len(removals))
            if index not in gone
        }
        first = first or list(found.values())
        gone.append(min(found, key=found.__getitem__))
    return sorted(gone), first


def without(stream: Stream, removals: Sequence[Removal]) -> Stream:
    """Take removals out of what a stream is still to compute."""
    branches = [branch for removal in removals for branch in removal.branches]
    addends: dict[Node, set[Node]] = {}
    for branch in branches:
        addends.setdefault(branch.add, set()).add(branch.addend)
    for add, gone in addends.items():
        first, second = (source for source in add.args[:2] if isinstance(source, Node))
        if gone == {first, second}:  # blocks side by side are summed first
            stream.replace(add, first, torch.zeros_like)
        else:
            stream.replace(add, second if first in gone else first, _itself)
    return stream


def _itself(x: Tensor) -> Tensor:
    return x


def _likelihood(program: Program, stream: Stream, texts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean negative log-likelihood of the next token of the same document, of sequences.

    ``texts`` are the tokens of each and their positions, which start anew with every document.
    """
    end, losses = logits_node(program), list[float]()
    rows: Iterator[dict[Node, Tensor]] = stream.advance(end, [end])
    for seen, (tokens, positions) in zip(rows, texts, strict=True):
        require_finite(seen[end], "the logits")
        goes_on = (positions[1:] > 0).to(seen[end].device)
        after = tokens[1:].to(seen[end].device)[goes_on]
        losses.append(float(functional.cross_entropy(seen[end][0, :-1][goes_on].float(), after)))
    return sum(losses) / len(losses)

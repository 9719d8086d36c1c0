"""The bigram subnetwork: the fewest heads, channels and blocks that still predict by the current token alone.

After Chang and Bergen, "Bigram Subnetworks: Mapping to Next Tokens in Transformer Language Models" (arXiv 2504.15471),
with the continuous sparsification of Savarese et al. (arXiv 1912.04427). Weights are frozen; what is learned is a mask
over units u of score m_u. A unit is multiplied by its gate g_u = sigmoid(beta m_u), an attention or feed-forward block
by one of its own as well, so that a unit counts as open by the product p_u of both. The loss is::

    CE(P(. | x_t), f_g(x_1..x_t)) + penalty * sum_u cost_u p_u / sum_u cost_u

where ``cost`` is in parameters: the share of the block parameters that is open, in place of the share of open single
weights ||M||_1 / |M| of the paper, whose masks make no smaller shapes. Scores start at 0, gates at one half, as in the
paper; beta goes from 1 to ``BETA`` by the same factor at each step (the paper: 1.001 a step for up to 15,000 steps;
Savarese et al.: to 200), by when gates are 0 or 1. Units of positive score are the subnetwork.

The paper's P is counted in a corpus. Here it is the model's own bigram, its prediction where a token is all that it is
given: no corpus is needed, and what is found is what the model does. Embedding, norms and unembedding always stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from memc.analysis.gated import closed, gated_logits
from memc.analysis.units import BlockUnits
from memc.errors import MemcError
from memc.program import Program
from memc.progress import Progress
from memc.verify.divergence import token_kl
from memc.verify.inputs import positions_of

BETA = 200.0
"""Inverse temperature at the last step."""

RATE = 0.1
"""AdamW's rate; scores are few and steps too, so it is larger than the paper's 5e-5 on single weights."""

HELD_OUT = 0.25
"""Share of the sequences that nothing is learned on."""

DRAWS = 3
"""Random subnetworks of the same size that the found one is compared with."""

SEED = 2504


@dataclass(frozen=True)
class Mask:
    """A subnetwork: for each of ``units`` which of its units are open (bool), and the scores that say so.

    A unit's score is the lower of its own and its block's: both have to be positive.
    """

    units: tuple[BlockUnits, ...]
    scores: tuple[Tensor, ...]

    @property
    def kept(self) -> tuple[Tensor, ...]:
        """Which units are open, bool ``[units]`` of each block."""
        return tuple(scores > 0 for scores in self.scores)

    @property
    def share(self) -> float:
        """Share of the parameters of all units that is open."""
        total = sum(units.cost * units.count for units in self.units)
        held = sum(units.cost * int(kept.sum()) for units, kept in zip(self.units, self.kept, strict=True))
        return held / total


@dataclass(frozen=True)
class BigramFit:
    """How near predictions are to the model's bigram on held-out text, in nats a token.

    ``whole`` is of the model as it is, ``kept`` of the subnetwork alone, ``none`` with every unit closed; ``random`` of
    subnetworks with as many open units of each block. ``correlation`` is Pearson's r of the surprisals of the text's
    next tokens, subnetwork against bigram. ``without`` is the KL of the model without the subnetwork to itself as it
    is, ``without_random`` of the model without as many other units.
    """

    tokens: int
    whole: float
    kept: float
    none: float
    random: float
    correlation: float
    without: float
    without_random: float


def bigram_table(program: Program, tokens: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities ``[U,V]`` after each of the U different ``tokens`` alone, and the row of each.

    Holds U x V float32.
    """
    known, rows = tokens.unique(return_inverse=True)
    with torch.no_grad():
        parts = [
            gated_logits(program, part[:, None], torch.zeros_like(part)[:, None], {})[:, 0].float().log_softmax(-1)
            for part in known.split(batch)
        ]
    return torch.cat(parts), rows


def learn_mask(
    program: Program,
    units: Sequence[BlockUnits],
    tokens: Tensor,
    table: Tensor,
    rows: Tensor,
    *,
    penalty: float,
    steps: int,
    batch: int,
    progress: Progress,
) -> Mask:
    """Learn a mask on ``tokens [N,T]``, ``batch`` sequences a step in turn; ``table`` and ``rows`` are the targets.

    Raises ``MemcError`` E403 where the loss is not finite.
    """
    own = [torch.zeros(one.count, requires_grad=True) for one in units]
    whole = [torch.zeros(1, requires_grad=True) for _ in units]
    costs = torch.tensor([one.cost for one in units])
    total = sum(one.cost * one.count for one in units)
    optimizer = torch.optim.AdamW([*own, *whole], lr=RATE, weight_decay=0.0)
    positions = positions_of(tokens)
    with progress.step("learn the mask", steps) as advance:
        for step in range(steps):
            beta = BETA ** (step / max(steps - 1, 1))
            gates = [(beta * scores).sigmoid() for scores in own]
            outer = [(beta * score).sigmoid() for score in whole]
            chosen = torch.arange(step * batch, (step + 1) * batch) % len(tokens)
            logits = gated_logits(program, tokens[chosen], positions[chosen], _placed(units, gates, outer))
            target = table[rows[chosen]].exp()
            loss = -(target * logits.float().log_softmax(-1)).sum(-1).mean()
            if not bool(torch.isfinite(loss)):
                raise MemcError("E403", f"the loss of the mask is not finite at step {step}", program.model.source)
            open_ = [(gate * out).sum() for gate, out in zip(gates, outer, strict=True)]
            loss = loss + penalty * (costs * torch.stack(open_)).sum() / total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            advance(1)
    scores = tuple(torch.minimum(a, b).detach() for a, b in zip(own, whole, strict=True))
    return Mask(tuple(units), scores)


@torch.no_grad()
def measure_mask(program: Program, mask: Mask, tokens: Tensor, table: Tensor, rows: Tensor) -> BigramFit:
    """Compare a subnetwork with the model's bigram, and the model without it with itself, on ``tokens [N,T]``."""
    generator = torch.Generator().manual_seed(SEED)
    positions, expected = positions_of(tokens), table[rows]

    def predictions(kept: Sequence[Tensor]) -> Tensor:
        """Return log-probabilities ``[N,T,V]`` with the units open that are ``kept``, and no block closed for it."""
        gates = [closed(len(part), ~part) for part in kept]
        blocks = [part.any().float()[None] for part in kept]
        placed = _placed(mask.units, gates, blocks)
        return gated_logits(program, tokens, positions, placed).float().log_softmax(-1)

    def divergence(reference: Tensor, found: Tensor) -> float:
        return float(token_kl(reference, found).mean())

    def mean(make: Callable[[], float]) -> float:
        return math.fsum(make() for _ in range(DRAWS)) / DRAWS

    whole = predictions([torch.ones_like(part) for part in mask.kept])
    found = predictions(mask.kept)
    surprisals = [-part[:, :-1].gather(-1, tokens[:, 1:, None]).flatten() for part in (found, expected)]
    return BigramFit(
        tokens=tokens.numel(),
        whole=divergence(expected, whole),
        kept=divergence(expected, found),
        none=divergence(expected, predictions([torch.zeros_like(part) for part in mask.kept])),
        random=mean(lambda: divergence(expected, predictions([_shuffled(part, generator) for part in mask.kept]))),
        correlation=float(torch.corrcoef(torch.stack(surprisals))[0, 1].nan_to_num()),
        without=divergence(whole, predictions([~part for part in mask.kept])),
        without_random=mean(
            lambda: divergence(whole, predictions([~_shuffled(part, generator) for part in mask.kept]))
        ),
    )


def split_rows(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return which sequences are learned on and which are held out, at least one of each.

    Raises ``MemcError`` E207 for fewer than two.
    """
    if len(tokens) < 2:
        raise MemcError("E207", "one sequence cannot be both learned on and held out", next="give more text")
    held = max(1, round(HELD_OUT * len(tokens)))
    order = torch.arange(len(tokens))
    return order[:-held], order[-held:]


def _placed(units: Sequence[BlockUnits], gates: Sequence[Tensor], blocks: Sequence[Tensor]) -> Mapping[Node, Tensor]:
    """Give gates of units and of whole blocks to the nodes that they act on."""
    found: dict[Node, Tensor] = {}
    for one, gate, block in zip(units, gates, blocks, strict=True):
        found[one.node] = one.shaped(gate)
        found[one.exit] = block
    return found


def _shuffled(kept: Tensor, generator: torch.Generator) -> Tensor:
    return kept[torch.randperm(len(kept), generator=generator)]

"""What a channel or head is worth: the lowest scores go first.

Scores are of the input channels x_j of the projection W that a group ends in, over the tokens of the calibration
sequences; a head's score is the sum over its channels. Key channels end in the scores of the attention, and have a
score of their own, :func:`query_driven`. Only the order within a block matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.analysis.gated import gated_logits
from memc.blocks import AttentionBlock
from memc.passes.prune.groups import Group
from memc.passes.prune.moments import Moments
from memc.pipeline import Calibration
from memc.program import Program, get_tensor
from memc.raising.evaluate import hints
from memc.raising.feed_forward import linear_input


def activation(moments: Moments, weight: Tensor) -> Tensor:
    """Root of the sum over sequences of (mean |x_j| over tokens)^2 (Minitron, arXiv 2407.14679, section 2.2)."""
    return moments.means_squared.sqrt()


def wanda(moments: Moments, weight: Tensor) -> Tensor:
    """Sum over rows of |W_ij| times the root of the mean x_j^2 (Wanda, Sun et al. 2024, summed over columns)."""
    return weight.abs().sum(0) * (moments.squares / moments.count).sqrt()


def flap(moments: Moments, weight: Tensor) -> Tensor:
    """Variance of x_j times the sum over rows of W_ij^2 (FLAP, An et al. 2024, eq. 5, the WIFV metric)."""
    return moments.variance * weight.square().sum(0)


def two_stage(moments: Moments, weight: Tensor) -> Tensor:
    """Mean over sequences of the norm of x_j over tokens (2SSP, Sandri et al., arXiv 2501.17771, stage 1)."""
    return moments.norms


BY_MOMENTS: dict[str, Callable[[Moments, Tensor], Tensor]] = {
    "activation": activation,
    "wanda": wanda,
    "flap": flap,
    "2ssp": two_stage,
}


def by_unit(group: Group, channels: Tensor) -> Tensor:
    """Sum channels' scores ``[C]`` over each unit."""
    columns = group.keys if group.kind == "key_channels" else group.columns
    taken = columns >= 0
    return torch.zeros(group.units, dtype=torch.float64).index_add_(0, columns[taken], channels[taken].double())


def query_driven(group: Group, query: Tensor, key: Tensor) -> Tensor:
    """Score key channels of one sequence by the sum over the query heads of ``|Q_u| |K_u|`` (ThinK, arXiv 2407.21018).

    ``query [1,H,T,D]`` and ``key [1,G,T,D]`` are as the attention reads them; the norms are over the tokens and the
    channels of a unit u. Of a single channel that is ThinK's score ||Q_j K_j^T||_F (section 3.2), of all queries in
    place of its window of the last. Of a pair it is the root of the product of the energies of query and key, which a
    rotation leaves as they are.
    """
    return head_energies(group, query, key).sum(0)


def head_energies(group: Group, query: Tensor, key: Tensor) -> Tensor:
    """Return ``|Q_u| |K_u|`` of each query head and unit ``[H,units]``, as :func:`query_driven` has them."""
    units = group.keys
    taken = units >= 0

    def energies(x: Tensor) -> Tensor:
        squares = x[0].detach().float().cpu().square().sum(1, dtype=torch.float64)[:, taken]
        return squares.new_zeros(len(squares), group.units).index_add_(1, units[taken], squares)

    return (energies(query) * energies(key).repeat_interleave(query.shape[1] // key.shape[1], 0)).sqrt()


def magnitude(group: Group) -> Tensor:
    """Root of the sum of squares of every parameter that goes with a unit (DepGraph, Fang et al. 2023, eq. 5)."""
    total, known = torch.zeros(group.units, dtype=torch.float64), set[int]()
    for name, labels in group.parameters.items():
        value = get_tensor(group.module, name)
        if id(value) not in known and isinstance(value, torch.nn.Parameter):
            known.add(id(value))
            squares = (
                value.detach().double().cpu().square().movedim(labels.axis, 0).reshape(len(labels.units), -1).sum(1)
            )
            taken = labels.units >= 0
            total.index_add_(0, labels.units[taken], squares[taken])
    return total.sqrt()


def taylor(program: Program, groups: Sequence[Group], calibration: Calibration) -> list[Tensor]:
    """Score each group's channels by |sum over tokens of x_j dL/dx_j|, summed over sequences.

    Of key channels x is the query, all heads of it, ``[D]``; of other groups the input of their exit. L is the
    cross-entropy of the next tokens. To first order this is how much L changes when x_j becomes 0 (Molchanov et al.
    2019, eq. 8 with a gate on each channel), which for an exit equals |sum_i W_ij dL/dW_ij|. One sequence's activations
    are held at a time.
    """
    gated = [_gated(group) for group in groups]
    scores = [torch.zeros(hints(node)[-1], dtype=torch.float64) for node in gated]
    for row in range(len(calibration.tokens)):
        tokens, positions = (part[row : row + 1] for part in (calibration.tokens, calibration.positions))
        gates = {node: torch.ones(len(score), requires_grad=True) for node, score in zip(gated, scores, strict=True)}
        logits = gated_logits(program, tokens, positions, gates)
        goes_on = positions[0, 1:] > 0
        loss = functional.cross_entropy(logits[0, :-1][goes_on].float(), tokens[0, 1:][goes_on])
        for score, gradient in zip(scores, torch.autograd.grad(loss, list(gates.values())), strict=True):
            score += gradient.double().abs()
    return scores


def _gated(group: Group) -> Node:
    if group.kind != "key_channels":
        return linear_input(group.exit)
    assert isinstance(group.block, AttentionBlock)
    return group.block.query

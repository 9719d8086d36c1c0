"""How linearized layers learn from the softmax that they replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from memc.objective import BlockObjective, Values, relative_error
from memc.passes.linearize import initial
from memc.passes.linearize.layers import LayerConfig

MASS_WEIGHT = 0.3
"""Weight of the far-attention-mass term beside the relative error of the output."""

ROWS = 128
"""Queries, drawn anew each step, whose share of far attention is computed: scores of all would be ``[H,T,T]``."""

ROWS_INITIAL = 256
"""Queries of each sequence that first values are computed from."""


@dataclass(frozen=True)
class SharedObjective(BlockObjective):
    """Learn the output, the share of attention on far tokens, and what the far tokens alone would give.

    ``results`` are the layer's output ``[B,H,T,E]``, the memory's share ``[B,H,T,1]``, what it reads ``[B,H,T,E]``,
    the window's output and whether the memory holds anything ``[B,H or 1,T]``; ``reads`` are query, key, positions
    and, where the block has them, sink logits. Far tokens are those beyond ``window`` and the first ``sinks``.

    The output's error alone drives the mix towards the window, which is the easier half (component imbalance,
    arXiv 2510.05901). So the share is learned too, by the KL of two Bernoulli distributions, and the window is
    dropped on a schedule: the output's error with the teacher's own share in place of the learned one, which blames
    the memory's reading alone, weighs 1 at first and nothing at the end.
    """

    branches: ClassVar[tuple[str, ...]] = ("memory", "window")
    stands_for: ClassVar[str] = "tokens that left the window"

    config: LayerConfig
    hidden: str
    reach: int
    """Tokens that the replaced attention reads back, 0 for all."""
    slopes: tuple[float, ...] = ()
    """Slopes of ALiBi of every query head of the block, none where it has none."""

    def losses(
        self, results: Sequence[Tensor], values: Values, done: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return ``output``, ``mass`` and ``window_dropout``."""
        output, share, read, window, *_ = results
        target = self.wanted(values)
        made = {"output": relative_error(output, target, self.exact)}
        rows = _draw(self.exact, target.shape[2], generator, ROWS).to(target.device)
        if not len(rows):
            return made
        far = self.far_share(values, rows)
        made["mass"] = MASS_WEIGHT * bernoulli_kl(far, share[:, :, rows, 0]).mean()
        window = window[:, :, rows].float()
        forced = window + far.unsqueeze(-1) * (read[:, :, rows] - window)
        made["window_dropout"] = (1 - done) * relative_error(forced, target[:, :, rows], 0)
        return made

    def without(self, branch: str, results: Sequence[Tensor]) -> Tensor:
        """Return the window alone, or the memory alone where it holds anything; either is a mean of its own tokens.

        While the memory is empty there is nothing but the window to read.
        """
        output, _, read, window, holds = results
        return (window if branch == "memory" else torch.where(holds.unsqueeze(-1), read, window)).to(output.dtype)

    def carried(self, results: Sequence[Tensor]) -> Tensor:
        """Return the memory's share of the denominator."""
        return results[1][..., 0]

    def due(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the share of the replaced attention's mass that is on far tokens, and which queries have any."""
        positions = values[self.reads[2]]
        parts = torch.arange(positions.shape[1], device=positions.device).split(ROWS)
        far = torch.cat([self._seen(positions, rows)[1].any(-1) for rows in parts], 1)
        return torch.cat([self.far_share(values, rows) for rows in parts], 2), far

    def far_share(self, values: Values, rows: Tensor) -> Tensor:
        """Return the share of the replaced attention's mass that is on far tokens, ``[B,H,R]``, for some queries."""
        return self.far_attention(values, rows).sum(-1).clamp(max=1.0)

    def far_attention(self, values: Values, rows: Tensor) -> Tensor:
        """Return the replaced attention's weights ``[B,H,R,T]`` of queries ``rows``, but for those that are not far."""
        query, key, positions, *sink_logits = self._reads(values)
        query = query[:, :, rows].float().unflatten(1, (key.shape[1], -1))
        scores = self.config.scale * torch.einsum("bghrd,bgtd->bghrt", query, key.float()).flatten(1, 2)
        if self.config.softcap:
            scores = self.config.softcap * torch.tanh(scores / self.config.softcap)
        if self.slopes:
            slopes = scores.new_tensor([self.slopes[head] for head in self.heads or range(len(self.slopes))])
            away = (positions[:, None, :] - positions[:, rows, None]).unsqueeze(1)
            scores = scores + slopes[:, None, None] * away
        seen, far = self._seen(positions, rows)
        total = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
        if sink_logits:
            total = torch.cat([total, sink_logits[0].float()[None, :, None, None].expand(*total.shape[:3], 1)], -1)
        weights = total.softmax(-1)[..., : scores.shape[-1]]
        return weights.nan_to_num(0.0) * far.unsqueeze(1)

    def _seen(self, positions: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens the replaced attention's queries ``rows`` read, ``[B,R,T]``, and which are far."""
        segment = (positions == 0).cumsum(1)
        here, there = positions[:, rows, None], positions[:, None, :]
        seen = (segment[:, rows, None] == segment[:, None, :]) & (there >= 0) & (there <= here)
        if self.reach:
            seen &= here - there < self.reach
        return seen, seen & (here - there >= self.config.window) & (there >= self.config.sinks)

    def _reads(self, values: Values) -> list[Tensor]:
        """Return the values of ``reads``, of the replaced heads alone."""
        query, key, positions, *sink_logits = (values[name] for name in self.reads)
        if not self.heads:
            return [query, key, positions, *sink_logits]
        heads, size = list(self.heads), query.shape[1] // key.shape[1]
        groups = [head // size for head in heads[::size]]
        return [query[:, heads], key[:, groups], positions, *(logits[heads] for logits in sink_logits)]

    def initialise(self, values: Values, parameters: Values, run: Callable[[], Sequence[Tensor]]) -> None:
        """Set feature maps, gate and mass from the teacher's attention; see :mod:`memc.passes.linearize.initial`."""
        rows = _draw(self.exact, values[self.target].shape[2], torch.Generator().manual_seed(self.layer), ROWS_INITIAL)
        rows = rows.to(values[self.target].device)
        if not len(rows):
            return
        attention, positions = self.far_attention(values, rows), values[self.reads[2]]
        if self.config.feature in ("softmax", "hedgehog"):
            initial.set_maps(self._reads(values)[1], attention, parameters, self.config.scale, seed=self.layer)
        if "gate_bias" in parameters and not self.slopes:  # which tell how fast to forget, whatever the text
            distance = (positions[:, rows, None] - positions[:, None, :]).float()
            initial.set_half_life(attention, distance, parameters["gate_bias"])
        parameters["mass_bias"].zero_()  # as it starts the share is too small for float32 to tell by how much
        share = run()[1][:, :, rows, 0]
        initial.set_mass(share, attention.sum(-1), values[self.hidden][:, rows], parameters)


@dataclass(frozen=True)
class LizardObjective(BlockObjective):
    """Learn the output alone, as the paper does (Lizard, section 3.3).

    ``results`` are the layer's output and its two terms: what the gated memory reads, and alpha times the window.
    """

    branches: ClassVar[tuple[str, ...]] = ("memory", "window")
    no_share: ClassVar[str] = "form=lizard adds its branches, each with a denominator of its own: no mass is shared"

    def losses(
        self, results: Sequence[Tensor], values: Values, done: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return ``output``."""
        return {"output": relative_error(results[0], self.wanted(values), self.exact)}

    def without(self, branch: str, results: Sequence[Tensor]) -> Tensor:
        """Return the other term of the sum, which has no denominator in common with the one that is gone."""
        output, memory, window = results
        return (window if branch == "memory" else memory).to(output.dtype)


def bernoulli_kl(given: Tensor, found: Tensor) -> Tensor:
    """Return KL(given || found) of two Bernoulli distributions by their probabilities, in nats.

    Its gradient is finite for a given 0 or 1 too; found is kept 1e-6 away from both.
    """
    found = found.clamp(1e-6, 1 - 1e-6)
    # Quotients inside the logarithm would give 0 / 0 in the gradient where what is given is 0 or 1.
    entropy = torch.xlogy(given, given) + torch.xlogy(1 - given, 1 - given)
    return entropy - given * found.log() - (1 - given) * torch.log1p(-found)


def _draw(first: int, tokens: int, generator: torch.Generator, most: int) -> Tensor:
    """Draw up to ``most`` different tokens from ``first`` on, in order."""
    chosen = torch.randperm(max(tokens - first, 0), generator=generator)[:most]
    return first + chosen.sort().values

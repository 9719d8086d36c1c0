"""Tokens ranked by the events that they belong to, and the events beside those that are taken.

Sizes: B batch, G key-value heads, T queries, N tokens; token j of a sequence is column j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbered:
    """The row ``place [B,1,T,N]`` of each token's event in a table of N + 2, of which 0 is of tokens without one."""

    place: Tensor

    @classmethod
    def of(cls, events: Tensor, at: Tensor, delay: int) -> Numbered:
        """Take the numbers ``events [B,N]`` (-1 for none) of tokens ``delay`` behind queries at ``at [B,T]``."""
        far = torch.arange(events.shape[1], device=at.device) <= at[:, None, :, None] - delay
        return cls((events[:, None, None] + 1).where(far, 0))

    def whole(self, rank: Tensor) -> Tensor:
        """Return, for ``rank [B,G,T,N]`` of each token, the highest of its event."""
        return torch.where(self.place > 0, self._look_up(self._highest(rank), 0), rank)

    def beside(self, rank: Tensor, taken: Tensor) -> Tensor:
        """Return the higher rank of the events directly before and behind each token's, of those that are ``taken``.

        Minus infinity where neither was taken for its rank ``[B,G,T,N]``: what is at infinity was not.
        """
        best = self._highest(rank.masked_fill(~taken | (rank == torch.inf), -torch.inf))
        best[..., 0] = -torch.inf
        beside = torch.maximum(self._look_up(best, -1), self._look_up(best, 1))
        return beside.masked_fill(self.place == 0, -torch.inf)

    def _highest(self, rank: Tensor) -> Tensor:
        table = rank.new_full((*rank.shape[:3], rank.shape[3] + 2), -torch.inf)
        return table.scatter_reduce(3, self.place.expand_as(rank), rank, "amax")

    def _look_up(self, table: Tensor, away: int) -> Tensor:
        place = (self.place + away).clamp_min(0)
        return table.gather(3, place.expand(*table.shape[:3], -1))

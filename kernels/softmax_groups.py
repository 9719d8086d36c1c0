"""The grouped softmax of landmark attention, as one softmax over other scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Keys in pages of ``page``, some of which share the weight that a query gives to the last key, their landmark.

    ``through [B,G,R,T,P]``, or what is broadcast to it, marks the pages that queries read through their landmarks, of
    the S = P ``page`` keys. That is one softmax (Mohtashami & Jaggi 2023, section 3.1): with s the scores, m the
    landmark of the page of key j, and L the log-sum-exp of the scores of the page without it, the weight of m spread by
    the softmax within the page, exp(s_m) exp(s_j - L), is what a key of the score s_j + s_m - L has.
    """

    through: Tensor
    page: int

    def join_(self, scores: Tensor) -> None:
        """Replace, in place, ``scores [B,G,R,T,S]``, after the soft-cap, by those of the one softmax.

        Landmarks have minus infinity: their values are not read.
        """
        pages = scores.unflatten(-1, (-1, self.page))
        shift = pages[..., -1] - pages[..., :-1].logsumexp(-1)
        pages.add_(shift.masked_fill(~self.through, 0)[..., None])
        pages[..., -1].masked_fill_(self.through, -torch.inf)

    def part_(self, grad: Tensor, p: Tensor) -> None:
        """Replace, in place, the gradient of the joined scores by that of the scores; ``p`` are the weights.

        With D the sum of a page's ``grad``, its landmark gets D, and key j gives up D times the softmax within the
        page, which is its share of the page's weight. Of a page without weight nothing has a gradient.
        """
        pages, held = (x.unflatten(-1, (-1, self.page)) for x in (grad, p))
        due = pages.sum(-1).masked_fill(~self.through, 0)
        share = due / held.sum(-1).clamp_min(torch.finfo(p.dtype).tiny)
        pages.sub_(held * share[..., None])
        pages[..., -1].add_(due)

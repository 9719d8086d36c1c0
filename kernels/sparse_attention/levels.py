"""Two levels of bounds: pages, and super-pages of them, of which the best are entered.

Letters as in ``choose``; M super-pages of ``SPAN`` pages, P = M SPAN. What is held of a super-page and its pages is
``[1 + SPAN, C]``, the super-page first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.sparse_attention import SPAN


def joined(pages: Tensor, complete: Tensor) -> Tensor:
    """Return what is held ``[B,G,M,1+SPAN,2D]`` of the bounds of ``pages [B,G,P,2D]``, P a multiple of ``SPAN``.

    ``complete [B,M]`` tells which super-pages are; others are 0.
    """
    within = pages.unflatten(2, (-1, SPAN))
    top, low = within.chunk(2, -1)
    above = torch.cat([top.amax(3), low.amin(3)], -1).masked_fill(~complete[:, None, :, None], 0)
    return torch.cat([above[:, :, :, None], within], 3)


def lower(held: Tensor) -> Tensor:
    """Return the bounds ``[B,G,P,2D]`` of the pages in what is ``held [B,G,M,1+SPAN,2D]``."""
    return held[:, :, :, 1:].flatten(2, 3)


def ranked(scores: Tensor, sunk: int, edge: Tensor) -> Tensor:
    """Return what super-pages are entered by, for their ``scores [B,G,T,M]``.

    Those wholly among the first ``sunk`` pages need not be entered, those wholly before page ``edge [B,1,T,1]`` are by
    their score, the one that it lies in always, and what comes after it, which is read anyhow, never.
    """
    number, reached = torch.arange(scores.shape[3], device=scores.device), edge // SPAN
    apart = (number < sunk // SPAN) | (number > reached)
    return scores.masked_fill(apart, -torch.inf).masked_fill(number == reached, torch.inf)

"""How near choices come to their cut: what an order of summation may turn, where everything else agrees.

A backend's scores equal the reference's but for rounding, so that what is chosen differs only where the last that is
taken and the first that is left score alike to :data:`NEAR`, relative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 1e-5
"""Distance from the cut, relative to it, within which rounding may decide; float32 scores are sums of some hundred."""


@dataclass
class Cuts:
    """Choices that were made, and how many of them within ``NEAR`` of the cut; of a budget, what was ``taken``."""

    made: int = 0
    near: int = 0
    taken: int = 0
    budget: int = 0

    @property
    def text(self) -> str:
        """The numbers, for a report."""
        share = f", {100 * self.taken / self.budget:.0f} % of the budget taken" if self.budget else ""
        return f"{self.near} of {self.made} choices within {NEAR:g} of the cut{share}"


_watching: ContextVar[Cuts | None] = ContextVar("cuts", default=None)


@contextmanager
def watched() -> Iterator[Cuts]:
    """Count the choices that reference kernels make in the block."""
    cuts = Cuts()
    token = _watching.set(cuts)
    try:
        yield cuts
    finally:
        _watching.reset(token)


def note_cut(rank: Tensor, count: int | Tensor) -> None:
    """Count the choices of the ``count`` (or ``[..., 1]``) highest of each row of ``rank [..., N]``, if anyone watches.

    Rows whose cut is infinite choose nothing: all or none of what was scored is taken. Whole numbers are no scores.
    """
    cuts = _watching.get()
    if cuts is None or not rank.is_floating_point():
        return
    ordered = rank.double().sort(dim=-1, descending=True).values
    index = torch.as_tensor(count, device=rank.device).expand(*rank.shape[:-1], 1)
    inside = (index > 0) & (index < rank.shape[-1])
    last = ordered.gather(-1, (index - 1).clamp(0, rank.shape[-1] - 1))
    following = ordered.gather(-1, index.clamp_max(rank.shape[-1] - 1))
    made = inside & last.isfinite() & following.isfinite()
    _count(cuts, made, last - following <= NEAR * torch.maximum(last.abs(), following.abs()))


def note_share(before: Tensor, share: float) -> None:
    """Count the choices of what comes before a ``share`` is reached, by the sums ``before [..., N]`` each."""
    cuts = _watching.get()
    if cuts is not None:
        near = (before.double() - share).abs().amin(-1) <= NEAR * share
        _count(cuts, (before > 0).any(-1), near)  # of one alone all is taken


def note_taken(taken: Tensor, most: int, asked: Tensor) -> None:
    """Count what queries ``asked [B,T]`` have ``taken [B,G,T,N]``, of ``most`` each, where a budget is a bound."""
    cuts = _watching.get()
    if cuts is not None:
        cuts.taken += int((taken & asked[:, None, :, None]).sum())
        cuts.budget += int(asked.sum()) * taken.shape[1] * most


def _count(cuts: Cuts, made: Tensor, near: Tensor) -> None:
    cuts.made += int(made.sum())
    cuts.near += int((made & near).sum())

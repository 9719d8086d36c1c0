"""Which units go where what is left is fitted anew: those that the best fit misses least, found one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memc.passes.prune.choice import Task, parts
from memc.passes.prune.groups import Group
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import ridge
from memc.passes.prune.rewrite import Fit

STEPS = 24
"""In how many steps channels go at least; larger units go one by one."""


def eliminate(task: Task, weight: Tensor, moments: Moments) -> tuple[int, ...]:
    """Return the units to remove by backward elimination; ``weight [out,C]`` is that of the projection behind them."""
    elimination = Elimination(task.group, weight, moments)
    elimination.least(task.count)
    return tuple(sorted(elimination.removed))


class Elimination:
    """The best fit of a projection on what is left of its inputs, as units of them go (structured OBS, ZipLM).

    ``weight [out,C]`` takes inputs of covariance S; with H = S + ridge and W the best fit on what is left, removing the
    channels u of a unit raises the squared error of the best fit by tr(W_u ((H^-1)_uu)^-1 W_u^T), and W and H^-1 are
    brought up to date (arXiv 2302.04089, eqs. 2 and 3). ``error`` is the sum of the rises so far, the squared error a
    token of all outputs together; ``removed`` are the units gone.
    """

    def __init__(self, group: Group, weight: Tensor, moments: Moments) -> None:
        """Start with every unit in its place."""
        self.group, self.removed, self.error = group, list[int](), 0.0
        self._moments, self._mean = moments, weight.detach().double().cpu() @ moments.mean
        units = group.columns
        self._left = torch.arange(len(units))
        self._fitted = weight.detach().double().cpu().clone()
        self._inverse = torch.linalg.inv(moments.covariance + ridge(moments) * torch.eye(len(units)).double())
        self._single = len(units) == group.units and bool((units >= 0).all())

    def least(self, count: int) -> None:
        """Go on until ``count`` units are gone, always those of the least rise; as many of every part of the group."""
        group, rows = self.group, parts(self.group)
        row = torch.arange(group.units) // (group.units // rows)
        quota = torch.full((rows,), count // rows) - torch.bincount(row[self.removed], minlength=rows)
        step = max(1, group.units // STEPS) if self._single else 1
        while len(self.removed) < count:
            rise = self._rise()
            order = [u for u in sorted(rise, key=rise.__getitem__) if quota[row[u]] > 0 and u not in group.fixed]
            chosen = order[: min(step, count - len(self.removed))]
            for unit in chosen:
                quota[row[unit]] -= 1
            self.remove(chosen)

    def remove(self, units: Sequence[int]) -> None:
        """Take units out, and fit what is left."""
        gone = torch.isin(self.group.columns[self._left], torch.tensor(units, dtype=torch.int64))
        part, rest = self._fitted[:, gone], self._inverse[gone][:, ~gone]
        inner = self._inverse[gone][:, gone]
        self.error += float((part * torch.linalg.solve(inner, part.T).T).sum())
        factor = torch.linalg.solve(inner, rest)
        self._fitted = self._fitted[:, ~gone] - part @ factor
        self._inverse = self._inverse[~gone][:, ~gone] - rest.T @ factor
        self._left = self._left[~gone]
        self.removed += units

    def fit(self, bias: Tensor | None) -> Fit:
        """Return weight and bias of the projection, whose own bias is given, fitted on what is left to what it did."""
        offset = self._mean - self._fitted @ self._moments.mean[self._left]
        return Fit(self._fitted.float(), (offset if bias is None else offset + bias.detach().double().cpu()).float())

    def _rise(self) -> dict[int, float]:
        """Return by how much the squared error rises without each unit that is left."""
        names = self.group.columns[self._left]
        if self._single:
            rises = self._fitted.square().sum(0) / self._inverse.diagonal()
            return dict(zip(names.tolist(), rises.tolist(), strict=True))
        found: dict[int, float] = {}
        for unit in names.unique().tolist():
            if unit >= 0:
                at = names == unit
                part = self._fitted[:, at]
                found[unit] = float((part * torch.linalg.solve(self._inverse[at][:, at], part.T).T).sum())
        return found

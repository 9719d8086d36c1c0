"""Which units go where what is left is fitted anew: those that the best fit misses least, found one step at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.passes.prune.choice import Task, parts
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import ridge

STEPS = 24
"""In how many steps channels go at least; larger units go one by one."""


def eliminate(task: Task, weight: Tensor, moments: Moments) -> tuple[int, ...]:
    """Return the units to remove by backward elimination (structured optimal brain surgeon, ZipLM, arXiv 2302.04089).

    ``weight [out,C]`` takes inputs of covariance S; with H = S + ridge and W the best fit on what is left, removing the
    channels u of a unit raises the squared error of the best fit by tr(W_u ((H^-1)_uu)^-1 W_u^T). The units of the
    least rise go, and W and H^-1 are brought up to date (eqs. 2 and 3). Of query heads as many go of each key-value
    head.
    """
    units, rows = task.group.columns, parts(task)
    quota = torch.full((rows,), task.count // rows)
    row = torch.arange(task.group.units) // (task.group.units // rows)
    fitted = weight.detach().double().cpu().clone()
    inverse = torch.linalg.inv(moments.covariance + ridge(moments) * torch.eye(len(units), dtype=torch.float64))
    single = len(units) == task.group.units and bool((units >= 0).all())
    step = max(1, task.group.units // STEPS) if single else 1
    left, removed = torch.arange(len(units)), list[int]()
    while len(removed) < task.count:
        names = units[left]
        rise = _rise(names, fitted, inverse, single=single)
        order = [unit for unit in sorted(rise, key=rise.__getitem__) if quota[row[unit]] > 0]
        chosen = order[: min(step, task.count - len(removed))]
        for unit in chosen:
            quota[row[unit]] -= 1
        removed += chosen
        gone = torch.isin(names, torch.tensor(chosen))
        factor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, ~gone])
        fitted = fitted[:, ~gone] - fitted[:, gone] @ factor
        inverse = inverse[~gone][:, ~gone] - inverse[~gone][:, gone] @ factor
        left = left[~gone]
    return tuple(sorted(removed))


def _rise(names: Tensor, fitted: Tensor, inverse: Tensor, *, single: bool) -> dict[int, float]:
    """Return by how much the squared error rises without each unit that is left."""
    if single:
        rises = fitted.square().sum(0) / inverse.diagonal()
        return dict(zip(names.tolist(), rises.tolist(), strict=True))
    found: dict[int, float] = {}
    for unit in names.unique().tolist():
        if unit >= 0:
            at = names == unit
            part = fitted[:, at]
            found[unit] = float((part * torch.linalg.solve(inverse[at][:, at], part.T).T).sum())
    return found

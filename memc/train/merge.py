"""Adapters that were trained on a smaller program, given back the shapes of the one that it was made of (LoRAM).

Zhang et al. 2025 (arXiv 2502.13533), section 3: the rows and columns that pruning removed get zeros, and what was
learned is added to the weights as they were before it. What pruning did to the weights that it kept is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memc.program import Program, Provenance, get_tensor
from memc.train.adapters import Adapter, fold_change


def kept_indices(before: Program, after: Program, weight: str) -> tuple[Tensor, Tensor]:
    """Return which positions of each axis of a matrix of ``before`` it still has in ``after``, in order."""
    axes = [torch.arange(size) for size in get_tensor(before.module, weight).shape]
    origin, source = (program.provenance.get(weight, Provenance("")) for program in (before, after))
    for axis, ranges in source.kept[len(origin.kept) :]:
        axes[axis] = torch.cat([axes[axis][start:stop] for start, stop in ranges])
    rows, columns = axes
    return rows, columns


def expand(before: Program, after: Program, adapted: Program, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return ``down [rank, in]`` and ``up [out, rank]`` of an adapter in the shapes of ``before``.

    ``adapted`` is ``after`` with the trained adapters. Zero at the channels that ``after`` has lost, so that
    ``up @ down`` is zero in their rows and columns.
    """
    down, up = (get_tensor(adapted.module, name).detach() for name in (adapter.down, adapter.up))
    shape = get_tensor(before.module, adapter.weight).shape
    kept = kept_indices(before, after, adapter.weight)
    (outs, ins), (height, width) = (kept[::-1], shape[::-1]) if adapter.transposed else (kept, shape)
    full_down, full_up = down.new_zeros(len(down), width), up.new_zeros(height, up.shape[1])
    full_down[:, ins], full_up[outs] = down, up
    return full_down, full_up


@torch.no_grad()
def merge_adapters(before: Program, after: Program, adapted: Program, adapters: Sequence[Adapter]) -> Program:
    """Return ``before`` with what adapters have learned on ``after`` added to its own weights, in their own type."""
    merged = before.copy()
    for adapter in adapters:
        down, up = expand(before, after, adapted, adapter)
        fold_change(merged, adapter, adapter.scale * (up @ down))
    return merged

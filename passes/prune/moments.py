"""What calibration sequences show of the inputs of one projection."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from memc.errors import MemcError


def require_finite(x: Tensor, where: str) -> None:
    """Raise ``MemcError`` E403, naming the layer, for activations that are not finite."""
    if not bool(torch.isfinite(x).all()):
        hint = "check the checkpoint, and calibrate on other text"
        raise MemcError("E403", "activations on calibration text are not finite", where, hint)


class Moments:
    """Running sums over the tokens of calibration sequences, of the inputs ``x [T,C]`` of one projection.

    In float64; with ``gram`` also the sum of ``x x^T [C,C]``, and with ``targets`` that of ``x y^T [C,O]``, where ``y``
    is what a fit aims at.
    """

    def __init__(self, channels: int, *, gram: bool, where: str, targets: int = 0) -> None:
        """Start with nothing seen; ``where`` names the layer in messages."""
        self.count = 0
        self.where = where
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)
        self.norms = torch.zeros(channels, dtype=torch.float64)
        self.means_squared = torch.zeros(channels, dtype=torch.float64)
        self.gram = torch.zeros(channels, channels, dtype=torch.float64) if gram else None
        self.targets = torch.zeros(targets, dtype=torch.float64)
        self.cross = torch.zeros(channels, targets, dtype=torch.float64) if targets else None

    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add one sequence ``[..., C]`` and its targets. Raises ``MemcError`` E403 for values that are not finite."""
        x = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        require_finite(x, self.where)
        self.count += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        squares = x.square().sum(0, dtype=torch.float64)
        self.squares += squares
        self.norms += squares.sqrt()
        self.means_squared += x.abs().mean(0, dtype=torch.float64).square()
        if self.gram is not None:
            self.gram += x.T @ x
        if self.cross is not None:
            assert y is not None
            y = y.detach().reshape(len(x), -1).float().cpu()
            require_finite(y, self.where)
            self.targets += y.sum(0, dtype=torch.float64)
            self.cross += x.T @ y

    def about_origin(self) -> Moments:
        """Return what a fit without a bias minimises by: the same sums, about zero in place of the means."""
        found = copy(self)
        found.total, found.targets = torch.zeros_like(self.total), torch.zeros_like(self.targets)
        return found

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each channel."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the channels ``[C,C]``."""
        assert self.gram is not None
        return self.gram / self.count - torch.outer(self.mean, self.mean)

    @property
    def target_mean(self) -> Tensor:
        """Mean of each target."""
        return self.targets / self.count

    @property
    def cross_covariance(self) -> Tensor:
        """Covariance of the channels with the targets ``[C,O]``."""
        assert self.cross is not None
        return self.cross / self.count - torch.outer(self.mean, self.target_mean)

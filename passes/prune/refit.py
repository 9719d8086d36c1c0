"""New weights for what is left, in closed form: the projection behind a group makes up for the channels it lost."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.passes.prune.moments import Moments
from memc.passes.prune.rewrite import Fit

RIDGE = 1e-3
"""Penalty on the change of a weight, as a share of the mean variance of an input channel."""


def refit(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> Fit:
    """Fit a projection on its kept inputs to what it gave on all of them (least squares with a ridge).

    ``weight [out,C]`` takes inputs of mean m and covariance S; ``kept [C]`` tells which stay (k) and which go (r). The
    output is W_k x_k + W_r x_r + b, and the best affine guess of x_r is m_r + S_rk S_kk^-1 (x_k - m_k), so

        W' = W_k + W_r S_rk (S_kk + RIDGE mean(diag S) I)^-1,   b' = b + W m - W' m_k

    The ridge is on the change, so that a strong one leaves W_k alone (restoration of FASP, arXiv 2501.09412, with a
    bias).
    """
    w, covariance, mean = weight.detach().double().cpu(), moments.covariance, moments.mean
    inner = covariance[kept][:, kept]
    ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-30)
    factor = torch.linalg.cholesky(inner + ridge * torch.eye(len(inner), dtype=torch.float64))
    change = torch.cholesky_solve(covariance[kept][:, ~kept] @ w[:, ~kept].T, factor).T
    return _with_bias(w[:, kept] + change, w, bias, mean, kept)


def compensate(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> Fit:
    """Put the mean of what goes into the bias: b' = b + W_r m_r (FLAP, An et al. 2024, section 3.3)."""
    w = weight.detach().double().cpu()
    return _with_bias(w[:, kept], w, bias, moments.mean, kept)


def _with_bias(fitted: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, kept: Tensor) -> Fit:
    offset = weight @ mean - fitted @ mean[kept]
    return Fit(fitted.float(), (offset if bias is None else bias.detach().double().cpu() + offset).float())

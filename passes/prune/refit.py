"""New weights for what is left, in closed form: the projection behind a group makes up for the channels it lost."""

from __future__ import annotations

import torch
from torch import Tensor

from memc.passes.prune.moments import Moments
from memc.passes.prune.rewrite import Fit

RIDGE = 1e-2
"""Penalty on the change of a weight, as a share of the mean variance of an input channel.

On SmolLM2-135M at half of the block parameters and 24,576 tokens, this left 1.92 times the original's perplexity on
novels and 2.60 on the Jargon File, 1e-3 left 1.97 and 2.70 (wanda, the last layer fitted too)."""


def ridge(moments: Moments) -> float:
    """Return the penalty for inputs of such moments."""
    return RIDGE * max(float(moments.variance.mean()), 1e-30)


def refit(weight: Tensor, moments: Moments, kept: Tensor) -> Fit:
    """Fit a projection on its kept inputs to targets (least squares with a ridge).

    ``weight [out,C]`` takes inputs of mean m and covariance S, whose covariance with the targets y, of mean n, is X;
    ``kept [C]`` tells which inputs stay (k). With lambda = RIDGE mean(diag S),

        W' = W_k + (X_k^T - W_k S_kk) (S_kk + lambda I)^-1,   b' = n - W' m_k

    The ridge is on the change, so that a strong one leaves W_k alone (restoration of FASP, arXiv 2501.09412, with a
    bias). With y = W x this is what all inputs did: W_k + W_r S_rk (S_kk + lambda I)^-1 for the removed r. With moments
    about the origin it is the fit without a bias: b' = 0.
    """
    w, covariance = weight.detach().double().cpu(), moments.covariance
    inner = covariance[kept][:, kept]
    factor = torch.linalg.cholesky(inner + ridge(moments) * torch.eye(len(inner), dtype=torch.float64))
    missing = moments.cross_covariance[kept] - inner @ w[:, kept].T
    fitted = w[:, kept] + torch.cholesky_solve(missing, factor).T
    return Fit(fitted.float(), (moments.target_mean - fitted @ moments.mean[kept]).float())


def compensate(weight: Tensor, bias: Tensor | None, moments: Moments, kept: Tensor) -> Fit:
    """Put the mean of what goes into the bias: b' = b + W_r m_r (FLAP, An et al. 2024, section 3.3)."""
    w = weight.detach().double().cpu()
    offset = w[:, ~kept] @ moments.mean[~kept]
    return Fit(w[:, kept].float(), (offset if bias is None else bias.detach().double().cpu() + offset).float())

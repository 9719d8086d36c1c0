"""The activations of ``memc::bank_ffn`` and their derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_QUICK = 1.702
_CUBIC = 0.044715
_TANH_SCALE = math.sqrt(2 / math.pi)

VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(_QUICK * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
}


def _gated_slope(x: Tensor, scale: float) -> Tensor:
    """Return the derivative of x sigmoid(scale x)."""
    s = torch.sigmoid(scale * x)
    return s * (1 + scale * x * (1 - s))


def _gelu_slope(x: Tensor) -> Tensor:
    """Return Phi(x) + x phi(x), with the distribution and the density of the standard normal."""
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (x + _CUBIC * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * _TANH_SCALE * (1 + 3 * _CUBIC * x.square())


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


def _mish_slope(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t.square()) * torch.sigmoid(x)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: _gated_slope(x, 1.0),
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "quick_gelu": lambda x: _gated_slope(x, _QUICK),
    "relu": lambda x: (x > 0).to(x.dtype),
    "relu2": lambda x: 2 * F.relu(x),
    "sigmoid": _sigmoid_slope,
    "tanh": lambda x: 1 - torch.tanh(x).square(),
    "softplus": torch.sigmoid,
    "elu": lambda x: torch.exp(x.clamp(max=0)),
    "mish": _mish_slope,
}

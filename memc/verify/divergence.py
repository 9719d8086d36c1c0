"""How far one prediction of the next token is from another."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def token_kl(given: Tensor, found: Tensor) -> Tensor:
    """Return KL(given || found) in nats of each token ``[...]``, from log-probabilities ``[...,V]``."""
    return functional.kl_div(found, given, reduction="none", log_target=True).sum(-1)

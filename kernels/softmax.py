"""Softmax over a set of keys, and its gradient: the part that all attention ops share.

Sizes: ``query [B,H,T,D]``, ``key [B,G,S,D]``, ``value [B,G,S,E]``; scores are ``[B,G,R,T,S]`` with R = H // G query
heads to a key-value head, so that grouped heads need no copy of the keys. Everything is in the accumulation type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.kernels.softmax_groups import Groups


@dataclass(frozen=True)
class Weights:
    """Attention weights ``p [B,G,R,T,S]`` and what their gradient needs."""

    p: Tensor
    lse: Tensor
    capped: Tensor | None
    sink: Tensor | None


@dataclass(frozen=True)
class Gradients:
    """Gradients of one :func:`attend`; ``scores [B,G,R,T,S]`` is that of anything added to the scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    sink_logits: Tensor | None


def weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    through: Groups | None = None,
) -> Weights:
    """Return softmax(softcap tanh(scale q.k / softcap) + bias) over the keys that ``mask`` lets through.

    ``mask`` and ``bias`` are broadcast to ``[B,G,R,T,S]``; ``through`` are pages read through landmarks, of scores that
    nothing is added to but the soft-cap. The log-sum-exp ``lse [B,G,R,T,1]`` includes the sink logits ``[H]``. A row
    that reads nothing has weights 0, and lse 0 when it has no sink.
    """
    batch, heads, tokens, size = query.shape
    groups, held = key.shape[1], key.shape[2]
    flat = query.reshape(batch, groups, heads // groups * tokens, size)
    # What is done to scores is bound by memory: in place where the gradient of no step needs what it overwrites.
    scores = torch.matmul(flat, key.mT).mul_(scale).view(batch, groups, heads // groups, tokens, held)
    capped = None
    if softcap > 0:
        capped = scores.div_(softcap).tanh_()
        scores = capped * softcap
    if bias is not None:
        scores.add_(bias)
    if through is not None:
        through.join_(scores)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True)  # whatever it is, results are the same, and so are their gradients
    sink = None
    if sink_logits is not None:
        sink = sink_logits.to(scores.dtype).view(1, groups, heads // groups, 1, 1)
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        sink = torch.exp(sink - top)
        total = total + sink
    # A row that reads anything has a term exp(0) in its total: only a row that reads nothing is below 1.
    total = total.clamp_min(1)
    return Weights(p / total, top + total.log(), capped, None if sink is None else sink / total)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    through: Groups | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B,H,T,E]`` and the log-sum-exp ``[B,H,T]``."""
    batch, heads, tokens, _ = query.shape
    w = weights(query, key, mask, bias, sink_logits, scale, softcap, through)
    out = torch.matmul(w.p.flatten(2, 3), value)
    return out.view(batch, heads, tokens, value.shape[3]), w.lse.reshape(batch, heads, tokens)


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float,
    through: Groups | None = None,
) -> Gradients:
    """Return the gradients of :func:`attend`, recomputing its weights (FlashAttention, Dao et al. 2022, appendix B)."""
    batch, heads, tokens, size = query.shape
    groups = key.shape[1]
    w = weights(query, key, mask, bias, sink_logits, scale, softcap, through)
    flat_query = query.reshape(batch, groups, -1, size)
    flat_grad = grad_out.reshape(batch, groups, -1, value.shape[3])
    grad_p = torch.matmul(flat_grad, value.mT).view_as(w.p)
    # d score = p (dp - sum p dp + d lse): softmax and log-sum-exp share their Jacobian's p.
    common = -(w.p * grad_p).sum(-1, keepdim=True)
    if grad_lse is not None:
        common = common + grad_lse.reshape(batch, groups, -1, tokens, 1)
    grad_scores = grad_p.add_(common).mul_(w.p)
    if through is not None:
        through.part_(grad_scores, w.p)
    raw = grad_scores if w.capped is None else grad_scores * (1 - w.capped.square())
    raw = raw.flatten(2, 3)
    return Gradients(
        torch.matmul(raw, key).mul_(scale).view_as(query),
        torch.matmul(raw.mT, flat_query).mul_(scale),
        torch.matmul(w.p.flatten(2, 3).mT, flat_grad),
        grad_scores,
        None if w.sink is None else (w.sink * common).sum((0, 3, 4)).reshape(heads),
    )


def alibi(slopes: Tensor | None, distance: Tensor, groups: int) -> Tensor | None:
    """Return ``slopes [H]`` times ``distance [B,T,S]`` = key position - query position as a bias ``[B,G,R,T,S]``."""
    if slopes is None:
        return None
    return slopes.view(1, groups, -1, 1, 1) * distance[:, None, None]


def alibi_backward(grad_scores: Tensor, distance: Tensor) -> Tensor:
    """Return the gradient ``[H]`` of the slopes."""
    return (grad_scores * distance[:, None, None]).sum((0, 3, 4)).flatten()

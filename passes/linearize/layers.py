"""The layers in plain torch, as they are traced into a program's graph. Everything new is computed in float32.

Tensors go by name: ``query [B,H,T,D]``, ``key [B,G,T,D]``, ``value [B,G,T,E]``, ``positions [B,T]``,
``hidden [B,T,width]``, the states of the window, ``memory [B,G,F,E+1]`` (``E`` columns for ``gated_delta``), and the
parameters of :mod:`memc.passes.linearize.parameters`. A layer returns its output ``[B,H,T,E]``, the next states (key,
value and positions of the window, then the memory), and what training looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-30
"""A denominator at or below this holds nothing. Its inverse still fits float32."""

MAX_GAIN = 20.0
"""Bound of a key's log gain, so that its exponential cannot overflow however training goes."""


@dataclass(frozen=True)
class LayerConfig:
    """What one layer's arithmetic depends on beside its tensors."""

    feature: str
    gate: str
    update: str
    scale: float
    softcap: float
    window: int
    sinks: int


def feature_map(kind: str, x: Tensor) -> Tensor:
    """Map projected queries or keys ``[..., F']`` to non-negative features ``[..., F]``.

    ``softmax``: softmax(x), F = F'; ``hedgehog``: [softmax(x), softmax(-x)], F = 2 F' (Zhang et al. 2024, with the
    softmax of LoLCATs);
    ``elu``: elu(x) + 1 (Katharopoulos et al. 2020); ``relu``: max(x, 0) (Kasai et al. 2021); both F = F'.
    """
    match kind:
        case "hedgehog":
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
        case "softmax":
            return x.softmax(-1)
        case "elu":
            return functional.elu(x) + 1.0
        case _:
            return functional.relu(x)


def log_decay(config: LayerConfig, t: Mapping[str, Tensor], key: Tensor) -> Tensor:
    """Return the log of the memory's decay at each token, ``[B,G,T,1]`` or ``[B,G,T,F]``, at most 0.

    ``key [B,G,T,F]`` gives the shape. The decay is sigmoid(x) of a constant per head, of a scalar per token and head,
    or of a value per token and key channel, from the block's input ``hidden``.
    """
    if config.gate == "none":
        return torch.zeros_like(key[..., :1])
    if config.gate == "head":
        logit = torch.zeros_like(key[..., :1]) + t["gate_bias"].unsqueeze(-1).unsqueeze(-1)
    elif config.gate == "token":
        logit = (t["hidden"].float() @ t["gate_weight"] + t["gate_bias"]).transpose(1, 2).unsqueeze(-1)
        logit = logit.expand(-1, key.shape[1], -1, -1)
    else:
        low = t["hidden"].float() @ t["gate_down"]
        logit = low.unsqueeze(1) @ t["gate_up"] + t["gate_bias"].unsqueeze(1)
    return -functional.softplus(-logit)


def shared_layer(config: LayerConfig, t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Mix window and memory under one denominator.

    The window's softmax gives the output ``out`` and its log-sum-exp ``lse``; the memory gives a numerator N and a
    denominator D on an absolute log scale c: y = (N_w e^lse + N e^c) / (e^lse + D e^c) with N_w = out, computed as
    out + share (N / D - out), share = sigmoid(c + log D - lse), so nothing overflows. The memory holds exactly the
    tokens that left the window and are no sink tokens; while there is none, y is ``out`` to the bit.
    """
    out, lse, left_key, left_value, left, *states = windowed(config, t, t.get("sink_logits"), config.sinks)
    left_key, left_value = left_key.float(), left_value.float()
    gone = (left >= 0).unsqueeze(1)
    query = feature_map(config.feature, t["query"].float() @ t["query_map"])
    key = feature_map(config.feature, left_key @ t["key_map"])
    mass = (t["hidden"].float() @ t["mass_weight"] + t["mass_bias"]).transpose(1, 2)
    if config.update == "gated":
        gain = left_key @ t["gain_key"] + left_value @ t["gain_value"]
        key = key * (gain.clamp(-MAX_GAIN, MAX_GAIN).exp() * gone.unsqueeze(-1).float())
        read, memory = torch.ops.memc.linear_memory.default(
            query,
            key,
            with_ones(left_value),
            log_decay(config, t, key),
            t["positions"],
            t["memory"],
        )
        read, denominator, holds = divide(read)
        mass = mass + denominator.log()
    else:
        key = unit(key) * gone.unsqueeze(-1).float()
        strength = torch.sigmoid(t["hidden"].float() @ t["write_weight"] + t["write_bias"]).transpose(1, 2)
        read, memory = torch.ops.memc.linear_memory.default(
            unit(query),
            key,
            left_value,
            log_decay(config, t, key),
            t["positions"],
            t["memory"],
            strength,
            update="gated_delta",
        )
        holds = gone
    share = torch.where(holds, torch.sigmoid(mass - lse), 0.0).unsqueeze(-1)
    window = out.float()
    return ((window + share * (read - window)).to(out.dtype), *states, memory, share, read, window, holds)


def lizard_layer(config: LayerConfig, t: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Add a gated linear branch over all tokens and alpha times an anchored window (Lizard, section 3, eq. 5 to 9).

    ``query`` and ``key`` come without rotary. The ``meta [m]`` logits join the window's denominator without a value:
    m of them act as one of logit logsumexp(meta). The sum of both branches weighs more than 1: the paper's form.
    """
    sink = torch.logsumexp(t["meta"], 0).expand(t["query"].shape[1]) if "meta" in t else None
    out, _, _, _, _, *states = windowed(config, t, sink, 0)
    key = feature_map(config.feature, t["key"].float() @ t["key_map"])
    read, memory = torch.ops.memc.linear_memory.default(
        feature_map(config.feature, t["query"].float() @ t["query_map"]),
        key,
        with_ones(t["value"].float()),
        log_decay(config, t, key),
        t["positions"],
        t["memory"],
    )
    read, _, holds = divide(read)
    gated, anchored = torch.where(holds.unsqueeze(-1), read, 0.0), t["alpha"] * out.float()
    return ((gated + anchored).to(out.dtype), *states, memory, gated, anchored)


def windowed(config: LayerConfig, t: Mapping[str, Tensor], sink_logits: Tensor | None, sinks: int) -> list[Tensor]:
    """Attend to the window and the first ``sinks`` tokens: what ``memc::window_memory`` returns."""
    made = torch.ops.memc.window_memory.default(
        t["query"],
        t["key"],
        t["value"],
        t["positions"],
        t["past_key"],
        t["past_value"],
        t["past_positions"],
        t.get("slopes"),
        sink_logits,
        scale=config.scale,
        window=config.window,
        sinks=sinks,
        softcap=config.softcap,
    )
    return list(made)


def with_ones(value: Tensor) -> Tensor:
    """Append a column of ones to ``[...,E]``, which sums up the denominator."""
    # aten.pad would fix the batch and length that it is traced with.
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def divide(read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``[...,E+1]`` into numerator and denominator, its last column.

    Returns the quotient ``[...,E]``, the denominator ``[...]`` with 1 where there is none, and where there is one.
    """
    denominator = read[..., -1]
    holds = denominator > TINY
    denominator = torch.where(holds, denominator, 1.0)
    return read[..., :-1] / denominator.unsqueeze(-1), denominator, holds


def unit(x: Tensor) -> Tensor:
    """Scale the last axis to length 1; zeros stay zeros, with a finite gradient."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-12).rsqrt()

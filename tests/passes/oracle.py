"""The linearized layers in float64, one token at a time, with explicit lists of the tokens that left the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.passes.linearize import Linearize
from memc.program import Program
from tests.passes.tiny_program import Attention, scores

Params = Mapping[str, Tensor]


def layer_parameters(program: Program, layer: int) -> Params:
    start = f"memc.linearize.layers.{layer}."
    named = dict(program.module.named_parameters())
    return {name.removeprefix(start): p.detach().double() for name, p in named.items() if name.startswith(start)}


def features(kind: str, x: Tensor) -> Tensor:
    if kind == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    if kind == "softmax":
        return x.exp() / x.exp().sum(-1, keepdim=True)
    return torch.where(x > 0, x + 1, x.exp()) if kind == "elu" else x.clamp_min(0)


def gate(p: Params, kind: str, hidden: Tensor, head: int, size: int) -> Tensor:
    """Decay ``[F]`` of one token at one key-value head."""
    if kind == "none":
        return torch.ones(size).double()
    if kind == "head":
        logit = p["gate_bias"][head].expand(size)
    elif kind == "token":
        index = head if len(p["gate_bias"]) > 1 else 0
        logit = (hidden @ p["gate_weight"] + p["gate_bias"])[index].expand(size)
    else:
        logit = hidden @ p["gate_down"] @ p["gate_up"][head] + p["gate_bias"][head]
    return torch.sigmoid(logit)


def shared_attention(program: Program, options: Linearize) -> Attention:
    """(N_w + N_m e^c) / (D_w + D_m e^c), the window's and the memory's weights written out."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        p = layer_parameters(program, block.layer)
        s = scores(a)
        out = torch.zeros(*s.shape[:3], block.value_dim).double()
        per_group = block.num_heads // block.num_kv_heads
        for row in range(s.shape[0]):
            for head in range(block.num_heads):
                out[row, head] = _shared_head(p, options, a, s[row, head], hidden[row], row, head, head // per_group)
        return out

    return attention


def _shared_head(
    p: Params, options: Linearize, a: dict[str, Any], s: Tensor, hidden: Tensor, row: int, head: int, group: int
) -> Tensor:
    query, key, value = a["query"][row, head], a["key"][row, group], a["value"][row, group]
    size, rows = options.feature_size, []
    departed: list[tuple[Tensor, Tensor]] = []
    delta = torch.zeros(size, value.shape[-1]).double()
    for t in range(len(s)):
        decay = gate(p, options.gate, hidden[t], group, size)
        departed = [(k * decay, v) for k, v in departed]
        delta = decay[:, None] * delta
        gone = t - options.window
        if gone >= options.sinks:
            k = features(options.feature_map, key[gone] @ p["key_map"][group])
            if options.update == "gated":
                k = k * torch.exp(key[gone] @ p["gain_key"][group] + value[gone] @ p["gain_value"][group])
            else:
                k = k / k.norm()
                strength = torch.sigmoid(hidden[t] @ p["write_weight"] + p["write_bias"])[group]
                delta = delta + strength * torch.outer(k, value[gone] - delta.T @ k)
            departed.append((k, value[gone]))
        near = [j for j in range(t + 1) if t - j < options.window or j < options.sinks]
        weights = s[t, near].exp()
        top, bottom = weights @ value[near], weights.sum()
        if a["sink_logits"] is not None:
            bottom = bottom + a["sink_logits"][head].exp()
        mass = (hidden[t] @ p["mass_weight"] + p["mass_bias"])[head].exp()
        q = features(options.feature_map, query[t] @ p["query_map"][head])
        if departed and options.update == "gated":
            far = torch.stack([q @ k for k, _ in departed])
            top = top + mass * (far @ torch.stack([v for _, v in departed]))
            bottom = bottom + mass * far.sum()
        elif departed:
            top, bottom = top + mass * (delta.T @ (q / q.norm())), bottom + mass
        rows.append(top / bottom)
    return torch.stack(rows)


def lizard_attention(program: Program, options: Linearize) -> Attention:
    """Gated branch plus alpha times anchored window, from the equations of the paper."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        p = layer_parameters(program, block.layer)
        s = scores(a, "query_pre_rotary", "key_pre_rotary")
        out = torch.zeros(*s.shape[:3], block.value_dim).double()
        for row in range(s.shape[0]):
            for head in range(block.num_heads):
                group = head // (block.num_heads // block.num_kv_heads)
                query, key = a["query_pre_rotary"][row, head], a["key_pre_rotary"][row, group]
                value = a["value"][row, group]
                q, k = (features(options.feature_map, x @ p[n]) for x, n in ((query, "query_map"), (key, "key_map")))
                for t in range(s.shape[2]):
                    decay = torch.ones(options.feature_size).double()
                    top, bottom = torch.zeros_like(value[0]), torch.zeros(()).double()
                    for j in range(t, -1, -1):
                        weight = (q[t] * decay) @ k[j]
                        top, bottom = top + weight * value[j], bottom + weight
                        decay = decay * gate(p, options.gate, hidden[row, j], group, options.feature_size)
                    near = list(range(max(0, t - options.window + 1), t + 1))
                    weights = s[row, head, t, near].exp()
                    anchored = weights @ value[near] / (weights.sum() + (p["meta"].exp().sum() if options.meta else 0))
                    out[row, head, t] = top / bottom + p["alpha"] * anchored
        return out

    return attention

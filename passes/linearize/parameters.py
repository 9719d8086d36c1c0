"""The new parameters of one layer: names, shapes and first values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memc.blocks import Alibi, AttentionBlock
from memc.rewrite import New, constant

HALF_LIFE = 512
"""Tokens after which an untrained gate has forgotten half of what it held."""

LONGEST = 65536.0
"""Most tokens of a half-life: no decay to speak of."""

MASS = -30.0
"""First log scale of the memory's mass: next to the window's it is nothing until training or calibration raises it."""

RANK = 16
"""Rank of the per-channel gate (GLA, Yang et al. 2024, section 4.4)."""

META = 0.0
"""First logit of a meta token."""


def shared_parameters(
    block: AttentionBlock, width: int, feature: str, size: int, gate: str, update: str
) -> dict[str, New]:
    """List the parameters of a ``shared`` layer by name.

    Maps are per head: ``query_map [H,D,F']`` and ``key_map [G,D,F']`` with F' = F / 2 for ``hedgehog`` and F otherwise.
    """
    heads, groups, inner = block.num_heads, block.num_kv_heads, inner_size(feature, size)
    made = {
        "query_map": New((heads, block.head_dim, inner), lambda g: projections(heads, block.head_dim, inner, g)),
        "key_map": New((groups, block.head_dim, inner), lambda g: projections(groups, block.head_dim, inner, g)),
        "mass_weight": constant((width, heads), 0.0),
        "mass_bias": constant((heads,), MASS),
        **gate_parameters(gate, width, groups, groups, size),
    }
    if isinstance(block.bias, Alibi) and "gate_bias" in made:
        made["gate_bias"] = forgetting(block.bias.slopes, groups, made["gate_bias"].shape)
    if update == "gated":
        made["gain_key"] = constant((groups, block.head_dim, 1), 0.0)
        made["gain_value"] = constant((groups, block.value_dim, 1), 0.0)
    else:
        made["write_weight"] = constant((width, groups), 0.0)
        made["write_bias"] = constant((groups,), 0.0)
    return made


def lizard_parameters(
    block: AttentionBlock, width: int, feature: str, size: int, gate: str, meta: int
) -> dict[str, New]:
    """List the parameters of a ``lizard`` layer by name: maps shared by the heads and one gate for all of them."""
    inner = inner_size(feature, size)
    made = {
        "query_map": New((block.head_dim, inner), lambda g: projections(1, block.head_dim, inner, g)[0]),
        "key_map": New((block.head_dim, inner), lambda g: projections(1, block.head_dim, inner, g)[0]),
        "alpha": constant((), 1.0),
        **gate_parameters(gate, width, 1, block.num_kv_heads, size),
    }
    if meta:
        made["meta"] = constant((meta,), META)
    return made


def gate_parameters(gate: str, width: int, scalars: int, groups: int, size: int) -> dict[str, New]:
    """List the parameters of a gate; ``scalars`` is the number of heads' own gates where it is a scalar."""
    bias = bias_of(HALF_LIFE)
    match gate:
        case "head":
            return {"gate_bias": constant((groups,), bias)}
        case "token":
            return {"gate_weight": constant((width, scalars), 0.0), "gate_bias": constant((scalars,), bias)}
        case "channel":
            return {
                "gate_down": New((width, RANK), lambda g: torch.randn(width, RANK, generator=g) / math.sqrt(width)),
                "gate_up": New((groups, RANK, size), lambda g: 0.01 * torch.randn(groups, RANK, size, generator=g)),
                "gate_bias": constant((groups, size), bias),
            }
        case _:
            return {}


def forgetting(slopes: Sequence[float], groups: int, shape: tuple[int, ...]) -> New:
    """Describe the bias of gates ``[groups, ...]`` that forget as ALiBi does: by the mean slope of a group's heads.

    A memory that decays by exp(-slope) a token weighs what left the window as ALiBi would, but for a constant.
    """
    rates = [max(sum(part) / len(part), 0.0) for part in _parts(slopes, groups)]
    biases = torch.tensor([bias_of(min(math.log(2) / max(rate, 1e-9), LONGEST)) for rate in rates])
    return New(shape, lambda _: biases.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone())


def bias_of(half_life: float) -> float:
    """Return b with sigmoid(b) ** half_life = 1/2."""
    return -math.log(math.expm1(math.log(2) / half_life))


def inner_size(feature: str, size: int) -> int:
    """Return the number of projected channels that give ``size`` features."""
    return size // 2 if feature == "hedgehog" else size


def projections(count: int, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Make ``[count, rows, columns]``: the identity plus a little noise where square, else orthogonal."""
    if rows == columns:
        return torch.eye(rows) + 0.01 * torch.randn(count, rows, columns, generator=generator)
    return torch.stack(
        [torch.nn.init.orthogonal_(torch.empty(rows, columns), generator=generator) for _ in range(count)]
    )


def _parts(values: Sequence[float], count: int) -> Iterator[Sequence[float]]:
    """Yield so many parts of equal length."""
    size = len(values) // count
    yield from (values[start : start + size] for start in range(0, len(values), size))

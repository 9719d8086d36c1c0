"""Host code of the softmax kernels for one token: it attends and goes into the state, over shares of the keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.kernels.launch import Launch, Tile, gpu_of, launch, power_of_two, tile
from memc.kernels.softmax_device import Rule, blocks_of, constants_of, sizes_of, tile_of

SPLIT_ABOVE = 512
"""Slots of a ring above which its keys are split over programs."""


@dataclass(frozen=True)
class State:
    """A state of S slots, contiguous: ``key [B,G,S,D]``, ``value [B,G,S,E]`` and ``positions [B,S]`` int64."""

    key: Tensor
    value: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Step:
    """What one token gives: ``out [B,H,1,E]``, ``lse [B,H,1]``, the next state and the token that left a ring."""

    out: Tensor
    lse: Tensor
    following: State
    left: State


def attend_once(
    query: Tensor,
    token: State,
    past: State,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    rule: Rule,
    *,
    ring: bool = False,
    in_place: bool = False,
) -> Step:
    """Attend with one ``token``, held as a state of one slot, and append it to ``past``.

    With ``ring`` it takes its slot of a copy of ``past``; ``in_place`` it is written to slot p of ``past`` itself.
    """
    batch, heads, _, _ = query.shape
    groups, slots = past.key.shape[1:3]
    size, value_size = token.key.shape[3], token.value.shape[3]
    cut = tile_of("attention.step", query, token.value)
    shares, share = splits(slots, batch * groups, cut.sizes["block_keys"], query.device)
    # Which kernels there are must not depend on how much is held: only a ring's slots are known beforehand.
    split = not ring or slots > SPLIT_ABOVE
    if not split:
        shares, share = 1, slots
    length = slots if ring else slots + 1
    following = past
    if not in_place:
        following = State(
            token.key.new_empty(batch, groups, length, size),
            token.value.new_empty(batch, groups, length, value_size),
            token.positions.new_empty(batch, length),
        )
    left = State(*(x.new_empty(x.shape) for x in (token.key, token.value, token.positions))) if ring else token
    out, lse = query.new_empty(batch, heads, 1, value_size), query.new_empty(batch, heads, 1, dtype=torch.float32)
    parts, part_lse = out, lse
    if split:
        parts = query.new_empty(batch, heads, shares, value_size, dtype=torch.float32)
        part_lse = query.new_empty(batch, heads, shares, dtype=torch.float32)
    launch(
        Launch(
            "attention.step",
            (shares, groups, batch),
            {
                "out": parts,
                "lse": part_lse,
                "next_key": following.key,
                "next_value": following.value,
                "next_positions": following.positions,
                "left_key": left.key,
                "left_value": left.value,
                "left_positions": left.positions,
                "query": query.contiguous(),
                "key": token.key.contiguous(),
                "value": token.value.contiguous(),
                "positions": token.positions.contiguous(),
                "past_key": past.key.contiguous(),
                "past_value": past.value.contiguous(),
                "past_positions": past.positions.contiguous(),
                "slopes": query if slopes is None else slopes.contiguous(),
                "sink_logits": query if sink_logits is None else sink_logits.contiguous(),
                "past": slots,
                "share": share,
            },
            {
                **sizes_of(query, token.key, token.value),
                **constants_of(rule, slopes, query),
                "has_sink_logits": sink_logits is not None,
                "ring": ring,
                "in_place": in_place,
                "partial": split,
                "block_rows": max(16, power_of_two(heads // groups)),
                **cut.sizes,
            },
            cut.warps,
            cut.stages,
        )
    )
    if split:
        merge(out, lse, parts, part_lse, token.positions)
    return Step(out, lse, following, left)


def merge(out: Tensor, lse: Tensor, parts: Tensor, part_lse: Tensor, positions: Tensor) -> None:
    """Join shares ``parts [B,H,splits,E]`` with log-sum-exps to base 2 ``part_lse`` into ``out`` and ``lse``."""
    batch, heads, shares, size = parts.shape
    cut = tile("attention.merge", f"{size}", Tile({"block_splits": 16}, warps=4, stages=1), parts.device)
    launch(
        Launch(
            "attention.merge",
            (heads, batch, 1),
            {
                "out": out,
                "lse": lse,
                "parts": parts,
                "part_lse": part_lse,
                "positions": positions.contiguous(),
                "splits": shares,
            },
            {"heads": heads, "value_size": size, "block_value": power_of_two(size), **cut.sizes},
            cut.warps,
            cut.stages,
        )
    )


def splits(keys: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Return over how many programs each group's keys are split, to fill the GPU twice, and the keys of each."""
    blocks = max(1, blocks_of(keys, block))
    wanted = max(1, min(blocks, blocks_of(2 * gpu_of(device).multiprocessors, programs)))
    share = blocks_of(blocks, wanted)
    return blocks_of(blocks, share), share * block

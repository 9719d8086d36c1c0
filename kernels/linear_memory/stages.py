"""What the chunked forms of ``memc::linear_memory`` do before outputs or gradients: sum gates, solve, step states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memc.kernels.launch import Tile
from memc.kernels.linear_memory.call import Call, block, power, sweep

# Rows that are eliminated one by one in the delta rule's system, before products of blocks.
SOLVE = 16


def gates(call: Call) -> dict[str, Tensor]:
    """Sum log gates up within chunks; returns the two parts of the sums."""
    width = call.log_decay.shape[3]
    sums = {name: call.empty(*call.log_decay.shape) for name in ("whole", "part")}
    cut = call.tile("gates", Tile({"BK": min(32, power(width, 1))}, 4, 1))
    grid = (call.chunks * call.groups, -(-width // cut.sizes["BK"]))
    call.run("gates", grid, {"log_decay": call.log_decay, "positions": call.positions, **sums}, "G CHANNELS CHUNK", cut)
    return sums


def system(call: Call, sums: Mapping[str, Tensor]) -> Tensor:
    """Return how the keys of each chunk overlap; defined below the diagonal."""
    overlap = call.empty(*call.key.shape[:3], call.chunk)
    warps = 2 if call.log_decay.shape[3] > 1 and call.gpu.warp == 32 else 4
    cut = call.tile("overlaps", Tile({"BK": block(call).sizes["BK"]}, warps, 1))
    call.run(
        "overlaps",
        (call.blocks * call.groups, 1),
        {"key": call.key, "positions": call.positions, **sums, "overlap": overlap},
        "G K CHANNELS CHUNK ROWS PRECISION",
        cut,
    )
    return overlap


def inverse(call: Call, overlap: Tensor, *, by_row: bool) -> Tensor:
    """Return the inverse of I + overlap beta, or ``by_row`` of I + beta overlap."""
    result = overlap.new_empty(overlap.shape)
    cut = call.tile("invert", Tile({}, 256 // call.gpu.warp, 1))
    call.run(
        "invert",
        (call.chunks * call.groups, 1),
        {"overlap": overlap, "beta": call.beta, "positions": call.positions, "inverse": result},
        "G CHUNK PRECISION",
        cut,
        BLOCK=SOLVE,
        BY_ROW=by_row,
    )
    return result


def states(
    call: Call, sums: Mapping[str, Tensor], inverted: Tensor, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the state that each chunk meets, what tokens add (errors, for the delta rule), and the last state."""
    *_, keys, values = call.state.shape
    met, last = call.empty(call.groups, call.chunks, keys, values, dtype=kind), call.state.new_empty(call.state.shape)
    error = call.empty(*call.value.shape, dtype=kind) if call.delta else call.value
    cut = call.tile("states", sweep(call))
    call.run(
        "states",
        (call.groups, -(-values // cut.sizes["BV"])),
        {
            "key": call.key,
            "value": call.value,
            "beta": call.beta,
            "inverse": inverted,
            "positions": call.positions,
            **sums,
            "state": call.state,
            "met": met,
            "error": error,
            "last": last,
        },
        "G K V CHANNELS DELTA CHUNK KEYS PRECISION",
        cut,
    )
    return met, error, last

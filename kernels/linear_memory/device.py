"""``memc::linear_memory`` on a GPU: which kernels to launch, on what, and how they are cut.

Calls of a few tokens go token by token. Longer ones go by chunks of 64: gates are summed up, the state steps from chunk
to chunk, and then everything else is done for all chunks at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memc.dialect.linear_memory import LinearMemory
from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Tile
from memc.kernels.linear_memory.call import Call, block, power, prepare
from memc.kernels.linear_memory.gradient import backward
from memc.kernels.linear_memory.stages import gates, inverse, states, system

# Calls of at most this many tokens go token by token.
SHORT = 8
# Key and value channels at most: a program holds all key channels of its part of the state.
WIDEST = 256


def refuses(gpu: Gpu, args: LinearMemory) -> str:
    """Return why the kernels do not take a call, "" where they do."""
    kind, size = args.key.dtype, max(args.key.shape[3], args.value.shape[3])
    if {args.query.dtype, args.value.dtype} != {kind} or kind not in FLOATS:
        return "query, key and value are not of one type among float32, bfloat16 and float16"
    if any(x is not None and x.dtype not in FLOATS for x in (args.log_decay, args.beta)):
        return "log_decay or beta is not float32, bfloat16 or float16"
    if args.state.dtype != torch.float32:
        return "the state is not float32"
    if size > WIDEST:
        return f"more than {WIDEST} channels to a head"
    if args.beta is not None and args.log_decay.shape[3] > 64 and kind == torch.float32:
        return "the delta rule with gates per channel, in float32, of more than 64 channels"
    return "" if args.key.numel() and args.value.numel() else "no tokens"


def step(call: Call, last: Tensor) -> tuple[Tensor, Tensor]:
    """Run a short call, token by token; ``last`` takes the next state and may be the state itself.

    A program reads its part of the state before it writes it, and no other program reads that part.
    """
    values = call.state.shape[3]
    out = call.empty(*call.query.shape[:3], values, dtype=call.query.dtype)
    cut = call.tile("step", Tile({"BV": min(32, power(values))}, 4, 1))
    call.run(
        "step",
        (call.groups, -(-values // cut.sizes["BV"])),
        {
            "query": call.query,
            "key": call.key,
            "value": call.value,
            "log_decay": call.log_decay,
            "beta": call.beta,
            "positions": call.positions,
            "state": call.state,
            "out": out,
            "last": last,
        },
        "G R K V CHANNELS DELTA KEYS",
        cut,
    )
    return out, last


def forward(args: LinearMemory) -> tuple[Tensor, Tensor]:
    """Run ``memc::linear_memory``; arguments and results as its dialect page has them."""
    call = prepare(args)
    if call.tokens <= SHORT:
        return step(call, args.state.new_empty(args.state.shape))
    sums = gates(call)
    inverted = inverse(call, system(call, sums), by_row=False) if call.delta else call.key
    met, added, last = states(call, sums, inverted, call.key.dtype)
    values = args.value.shape[3]
    out = call.empty(*args.query.shape[:3], values, dtype=args.query.dtype)
    cut = call.tile("outputs", block(call))
    call.run(
        "outputs",
        (call.blocks * args.query.shape[0] * args.query.shape[1], -(-values // cut.sizes["BV"])),
        {
            "query": call.query,
            "key": call.key,
            "added": added,
            "beta": call.beta,
            "positions": call.positions,
            **sums,
            "met": met,
            "out": out,
        },
        "G R K V CHANNELS DELTA CHUNK ROWS PRECISION",
        cut,
    )
    return out, last


def in_place(args: LinearMemory) -> Tensor:
    """Run ``memc::linear_memory_``: the next state is written over ``state``."""
    call = prepare(args)
    if call.tokens <= SHORT and call.state is args.state:
        return step(call, args.state)[0]
    out, last = forward(args)
    args.state.copy_(last)
    return out


KERNELS = DeviceKernels(forward, refuses, backward, in_place)

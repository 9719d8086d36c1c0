"""Host code of the gradient of ``memc::linear_memory`` on a GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memc.dialect.linear_memory import LinearMemory
from memc.kernels.launch import Tile
from memc.kernels.linear_memory.call import Call, block, gradient_block, power, prepare, sweep
from memc.kernels.linear_memory.stages import gates, inverse, states, system


def backward(args: LinearMemory, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, log_decay, state and beta."""
    call = prepare(args)
    grad_out, grad_state = grad_out.to(args.query.dtype).contiguous(), grad_state.contiguous()
    sums = gates(call)
    overlap = system(call, sums) if call.delta else call.key
    inverted = inverse(call, overlap, by_row=False) if call.delta else call.key
    met, added, _ = states(call, sums, inverted, torch.float32)
    if args.beta is None:
        grads, _, grad_first = states_back(call, sums, call.key, grad_out, call.value, grad_state)
        grad_value, grad_beta = grad_values(call, sums, grad_out, grads, args.value.dtype), None
    else:
        pulled = grad_values(call, sums, grad_out, None, torch.float32)
        inverted = inverse(call, overlap, by_row=True)
        grads, right, grad_first = states_back(call, sums, inverted, grad_out, pulled, grad_state)
        strength = args.beta.masked_fill((args.positions < 0)[:, None], 0)
        grad_value = (right * strength[..., None]).to(args.value.dtype)
        grad_beta = (right * added).sum(-1).to(args.beta.dtype)
    grad_query, grad_key, grad_log_decay = grad_keys(call, sums, met, added, grads, grad_out, -grad_value)
    return grad_query, grad_key, grad_value, grad_log_decay, grad_first, grad_beta


def states_back(
    call: Call, sums: Mapping[str, Tensor], inverted: Tensor, grad_out: Tensor, pulled: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of the state after each chunk, of the delta rule's right-hand side, and of the first state."""
    *_, keys, values = call.state.shape
    grads, grad_first = call.empty(call.groups, call.chunks, keys, values), call.state.new_empty(call.state.shape)
    right = call.empty(*call.value.shape) if call.delta else grad_first
    cut = call.tile("states_back", sweep(call))
    call.run(
        "states_back",
        (call.groups, -(-values // cut.sizes["BV"])),
        {
            "query": call.query,
            "key": call.key,
            "beta": call.beta,
            "inverse": inverted,
            "grad_out": grad_out,
            "grad_added": pulled,
            "positions": call.positions,
            **sums,
            "grad_last": grad_state,
            "grads": grads,
            "right": right,
            "grad_state": grad_first,
        },
        "G R K V CHANNELS DELTA CHUNK KEYS PRECISION",
        cut,
    )
    return grads, right, grad_first


def grad_values(
    call: Call, sums: Mapping[str, Tensor], grad_out: Tensor, grads: Tensor | None, kind: torch.dtype
) -> Tensor:
    """Return the gradient of what tokens add, from outputs and, with ``grads`` of later states, from these."""
    values = call.value.shape[3]
    result = call.empty(*call.value.shape, dtype=kind)
    cut = call.tile("grad_values", block(call))
    call.run(
        "grad_values",
        (call.blocks * call.groups, -(-values // cut.sizes["BV"])),
        {
            "query": call.query,
            "key": call.key,
            "grad_out": grad_out,
            "positions": call.positions,
            **sums,
            "grads": result if grads is None else grads,
            "grad_added": result,
        },
        "G R K V CHANNELS CHUNK ROWS PRECISION",
        cut,
        CARRIED=grads is not None,
    )
    return result


def grad_keys(
    call: Call,
    sums: Mapping[str, Tensor],
    met: Tensor,
    added: Tensor,
    grads: Tensor,
    grad_out: Tensor,
    erased: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and log_decay; ``erased`` is the gradient of what keys read."""
    batch, groups, tokens, keys = call.key.shape
    channels = call.log_decay.shape[3]
    cut = call.tile("grad_keys", gradient_block(call))
    parts = 1 if channels > 1 else -(-keys // cut.sizes["BK"])
    total = call.empty(batch, groups, tokens, channels * parts)
    ends = call.empty(batch, groups, call.blocks, channels * parts)
    grad_query, grad_key = call.query.new_empty(call.query.shape), call.key.new_empty(call.key.shape)
    call.run(
        "grad_keys",
        (call.blocks * call.groups, -(-keys // cut.sizes["BK"])),
        {
            "query": call.query,
            "key": call.key,
            "added": added,
            "beta": call.beta,
            "grad_out": grad_out,
            "erased": erased,
            "positions": call.positions,
            **sums,
            "met": met,
            "grads": grads,
            "grad_query": grad_query,
            "grad_key": grad_key,
            "total": total,
            "ends": ends,
        },
        "G R K V CHANNELS DELTA CHUNK ROWS PRECISION",
        cut,
    )
    grad_log_decay = call.log_decay.new_empty(call.log_decay.shape)
    cut = call.tile("grad_gates", Tile({"BK": min(32, power(channels, 1))}, 4, 1))
    call.run(
        "grad_gates",
        (call.chunks * call.groups, -(-channels // cut.sizes["BK"])),
        {"total": total, "ends": ends, "positions": call.positions, "grad_log_decay": grad_log_decay},
        "G CHANNELS CHUNK ROWS",
        cut,
        PARTS=parts,
    )
    return grad_query, grad_key, grad_log_decay

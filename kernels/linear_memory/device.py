"""``memc::linear_memory`` on a GPU: which kernels to launch, on what, and how they are cut.

Calls of a few tokens go token by token. Longer ones go by chunks of 64: gates are summed up, the state steps from chunk
to chunk, and then everything else is done for all chunks at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Launch, Tile, gpu_of, launch, power_of_two, tile

# Calls of at most this many tokens go token by token.
SHORT = 8
# Tokens to a chunk, and to a block of its scores: few where each channel has a gate, since the blocks on the diagonal
# are then computed term by term, and fewer in float32, for the registers that it takes.
CHUNK, CHANNEL_ROWS, FLOAT32_ROWS = 64, 16, 32
# The most that a program holds of keys, channels times tokens of a chunk; the delta rule, which needs them twice, has
# chunks half as long in float32, and half as long again with gates per channel.
KEYS = 8192
# Rows that are eliminated one by one in the delta rule's system, before products of blocks.
SOLVE = 16
# Key and value channels at most: a program holds all key channels of its part of the state.
WIDEST = 256


def power(size: int, least: int = 16) -> int:
    """Return the power of two, at least ``least``, that holds ``size``."""
    return max(least, power_of_two(size))


@dataclass(frozen=True)
class Call:
    """The contiguous arguments of one call; without the delta rule ``beta`` is a tensor that nothing reads."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    positions: Tensor
    state: Tensor
    beta: Tensor
    _: KW_ONLY
    delta: bool

    @property
    def tokens(self) -> int:
        """Tokens to a sequence."""
        return self.key.shape[2]

    @property
    def groups(self) -> int:
        """Key-value heads of all sequences."""
        return self.key.shape[0] * self.key.shape[1]

    @property
    def wide(self) -> int:
        """How often the registers that a chunk of keys takes double over those of half types and one gate per head."""
        return (self.log_decay.shape[3] > 1) + (self.key.dtype == torch.float32) if self.delta else 0

    @property
    def chunk(self) -> int:
        """Tokens to a chunk."""
        return max(CHANNEL_ROWS, min(CHUNK, KEYS // power(self.key.shape[3])) >> self.wide)

    @property
    def rows(self) -> int:
        """Tokens to a block of scores."""
        if self.log_decay.shape[3] > 1:
            return CHANNEL_ROWS
        return min(self.chunk, FLOAT32_ROWS) if self.key.dtype == torch.float32 else self.chunk

    @property
    def blocks(self) -> int:
        """Blocks of scores' rows to a sequence."""
        return -(-self.tokens // self.rows)

    @property
    def chunks(self) -> int:
        """Chunks to a sequence."""
        return -(-self.tokens // self.chunk)

    @property
    def gpu(self) -> Gpu:
        """The GPU that the call is for."""
        return gpu_of(self.key.device)

    def tile(self, kernel: str, default: Tile) -> Tile:
        """Return how to cut a kernel: the tuned tile for type, sizes and kind of gate, else ``default``."""
        _, _, _, width = self.key.shape
        kind = "head" if self.log_decay.shape[3] == 1 else "channel"
        rule = "delta" if self.delta else "gated"
        shape = f"{rule}-{kind}-{width}x{self.value.shape[3]}-{str(self.key.dtype).removeprefix('torch.')}"
        return tile(f"linear_memory.{kernel}", shape, default, self.key.device)

    def constants(self, names: str) -> dict[str, int | bool | str]:
        """Return the constants that a kernel asks for by name."""
        known: Mapping[str, int | bool | str] = {
            "G": self.key.shape[1],
            "R": self.query.shape[1] // self.key.shape[1],
            "K": self.key.shape[3],
            "V": self.value.shape[3],
            "CHANNELS": self.log_decay.shape[3],
            "DELTA": self.delta,
            "CHUNK": self.chunk,
            "ROWS": self.rows,
            "KEYS": power(self.key.shape[3]),
            "PRECISION": precision(self.gpu),
        }
        return {name: known[name] for name in names.split()}

    def run(
        self,
        kernel: str,
        grid: tuple[int, int],
        arguments: Mapping[str, Tensor],
        names: str,
        cut: Tile,
        **extra: int | bool,
    ) -> None:
        """Launch a kernel; the number of tokens follows its tensors."""
        launch(
            Launch(
                f"linear_memory.{kernel}",
                (*grid, 1),
                {**arguments, "T": self.tokens},
                {**self.constants(names), **extra, **cut.sizes},
                cut.warps,
                cut.stages,
            )
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return an uninitialised tensor."""
        return self.key.new_empty(shape, dtype=dtype)


def precision(gpu: Gpu) -> str:
    """Return how float32 products are taken: on NVIDIA's tensor cores as three each, which keeps the precision."""
    return "tf32x3" if gpu.name.startswith("nvidia") else "ieee"


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None,
) -> Call:
    """Make the arguments contiguous."""
    strength = key if beta is None else beta
    given = [x.contiguous() for x in (query, key, value, log_decay, positions, state, strength)]
    return Call(*given, delta=beta is not None)


def refuses(gpu: Gpu, *args: Any, update: str = "gated") -> str:
    """Return why the kernels do not take a call, "" where they do."""
    query, key, value, log_decay, _, state, beta = [*args, None][:7]
    if {query.dtype, key.dtype, value.dtype} != {query.dtype} or query.dtype not in FLOATS:
        return "query, key and value are not of one type among float32, bfloat16 and float16"
    if any(x is not None and x.dtype not in FLOATS for x in (log_decay, beta)):
        return "log_decay or beta is not float32, bfloat16 or float16"
    if state.dtype != torch.float32:
        return "the state is not float32"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"more than {WIDEST} channels to a head"
    if beta is not None and log_decay.shape[3] > 64 and key.dtype == torch.float32:
        return "the delta rule with gates per channel, in float32, of more than 64 channels"
    return "" if key.numel() and value.numel() else "no tokens"


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


def sweep(call: Call) -> Tile:
    """Return how to cut what steps from chunk to chunk."""
    values = 16 if call.wide else 32
    return Tile({"BV": min(values, power(call.value.shape[3]))}, 256 // call.gpu.warp, 1)


def block(call: Call) -> Tile:
    """Return how to cut what is done for all chunks at once."""
    keys, values, threads = (32, 32, 256) if call.key.dtype == torch.float32 else (64, 64, 128)
    if call.log_decay.shape[3] > 1:
        keys, values, threads = 16, 64 if call.delta else 32, 128
    return fitted(call, keys, values, threads)


def gradient_block(call: Call) -> Tile:
    """Return how to cut the gradient of keys, which holds most."""
    keys, values, threads = (16 if call.key.dtype == torch.float32 else 32, 32, 256)
    if call.log_decay.shape[3] > 1:
        keys, values, threads = 16, 16, 128
    return fitted(call, keys, values, threads)


def fitted(call: Call, keys: int, values: int, threads: int) -> Tile:
    """Return a tile that is not wider than the heads, of four warps at least."""
    sizes = {"BK": min(keys, power(call.key.shape[3])), "BV": min(values, power(call.value.shape[3]))}
    return Tile(sizes, max(4, threads // call.gpu.warp), 1)


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


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None = None,
    *,
    update: str = "gated",
) -> tuple[Tensor, Tensor]:
    """Run ``memc::linear_memory``; arguments and results as its dialect page has them."""
    call = prepare(query, key, value, log_decay, positions, state, beta)
    if call.tokens <= SHORT:
        return step(call, state.new_empty(state.shape))
    sums = gates(call)
    inverted = inverse(call, system(call, sums), by_row=False) if call.delta else call.key
    met, added, last = states(call, sums, inverted, call.key.dtype)
    values = value.shape[3]
    out = call.empty(*query.shape[:3], values, dtype=query.dtype)
    cut = call.tile("outputs", block(call))
    call.run(
        "outputs",
        (call.blocks * query.shape[0] * query.shape[1], -(-values // cut.sizes["BV"])),
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


def in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None = None,
    *,
    update: str = "gated",
) -> Tensor:
    """Run ``memc::linear_memory_``: the next state is written over ``state``."""
    call = prepare(query, key, value, log_decay, positions, state, beta)
    if call.tokens <= SHORT and call.state is state:
        return step(call, state)[0]
    out, last = forward(query, key, value, log_decay, positions, state, beta, update=update)
    state.copy_(last)
    return out


def backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None = None,
    *,
    update: str = "gated",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, log_decay, state and beta."""
    call = prepare(query, key, value, log_decay, positions, state, beta)
    grad_out, grad_state = grad_out.to(query.dtype).contiguous(), grad_state.contiguous()
    sums = gates(call)
    overlap = system(call, sums) if call.delta else call.key
    inverted = inverse(call, overlap, by_row=False) if call.delta else call.key
    met, added, _ = states(call, sums, inverted, torch.float32)
    if beta is None:
        grads, _, grad_first = states_back(call, sums, call.key, grad_out, call.value, grad_state)
        grad_value, grad_beta = grad_values(call, sums, grad_out, grads, value.dtype), torch.empty(0)
    else:
        pulled = grad_values(call, sums, grad_out, None, torch.float32)
        inverted = inverse(call, overlap, by_row=True)
        grads, right, grad_first = states_back(call, sums, inverted, grad_out, pulled, grad_state)
        strength = beta.masked_fill((positions < 0)[:, None], 0)
        grad_value = (right * strength[..., None]).to(value.dtype)
        grad_beta = (right * added).sum(-1).to(beta.dtype)
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


KERNELS = DeviceKernels(forward, refuses, backward, in_place)

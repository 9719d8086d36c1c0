"""A call of ``memc::linear_memory`` on a GPU: its sizes, and how its kernels are cut and launched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from memc.dialect.linear_memory import LinearMemory
from memc.kernels.launch import Gpu, Launch, Tile, gpu_of, launch, power_of_two, precision, tile

# Tokens to a chunk, and to a block of its scores: few where each channel has a gate, since the blocks on the diagonal
# are then computed term by term, and fewer in float32, for the registers that it takes.
CHUNK, CHANNEL_ROWS, FLOAT32_ROWS = 64, 16, 32
# The most that a program holds of keys, channels times tokens of a chunk; the delta rule, which needs them twice, has
# chunks half as long in float32, and half as long again with gates per channel.
KEYS = 8192


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
            "PRECISION": precision(self.key.device, torch.float32),
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


def prepare(args: LinearMemory) -> Call:
    """Make the arguments contiguous."""
    strength = args.key if args.beta is None else args.beta
    given = (args.query, args.key, args.value, args.log_decay, args.positions, args.state, strength)
    return Call(*(x.contiguous() for x in given), delta=args.beta is not None)


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

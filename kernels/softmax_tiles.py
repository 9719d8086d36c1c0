"""How the softmax kernels are cut on a GPU that nobody tuned on: as large as its registers and shared memory allow."""

from __future__ import annotations

from memc.kernels.launch import Gpu, Tile

_TILES: dict[tuple[str, int], dict[str, tuple[tuple[int, int, int, int], ...]]] = {
    ("nvidia", 2): {
        "prompt": ((128, 64, 8, 3), (64, 64, 8, 2), (64, 32, 8, 2)),
        "step": ((0, 64, 4, 3), (0, 64, 4, 2), (0, 32, 4, 2)),
        "query_gradient": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 4, 1)),
        "key_gradient": ((64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
    },
    ("nvidia", 4): {
        "prompt": ((32, 32, 4, 2), (16, 32, 4, 1), (16, 16, 4, 1)),
        "step": ((0, 32, 8, 2), (0, 32, 4, 1), (0, 16, 4, 1)),
        "query_gradient": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "key_gradient": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    ("amd", 2): {
        "prompt": ((128, 64, 4, 2), (64, 64, 4, 2), (64, 32, 8, 2)),
        "step": ((0, 64, 4, 2), (0, 64, 4, 2), (0, 32, 4, 2)),
        "query_gradient": ((64, 64, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        "key_gradient": ((32, 32, 4, 2), (32, 64, 4, 2), (16, 32, 4, 1)),
    },
    ("amd", 4): {
        "prompt": ((64, 32, 8, 2), (64, 32, 8, 1), (16, 32, 8, 1)),
        "step": ((0, 32, 4, 2), (0, 32, 4, 1), (0, 16, 4, 1)),
        "query_gradient": ((64, 32, 8, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
        "key_gradient": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    },
}
"""By vendor, bytes of a number, and kernel: queries, keys, warps, stages for heads of up to 64, 128, 256 channels."""


def default(kernel: str, size: int, itemsize: int, gpu: Gpu) -> Tile:
    """Return the tile of a kernel of ``memc::attention`` for heads of ``size`` channels of ``itemsize`` bytes."""
    vendor = "amd" if gpu.name.startswith("amd") else "nvidia"
    choices = _TILES[vendor, itemsize][kernel.removeprefix("attention.")]
    queries, keys, warps, stages = choices[(size > 64) + (size > 128)]
    sizes = {"block_queries": queries, "block_keys": keys} if queries else {"block_keys": keys}
    return Tile(sizes, warps, stages)

"""Launches of ``memc::rotary`` on a GPU."""

from __future__ import annotations

from torch import Tensor

from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Launch, Tile, launch, power_of_two, tile


def refuses(gpu: Gpu, x: Tensor, positions: Tensor, inv_freq: Tensor, **_: float | bool) -> str:
    """Take float types."""
    if x.dtype in FLOATS and inv_freq.dtype in FLOATS:
        return ""
    return f"types other than {', '.join(str(kind)[6:] for kind in FLOATS)}"


def forward(
    x: Tensor, positions: Tensor, inv_freq: Tensor, *, interleaved: bool = False, scaling: float = 1.0
) -> Tensor:
    """Run ``memc::rotary``; arguments and results as its dialect page has them."""
    x, positions = x.contiguous(), positions.contiguous()
    out = x.new_empty(x.shape)
    batch, heads, tokens, size = x.shape
    pairs = inv_freq.shape[0]
    if x.numel() == 0:
        return out
    # Short calls, those of a step among them, would leave most of a large block idle.
    block = min(power_of_two(tokens), max(1, 1024 // power_of_two(pairs)), 32)
    cut = tile("rotary.rotate", f"{size}x{block}", Tile({"tokens": block}, 4), x.device)
    launch(
        Launch(
            "rotary.rotate",
            (-(-tokens // cut.sizes["tokens"]), batch * heads, 1),
            {"x": x, "positions": positions, "inv_freq": inv_freq, "out": out, "heads": heads, "tokens": tokens},
            {
                "size": size,
                "pairs": pairs,
                "interleaved": interleaved,
                "scaling": scaling,
                "block_tokens": cut.sizes["tokens"],
                "block_pairs": power_of_two(pairs),
                "block_rest": power_of_two(max(1, size - 2 * pairs)),
            },
            cut.warps,
            cut.stages,
        )
    )
    return out


KERNELS = DeviceKernels(forward, refuses)

"""Launches of ``memc::rotary`` on a GPU."""

from __future__ import annotations

from torch import Tensor

from memc.dialect.rotary import Rotary
from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Launch, Tile, launch, power_of_two, tile


def refuses(gpu: Gpu, args: Rotary) -> str:
    """Take float types."""
    if args.x.dtype in FLOATS and args.inv_freq.dtype in FLOATS:
        return ""
    return f"types other than {', '.join(str(kind)[6:] for kind in FLOATS)}"


def forward(args: Rotary) -> Tensor:
    """Run ``memc::rotary``; arguments and results as its dialect page has them."""
    x, positions = args.x.contiguous(), args.positions.contiguous()
    out = x.new_empty(x.shape)
    batch, heads, tokens, size = x.shape
    pairs = args.inv_freq.shape[0]
    if x.numel() == 0:
        return out
    # Short calls, those of a step among them, would leave most of a large block idle.
    block = min(power_of_two(tokens), max(1, 1024 // power_of_two(pairs)), 32)
    cut = tile("rotary.rotate", f"{size}x{block}", Tile({"tokens": block}, 4), x.device)
    launch(
        Launch(
            "rotary.rotate",
            (-(-tokens // cut.sizes["tokens"]), batch * heads, 1),
            {
                "x": x,
                "positions": positions,
                "inv_freq": args.inv_freq,
                "out": out,
                "heads": heads,
                "tokens": tokens,
            },
            {
                "size": size,
                "pairs": pairs,
                "interleaved": args.interleaved,
                "scaling": args.scaling,
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

"""Launches of ``memc::norm`` on a GPU."""

from __future__ import annotations

from torch import Tensor

from memc.dialect.norm import Norm
from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Launch, Tile, launch, power_of_two, tile

LARGEST = 32_768
"""Most channels that a program holds at once."""


def refuses(gpu: Gpu, args: Norm) -> str:
    """Take rows of float types that a program can hold."""
    if any(x.dtype not in FLOATS for x in (args.x, args.weight, args.bias) if x is not None):
        return f"types other than {', '.join(str(kind)[6:] for kind in FLOATS)}"
    return "" if args.x.shape[-1] <= LARGEST else f"rows of more than {LARGEST} channels"


def forward(args: Norm) -> Tensor:
    """Run ``memc::norm``; arguments and results as its dialect page has them."""
    x = args.x.contiguous()
    out, size = x.new_empty(x.shape), x.shape[-1]
    rows = x.numel() // size
    if rows == 0:
        return out
    block = power_of_two(size)
    cut = tile("norm.normalise", str(size), Tile({"rows": max(1, 1024 // block)}, 4 if block <= 4096 else 8), x.device)
    launch(
        Launch(
            "norm.normalise",
            (-(-rows // cut.sizes["rows"]), 1, 1),
            {
                "x": x,
                "weight": x if args.weight is None else args.weight.contiguous(),
                "bias": x if args.bias is None else args.bias.contiguous(),
                "out": out,
                "rows": rows,
            },
            {
                "size": size,
                "eps": args.eps,
                "center": args.center,
                "weighted": args.weight is not None,
                "biased": args.bias is not None,
                "block_rows": cut.sizes["rows"],
                "block_size": block,
            },
            cut.warps,
            cut.stages,
        )
    )
    return out


KERNELS = DeviceKernels(forward, refuses)

"""Host code of ``memc::bank_ffn`` on a GPU: the hidden units, then what they spread."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from memc.dialect.bank_ffn import BankFeedForward
from memc.kernels.launch import FLOATS, DeviceKernels, Gpu, Launch, Tile, launch, precision, tile


def refuses(gpu: Gpu, args: BankFeedForward) -> str:
    """Return why the kernels do not take a call; "" where they do."""
    other = next((x.dtype for x in (args.x, args.block) if x.dtype not in FLOATS), None)
    if other is not None:
        return f"{other} values"
    return "" if args.x.numel() and args.block.numel() else "a call without tokens"


def forward(args: BankFeedForward) -> Tensor:
    """Run ``memc::bank_ffn``; arguments and results as its dialect page has them."""
    x, block = args.x.contiguous(), args.block.contiguous()
    rows = x.new_empty(x.shape[0], 1, x.shape[1], block.shape[2], dtype=_between(x))
    _rows("hidden", rows, {"x": x, "block": block}, args.activation)
    return _spread(rows, x, block, first=2)


def backward(args: BankFeedForward, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``x`` and ``block``."""
    x, block, grad = args.x.contiguous(), args.block.contiguous(), grad_out.contiguous()
    (batch, tokens, width), units = x.shape, block.shape[2]
    # Of the gate, of the up projection, and what the down projection has read.
    rows = x.new_empty(batch, 3, tokens, units, dtype=_between(x))
    _rows("hidden_gradient", rows, {"grad": grad, "x": x, "block": block}, args.activation)
    grad_block = block.new_empty(block.shape)
    cut = _cut("block_gradient", x)
    grid = (-(-width // cut.sizes["block_width"]), -(-units // cut.sizes["block_units"]), 3 * batch)
    arguments = {"out": grad_block, "rows": rows, "x": x, "grad": grad}
    _launch("block_gradient", grid, arguments, tokens, cut, {"units": units, "width": width})
    return _spread(rows, x, block, first=0), grad_block


def _between(x: Tensor) -> torch.dtype:
    """Return the type of what is between the products: not float16, whose range a product of two soon leaves."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _rows(kernel: str, rows: Tensor, arguments: dict[str, Tensor], activation: str) -> None:
    """Fill ``rows [B,.,T,R]`` with what is computed for each token and unit."""
    x = arguments["x"]
    (batch, tokens, width), units = x.shape, rows.shape[3]
    cut = _cut(kernel, x)
    grid = (-(-units // cut.sizes["block_units"]), -(-tokens // cut.sizes["block_tokens"]), batch)
    constants: dict[str, int | float | bool | str] = {"units": units, "width": width, "activation": activation}
    _launch(kernel, grid, {"out": rows, **arguments}, tokens, cut, constants)


def _spread(rows: Tensor, x: Tensor, block: Tensor, *, first: int) -> Tensor:
    """Return ``[B,T,C]``, the sum of rows times matrices of the block: from the gate on, or the down projection."""
    (batch, tokens, width), units = x.shape, block.shape[2]
    out = x.new_empty(x.shape)
    cut = _cut("spread", x)
    grid = (-(-width // cut.sizes["block_width"]), -(-tokens // cut.sizes["block_tokens"]), batch)
    constants = {"units": units, "width": width, "parts": 1 if first else 2, "first": first}
    _launch("spread", grid, {"out": out, "rows": rows, "block": block}, tokens, cut, constants)
    return out


def _launch(
    kernel: str,
    grid: tuple[int, int, int],
    arguments: Mapping[str, Tensor],
    tokens: int,
    cut: Tile,
    constants: Mapping[str, int | float | bool | str],
) -> None:
    how = precision(arguments["out"].device, *(x.dtype for name, x in arguments.items() if name != "out"))
    constants = {**constants, "precision": how, **cut.sizes}
    launch(Launch(f"bank_ffn.{kernel}", grid, {**arguments, "tokens": tokens}, constants, cut.warps, cut.stages))


def _cut(kernel: str, x: Tensor) -> Tile:
    """Return a tile: one token, which is a row of sixteen to a matrix product, reads long pieces of the weights."""
    tokens, kind = x.shape[1], str(x.dtype).removeprefix("torch.")
    wide = x.dtype == torch.float32
    rows = 16 if tokens == 1 else 32 if wide else 64
    sizes = {"block_tokens": rows, "block_units": 32 if wide else 64, "block_width": 32 if wide else 64}
    return tile(f"bank_ffn.{kernel}", f"{'step' if tokens == 1 else 'prompt'}-{kind}", Tile(sizes, 8, 2), x.device)


KERNELS = DeviceKernels(forward, refuses, backward)

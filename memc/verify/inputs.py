"""What a program is run on when it is verified: tokens, their positions, and anything else drawn from them."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor
from torch.fx import Node

from memc.program import InputSpec, Program

aten = torch.ops.aten

_SAME_VALUES = (aten.view.default, aten.reshape.default, aten.slice.Tensor, aten.clone.default, aten._to_copy.default)


def positions_of(tokens: Tensor, start: int = 0) -> Tensor:
    """Return the positions ``[B, T]`` of ``tokens [B, T]`` whose first one is at ``start``."""
    return torch.arange(start, start + tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()


def inputs_of(program: Program, tokens: Tensor, *, fetch: bool = False) -> tuple[Tensor, ...]:
    """Return every input of a program but its states, for sequences of ``tokens [B, T]`` that start at position 0.

    What is fetched is zero, as where nothing is; with ``fetch`` it is drawn, small enough that a network of it gives
    about what it is given. What is neither that nor tokens nor positions (pixels, a decoder's tokens, masks) is drawn
    uniformly: floats from -1 to 1, integers below what the table that they look up in has, 0 or 1 where they look up in
    none. The draw is a function of the tokens, so that the same tokens give the same inputs to every program with these
    inputs.
    """
    batch, length = tokens.shape
    sizes = {"B": batch, "T": length, "U": length // 2 + 1}  # never past T, but where T is 1
    generator = torch.Generator().manual_seed(zlib.crc32(tokens.contiguous().numpy().tobytes()))
    made = []
    for node, spec in zip(program.placeholders(), program.inputs, strict=False):
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        match spec.role:
            case "tokens":
                made.append(tokens.to(spec.dtype))
            case "positions":
                made.append(positions_of(tokens).to(spec.dtype))
            case "fetched" if fetch:
                made.append(shape[-1] ** -0.5 * _drawn(spec, shape, 2, generator))
            case "fetched":
                made.append(torch.zeros(shape, dtype=spec.dtype))
            case "other":
                made.append(_drawn(spec, shape, rows_read(program, node) or 2, generator))
    return tuple(made)


def _drawn(spec: InputSpec, shape: list[int], limit: int, generator: torch.Generator) -> Tensor:
    if spec.dtype.is_floating_point:
        return (2 * torch.rand(shape, generator=generator) - 1).to(spec.dtype)
    return torch.randint(2 if spec.dtype == torch.bool else limit, shape, generator=generator).to(spec.dtype)


def token_limit(program: Program) -> int:
    """Return one more than the largest token that a program takes: what its tables have, a decoder's logits cover."""
    node = next((n for n, s in zip(program.placeholders(), program.inputs, strict=False) if s.role == "tokens"), None)
    limits = [program.model.vocab_size, rows_read(program, node) if node is not None else None]
    if program.model.decoder:
        limits.append(int(program.outputs[0].shape[-1]))
    return min((limit for limit in limits if limit), default=2)


def rows_read(program: Program, source: Node) -> int | None:
    """Return the rows of the smallest table that an input looks up in as it is, None when it does not."""
    rows: list[int] = []
    for user in source.users:
        if user.target is aten.embedding.default and user.args[1] is source:
            table = user.args[0]
            assert isinstance(table, Node)
            rows.append(int(table.meta["val"].shape[0]))
        elif user.target in _SAME_VALUES:
            rows += filter(None, [rows_read(program, user)])
    return min(rows, default=None)

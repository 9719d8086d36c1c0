"""``memc::linear_memory`` and its gradient: padding, grouping of heads, and cutting into slabs of chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.dialect.linear_memory import LinearMemory
from memc.kernels.common import accumulation_type
from memc.kernels.linear_memory.chunked import Tokens, run, run_backward
from memc.kernels.linear_memory.reference import gates, loop

# Calls of at most this many tokens go token by token.
SHORT = 4
# Tokens to a chunk: per-channel gates need a [C, C, K] table of decays, scalar ones only [C, C].
CHANNEL_CHUNK, SCALAR_CHUNK = 16, 64
# Tokens that are worked on at once: bounds memory, however long the call.
SLAB = 256


@dataclass(frozen=True)
class Call:
    """The arguments of one call in the accumulation type; padding has query and key 0, and gate 1."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    state: Tensor
    beta: Tensor | None

    def slabs(self) -> list[Tokens]:
        """Cut the call into slabs of chunks, the last one padded to whole chunks."""
        tokens = self.key.shape[2]
        return [self._slab(start, min(start + SLAB, tokens)) for start in range(0, tokens, SLAB)]

    def _slab(self, start: int, stop: int) -> Tokens:
        size = self.chunk
        rest = -(stop - start) % size
        beta = None if self.beta is None else chunks(self.beta[:, :, start:stop, None], size, rest).squeeze(-1)
        return Tokens(
            chunks(self.query[:, :, :, start:stop], size, rest).transpose(2, 3),
            chunks(self.key[:, :, start:stop], size, rest),
            chunks(self.value[:, :, start:stop], size, rest),
            chunks(self.gate[:, :, start:stop], size, rest, 1.0),
            beta,
        )

    @property
    def chunk(self) -> int:
        """Tokens to a chunk."""
        size = SCALAR_CHUNK if self.gate.shape[3] == 1 else CHANNEL_CHUNK
        return min(size, self.key.shape[2])


def chunks(x: Tensor, size: int, rest: int, fill: float = 0.0) -> Tensor:
    """Cut ``x [...,T,D]`` into ``[...,n,C,D]``, ``rest`` rows of ``fill`` added at the end."""
    return torch.nn.functional.pad(x, (0, 0, 0, rest), value=fill).view(*x.shape[:-2], -1, size, x.shape[-1])


def prepare(args: LinearMemory) -> Call:
    """Group the heads, widen the types and blank the padding."""
    kind = torch.promote_types(accumulation_type(args.query), args.state.dtype)
    padding = (args.positions < 0)[:, None, :, None]
    batch, groups = args.key.shape[:2]
    return Call(
        args.query.to(kind).masked_fill(padding, 0).reshape(batch, groups, -1, *args.query.shape[2:]),
        args.key.to(kind).masked_fill(padding, 0),
        args.value.to(kind),
        gates(args.log_decay.to(kind), args.positions),
        args.state.to(kind),
        None if args.beta is None else args.beta.to(kind),
    )


def forward(args: LinearMemory) -> tuple[Tensor, Tensor]:
    """Run ``memc::linear_memory``; arguments and results as its dialect page has them."""
    call = prepare(args)
    tokens = args.key.shape[2]
    if tokens <= SHORT:
        out, memory = loop(call.query, call.key, call.value, call.gate, call.state, call.beta)
    else:
        memory, parts = call.state, []
        for slab in call.slabs():
            part, memory = run(slab, memory)
            parts.append(part.transpose(2, 3).flatten(3, 4))
        out = torch.cat(parts, 3)[:, :, :, :tokens]
    return out.flatten(1, 2).to(args.query.dtype).contiguous(), memory.to(args.state.dtype).contiguous()


def backward(args: LinearMemory, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, log_decay, state and beta."""
    call = prepare(args)
    slabs, met = call.slabs(), [call.state]
    for slab in slabs[:-1]:
        met.append(run(slab, met[-1])[1])
    grad = grad_out.to(call.state.dtype).reshape(args.key.shape[0], args.key.shape[1], -1, *grad_out.shape[2:])
    grad_memory, pieces = grad_state.to(call.state.dtype), []
    for number in reversed(range(len(slabs))):
        start, stop = number * SLAB, min((number + 1) * SLAB, args.key.shape[2])
        part = chunks(grad[:, :, :, start:stop], call.chunk, -(stop - start) % call.chunk).transpose(2, 3)
        piece, grad_memory = run_backward(slabs[number], met[number], part, grad_memory)
        pieces.append(piece)
    pieces.reverse()

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(-3, -2) for part in parts], -2)[..., : args.key.shape[2], :]

    padding, undecayed = (args.positions < 0)[:, None, :, None], (args.positions <= 0)[:, None, :, None]
    grad_query = joined([piece.query.transpose(2, 3) for piece in pieces]).flatten(1, 2).masked_fill(padding, 0)
    grad_beta = None
    if args.beta is not None:
        grad_beta = joined([piece.beta.unsqueeze(-1) for piece in pieces if piece.beta is not None]).squeeze(-1)
    return (
        grad_query,
        joined([piece.key for piece in pieces]).masked_fill(padding, 0),
        joined([piece.value for piece in pieces]),
        joined([piece.log_gate for piece in pieces]).masked_fill(undecayed, 0),
        grad_memory,
        grad_beta,
    )

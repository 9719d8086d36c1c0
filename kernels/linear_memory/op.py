"""``memc::linear_memory`` and its gradient: padding, grouping of heads, and cutting into slabs of chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.kernels.common import accumulation_type, cast_like
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


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None,
) -> Call:
    """Group the heads, widen the types and blank the padding."""
    kind = torch.promote_types(accumulation_type(query), state.dtype)
    padding = (positions < 0)[:, None, :, None]
    groups = key.shape[1]
    return Call(
        query.to(kind).masked_fill(padding, 0).reshape(key.shape[0], groups, -1, *query.shape[2:]),
        key.to(kind).masked_fill(padding, 0),
        value.to(kind),
        gates(log_decay.to(kind), positions),
        state.to(kind),
        None if beta is None else beta.to(kind),
    )


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
    tokens = key.shape[2]
    if tokens <= SHORT:
        out, memory = loop(call.query, call.key, call.value, call.gate, call.state, call.beta)
    else:
        memory, parts = call.state, []
        for slab in call.slabs():
            part, memory = run(slab, memory)
            parts.append(part.transpose(2, 3).flatten(3, 4))
        out = torch.cat(parts, 3)[:, :, :, :tokens]
    return out.flatten(1, 2).to(query.dtype).contiguous(), memory.to(state.dtype).contiguous()


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
    slabs, met = call.slabs(), [call.state]
    for slab in slabs[:-1]:
        met.append(run(slab, met[-1])[1])
    grad = grad_out.to(call.state.dtype).reshape(key.shape[0], key.shape[1], -1, *grad_out.shape[2:])
    grad_memory, pieces = grad_state.to(call.state.dtype), []
    for number in reversed(range(len(slabs))):
        start, stop = number * SLAB, min((number + 1) * SLAB, key.shape[2])
        part = chunks(grad[:, :, :, start:stop], call.chunk, -(stop - start) % call.chunk).transpose(2, 3)
        piece, grad_memory = run_backward(slabs[number], met[number], part, grad_memory)
        pieces.append(piece)
    pieces.reverse()

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(-3, -2) for part in parts], -2)[..., : key.shape[2], :]

    padding, undecayed = (positions < 0)[:, None, :, None], (positions <= 0)[:, None, :, None]
    grad_query = joined([piece.query.transpose(2, 3) for piece in pieces]).flatten(1, 2).masked_fill(padding, 0)
    grad_beta = None
    if beta is not None:
        grad_beta = joined([piece.beta.unsqueeze(-1) for piece in pieces if piece.beta is not None]).squeeze(-1)
    return (
        cast_like(grad_query, query),
        cast_like(joined([piece.key for piece in pieces]).masked_fill(padding, 0), key),
        cast_like(joined([piece.value for piece in pieces]), value),
        cast_like(joined([piece.log_gate for piece in pieces]).masked_fill(undecayed, 0), log_decay),
        cast_like(grad_memory, state),
        cast_like(grad_beta, beta),
    )

"""``memc::linear_memory`` by chunks: matrix products within a chunk, one small step from chunk to chunk.

Every decay is a product of gates in [0, 1], never the exponential of a difference of sums: nothing overflows however
strong a gate is, nothing cancels, and a gate of 0 is allowed, which is how a sequence start clears the state.
The maths is on the folder's page. Sizes: n chunks of C tokens, R query heads to a key-value head, C' = K or 1 gate
channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """A piece of a sequence, cut into chunks.

    ``query [B,G,n,R,C,K]``, ``key [B,G,n,C,K]``, ``value [B,G,n,C,V]``, ``gate [B,G,n,C,C']``, ``beta [B,G,n,C]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor
    beta: Tensor | None


@dataclass(frozen=True)
class Local:
    """What a chunk knows without the state that it meets.

    ``decay [B,G,n,C,C,C']`` from column to row (0 above the diagonal), ``head [B,G,n,C,C']`` from the chunk's start to
    each token, ``tail`` from each token to the chunk's end, ``through [B,G,n,C']`` over the whole chunk;
    ``scores [B,G,n,R,C,C]`` of queries and keys. What the tokens add is ``written`` minus ``erased`` times the state;
    the delta rule has these from the system ``mixer [B,G,n,C,C]``, made of the keys' own ``overlap``.
    """

    decay: Tensor
    head: Tensor
    tail: Tensor
    through: Tensor
    scores: Tensor
    written: Tensor
    erased: Tensor | None = None
    mixer: Tensor | None = None
    overlap: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of :class:`Tokens`, field by field, with ``log_gate`` that of the gate's logarithm."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_gate: Tensor
    beta: Tensor | None


def scores(rows: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
    """Return sum_c rows[r,i,c] columns[j,c] decay[i,j,c] as ``[...,R,C,C]``."""
    if decay.shape[-1] == 1:
        return torch.matmul(rows, columns.unsqueeze(-3).mT) * decay.squeeze(-1).unsqueeze(-3)
    return torch.einsum("...ric,...ijc->...rij", rows, decay * columns.unsqueeze(-3))


def scores_to_rows(grad: Tensor, columns: Tensor, decay: Tensor) -> Tensor:
    """Return the gradient ``[...,R,C,K]`` of the rows of :func:`scores`."""
    if decay.shape[-1] == 1:
        return torch.matmul(grad * decay.squeeze(-1).unsqueeze(-3), columns.unsqueeze(-3))
    return torch.einsum("...rij,...ijc->...ric", grad, decay * columns.unsqueeze(-3))


def scores_to_columns(grad: Tensor, rows: Tensor, decay: Tensor) -> Tensor:
    """Return the gradient ``[...,C,K]`` of the columns of :func:`scores`."""
    if decay.shape[-1] == 1:
        return torch.matmul((grad * decay.squeeze(-1).unsqueeze(-3)).mT, rows).sum(-3)
    return (torch.einsum("...rij,...ric->...ijc", grad, rows) * decay).sum(-3)


def decays(gate: Tensor) -> Tensor:
    """Return decay[i, j] = gate[j + 1] ... gate[i] as ``[B,G,n,C,C,C']``: 1 on the diagonal, 0 above."""
    batch, groups, count, size, channels = gate.shape
    decay = gate.new_zeros(batch, groups, count, size, size, channels)
    for i in range(size):
        decay[:, :, :, i, i] = 1
        torch.mul(decay[:, :, :, i - 1, :i], gate[:, :, :, i : i + 1], out=decay[:, :, :, i, :i])
    return decay


def prepare(x: Tokens) -> Local:
    """Compute what does not depend on the state."""
    size = x.gate.shape[3]
    decay = decays(x.gate)
    head = x.gate.cumprod(3)
    local = Local(decay, head, decay[:, :, :, -1], head[:, :, :, -1], scores(x.query, x.key, decay), x.value)
    if x.beta is None:
        return local
    strength = x.beta.unsqueeze(-1)
    overlap = scores(x.key.unsqueeze(3), x.key, decay).squeeze(3).tril(-1)
    mixer = strength * overlap + torch.eye(size, dtype=overlap.dtype, device=overlap.device)
    right = torch.cat([strength * x.value, strength * x.key * head], -1)
    solved = torch.linalg.solve_triangular(mixer, right, upper=False, unitriangular=True)
    written, erased = solved.split([x.value.shape[-1], x.key.shape[-1]], -1)
    return Local(*_first(local), written, erased, mixer, overlap)


def _first(x: Local) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return x.decay, x.head, x.tail, x.through, x.scores


def sweep(x: Tokens, local: Local, state: Tensor) -> tuple[Tensor, Tensor]:
    """Step from chunk to chunk: return the state that each chunk meets ``[B,G,n,K,V]``, and the last."""
    keys = (x.key * local.tail).mT
    added = torch.matmul(keys, local.written)
    met = []
    for c in range(x.key.shape[2]):
        met.append(state)
        gain = added[:, :, c]
        if local.erased is not None:
            gain = gain - torch.matmul(keys[:, :, c], torch.matmul(local.erased[:, :, c], state))
        state = local.through[:, :, c, :, None] * state + gain
    return torch.stack(met, 2), state


def writes(local: Local, met: Tensor) -> Tensor:
    """Return what each token adds along its key ``[B,G,n,C,V]``."""
    return local.written if local.erased is None else local.written - torch.matmul(local.erased, met)


def run(x: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output ``[B,G,n,R,C,V]`` and the next state."""
    local = prepare(x)
    met, state = sweep(x, local, state)
    out = torch.matmul(x.query * local.head.unsqueeze(3), met.unsqueeze(3))
    return out + torch.matmul(local.scores, writes(local, met).unsqueeze(3)), state


def run_backward(x: Tokens, state: Tensor, grad_out: Tensor, grad_state: Tensor) -> tuple[Gradients, Tensor]:
    """Return the gradients of a piece that met ``state``, and of that state."""
    local = prepare(x)
    met, _ = sweep(x, local, state)
    added = writes(local, met)
    grad_scores = torch.matmul(grad_out, added.unsqueeze(3).mT).tril()
    from_output = torch.matmul(local.scores.mT, grad_out).sum(3)
    grad_next, grad_added, grad_right, grad_state = _sweep_back(x, local, from_output, grad_out, grad_state)

    head, tail = local.head, local.tail
    grad_query = scores_to_rows(grad_scores, x.key, local.decay)
    grad_query = grad_query + torch.matmul(grad_out, met.unsqueeze(3).mT) * head.unsqueeze(3)
    to_end = torch.matmul(added, grad_next.mT) * tail
    as_column = scores_to_columns(grad_scores, x.query, local.decay) + to_end
    as_row = torch.zeros_like(x.key)
    grad_value, grad_beta = grad_added, None
    if grad_right is not None and x.beta is not None and local.overlap is not None:
        grad_value = x.beta.unsqueeze(-1) * grad_right
        error = x.value - torch.matmul(x.key * head, met) - torch.matmul(local.overlap, added)
        grad_beta = (grad_right * error).sum(-1)
        grad_overlap = -torch.matmul(grad_value, added.mT).tril(-1).unsqueeze(3)
        as_row = scores_to_rows(grad_overlap, x.key, local.decay).squeeze(3)
        as_row = as_row - torch.matmul(grad_value, met.mT) * head
        as_column = as_column + scores_to_columns(grad_overlap, x.key.unsqueeze(3), local.decay)
    # A row's decay grows with its cumulative log gate, a column's shrinks; what reaches the end grows with the last.
    total = (x.query * grad_query).sum(3) + x.key * (as_row - as_column)
    last = (x.key * to_end).sum(3) + local.through * (met * grad_next).sum(-1)
    total = torch.cat([total[:, :, :, :-1], total[:, :, :, -1:] + last.unsqueeze(3)], 3)
    if x.gate.shape[-1] == 1:
        total = total.sum(-1, keepdim=True)
    log_gate = total.flip(3).cumsum(3).flip(3)
    return Gradients(grad_query, as_row + as_column, grad_value, log_gate, grad_beta), grad_state


def _sweep_back(
    x: Tokens, local: Local, from_output: Tensor, grad_out: Tensor, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Step back from chunk to chunk.

    Returns the gradients of the state after each chunk, of what each token adds, of the right-hand side of the delta
    rule's system (None without), and of the state that the first chunk met.
    """
    keys = x.key * local.tail
    reads = (x.query * local.head.unsqueeze(3)).mT
    from_reads = torch.matmul(reads, grad_out).sum(3)
    erasing = None if x.beta is None else (x.beta.unsqueeze(-1) * x.key * local.head).mT
    nexts, solved = [], []
    for c in reversed(range(x.key.shape[2])):
        nexts.append(grad_state)
        back = local.through[:, :, c, :, None] * grad_state + from_reads[:, :, c]
        if local.mixer is not None and erasing is not None:
            grad_added = from_output[:, :, c] + torch.matmul(keys[:, :, c], grad_state)
            upper = local.mixer[:, :, c].mT
            solved.append(torch.linalg.solve_triangular(upper, grad_added, upper=True, unitriangular=True))
            back = back - torch.matmul(erasing[:, :, c], solved[-1])
        grad_state = back
    grad_next = torch.stack(nexts[::-1], 2)
    grad_right = torch.stack(solved[::-1], 2) if solved else None
    return grad_next, from_output + torch.matmul(keys, grad_next), grad_right, grad_state

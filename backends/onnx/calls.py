"""Calls of the ONNX functions as graph nodes: each tells torch.export the types and shapes that come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DOMAIN = "memc"

LINEAR = "Linear"
"""Marker of a linear layer over a stored matrix; the file never holds it."""


def _call(
    name: str, inputs: Sequence[Tensor | None], *outputs: tuple[torch.dtype, Sequence[int | torch.SymInt]]
) -> list[Tensor]:
    dtypes = [dtype for dtype, _ in outputs]
    shapes = [list(shape) for _, shape in outputs]
    return list(torch.onnx.ops.symbolic_multi_out(f"{DOMAIN}::{name}", inputs, dtypes=dtypes, shapes=shapes, version=1))


def rotary_plan(name: str, positions: Tensor, inv_freq: Tensor) -> list[Tensor]:
    """Cosine and sine ``[B,T,R/2]``."""
    shape = [*positions.shape, inv_freq.shape[0]]
    return _call(name, [positions, inv_freq], (torch.float32, shape), (torch.float32, shape))


def like_first(name: str, *inputs: Tensor) -> Tensor:
    """One output with the shape of the first input (rotary, norm, bank)."""
    return _call(name, inputs, (torch.float32, inputs[0].shape))[0]


def skip_norm(name: str, a: Tensor, b: Tensor, weight: Tensor) -> list[Tensor]:
    """The normalised sum and the sum, with the shape of ``a``."""
    return _call(name, [a, b, weight], (torch.float32, a.shape), (torch.float32, a.shape))


def full_attention(name: str, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
    """Output ``[B,H,T,E]``."""
    return _call(name, [query, key, value, *rest], (torch.float32, [*query.shape[:3], value.shape[3]]))[0]


def attention_plan(name: str, positions: Tensor, buffer: Tensor) -> list[Tensor]:
    """Mask, index, used, shape, distance, whole, query shape; how many slots are read is known at run time only."""
    batch, tokens = positions.shape
    capacity = buffer.shape[2]
    return _call(
        name,
        [positions, buffer],
        (torch.bool, [batch, 1, tokens, capacity]),
        (torch.int64, [batch, buffer.shape[1], tokens, 3]),
        (torch.int64, [1]),
        (torch.int64, [4]),
        (torch.float32, [batch, 1, tokens, capacity]),
        (torch.bool, []),
        (torch.int64, [4]),
    )


def attention(
    name: str, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *plan: Tensor
) -> list[Tensor]:
    """Output ``[B,H,T,E]`` and the buffers."""
    out = [*query.shape[:3], value.shape[3]]
    inputs = [query, key, value, past_key, past_value, *plan]
    return _call(name, inputs, (torch.float32, out), (torch.float32, past_key.shape), (torch.float32, past_value.shape))


def sparse_plan(name: str, positions: Tensor, by_level: bool, buffer: Tensor, pages: Tensor) -> list[Tensor]:
    """What ``sparse.planned`` names; counts are known at run time only."""
    batch, tokens = positions.shape
    groups, capacity = buffer.shape[1], buffer.shape[2]
    scalar: list[int] = []
    one, flag, column = (torch.int64, [1]), (torch.bool, scalar), (torch.bool, [batch, 1, tokens, 1])
    index = (torch.int64, [batch, groups, tokens, 3])
    slots = (torch.int64, [batch, groups, tokens, 1])
    mask = (torch.bool, [batch, 1, tokens, capacity])
    page_index = (torch.int64, [batch, groups, tokens, 4]) if by_level else index
    above = (slots,) if by_level else ()
    outputs = (index, slots, page_index, one, one, one, flag, flag, one, mask, column, column, *above)
    return _call(name, [positions, buffer, pages], *outputs)


def sparse_attention(
    name: str, lse: bool, query: Tensor, key: Tensor, value: Tensor, past: Sequence[Tensor], *plan: Tensor
) -> list[Tensor]:
    """Output ``[B,H,T,E]``, the log-sum-exp ``[B,H,T]`` when asked for, and the next states, as ``past``."""
    return _call(
        name,
        [query, key, value, *past, *plan],
        (torch.float32, [*query.shape[:3], value.shape[3]]),
        *([(torch.float32, query.shape[:3])] if lse else []),
        *((state.dtype, state.shape) for state in past),
    )


def events(name: str, logits: Tensor, tokens: Tensor, positions: Tensor, key: Tensor, *past: Tensor) -> list[Tensor]:
    """The surprises ``[B,T]`` and the next states, as ``past``."""
    surprise = (torch.float32, positions.shape)
    return _call(name, [logits, tokens, positions, key, *past], surprise, *((x.dtype, x.shape) for x in past))


def quantised_plan(name: str, positions: Tensor, buffer: Tensor, pages: Tensor) -> list[Tensor]:
    """What ``quantised.PLAN`` names; counts are known at run time only."""
    batch, tokens = positions.shape
    groups = buffer.shape[1]
    scalar: list[int] = []
    one, index = (torch.int64, [1]), (torch.int64, [batch, groups, tokens, 3])
    slots, row = (torch.int64, [batch, groups, tokens, 1]), (torch.int64, [batch, 1])
    outputs = (
        *(index, index, index, slots, (torch.int64, [batch, groups, 1, 1])),
        *(row, (torch.int64, [batch, 1, 1, tokens]), (torch.bool, [batch, 1, 1, 1])),
        *((torch.bool, [batch, 1, tokens, 1]), one, (torch.bool, scalar)),
    )
    return _call(name, [positions, buffer, pages], *outputs)


def window_plan(name: str, positions: Tensor, past: Tensor, groups: int) -> list[Tensor]:
    """Mask, index, source, next held positions, shape, distance, live, query shape."""
    batch, tokens = positions.shape
    slots = past.shape[1]
    return _call(
        name,
        [positions, past],
        (torch.bool, [batch, 1, tokens, slots + tokens]),
        (torch.int64, [batch, groups, tokens, 3]),
        (torch.int64, [batch, groups, tokens, 1]),
        (torch.int64, past.shape),
        (torch.int64, [4]),
        (torch.float32, [batch, 1, tokens, slots + tokens]),
        (torch.bool, [batch, 1, tokens, 1]),
        (torch.int64, [4]),
    )


def window_memory(
    name: str,
    lse: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    *plan: Tensor,
) -> list[Tensor]:
    """Output ``[B,H,T,E]``, the log-sum-exp ``[B,H,T]`` when asked for, [held; new] keys and values, next state."""
    batch, groups, tokens, _ = key.shape
    shapes = [[batch, groups, past.shape[2] + tokens, past.shape[3]] for past in (past_key, past_value)]
    return _call(
        name,
        [query, key, value, past_key, past_value, *plan],
        (torch.float32, [*query.shape[:3], value.shape[3]]),
        *([(torch.float32, query.shape[:3])] if lse else []),
        *((torch.float32, shape) for shape in shapes),
        (torch.float32, past_key.shape),
        (torch.float32, past_value.shape),
    )


def window_left_plan(name: str, positions: Tensor, past: Tensor, groups: int) -> list[Tensor]:
    """Position, index, found."""
    batch, tokens = positions.shape
    return _call(
        name,
        [positions, past],
        (torch.int64, [batch, tokens]),
        (torch.int64, [batch, groups, tokens, 1]),
        (torch.bool, [batch, 1, tokens, 1]),
    )


def window_left(name: str, keys: Tensor, values: Tensor, index: Tensor, found: Tensor) -> list[Tensor]:
    """Key and value of the token that leaves."""
    shapes = [[*index.shape[:3], held.shape[3]] for held in (keys, values)]
    return _call(name, [keys, values, index, found], *((torch.float32, shape) for shape in shapes))


def linear_plan(name: str, positions: Tensor) -> list[Tensor]:
    """Live, fades and fixed ``[B,T,1,1]``."""
    shape = [*positions.shape, 1, 1]
    return _call(name, [positions], (torch.bool, shape), (torch.bool, shape), (torch.float32, shape))


def linear_memory(
    name: str, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: Tensor, *plan: Tensor
) -> list[Tensor]:
    """Output ``[B,H,T,V]`` and the next state."""
    out = [*query.shape[:3], value.shape[3]]
    return _call(name, [query, key, value, log_decay, state, *plan], (torch.float32, out), (torch.float32, state.shape))


def linear(turned: bool, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` times ``weight [out, in]``, or ``[in, out]`` when ``turned``, plus ``bias [out]``."""
    out = weight.shape[1] if turned else weight.shape[0]
    inputs = [x, weight] if bias is None else [x, weight, bias]
    shape = [*x.shape[:-1], out]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{LINEAR}", inputs, {"turned": int(turned)}, dtype=torch.float32, shape=shape, version=1
    )

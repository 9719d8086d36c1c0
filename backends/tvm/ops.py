"""The backend's own functions as torch ops: each tells torch.export the types and shapes that come out, and no more.

They are of a namespace of their own and their names begin with ``tvm_``: the importer looks converters up by the bare
name, in which ops of two namespaces would collide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "memc_tvm"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(f"tvm_{fake.__name__}{schema}")
        torch.library.register_fake(f"{NAMESPACE}::tvm_{fake.__name__}", fake)
        overload: Callable[..., Any] = getattr(torch.ops.memc_tvm, f"tvm_{fake.__name__}").default
        return overload

    return decorate


@_define("(Tensor x, Tensor[] weight, Tensor? bias, int out) -> Tensor")
def linear(x: Tensor, weight: list[Tensor], bias: Tensor | None, out: int) -> Tensor:
    """``x [...,in]`` times a packed weight."""
    return x.new_empty(*x.shape[:-1], out)


@_define("(Tensor x, Tensor weight, int out) -> Tensor")
def head_linear(x: Tensor, weight: Tensor, out: int) -> Tensor:
    """``x [B,H,T,in]`` times a packed weight for each head."""
    return x.new_empty(*x.shape[:3], out)


@_define("(Tensor table, Tensor ids, int rows, int width) -> Tensor")
def embedding(table: Tensor, ids: Tensor, rows: int, width: int) -> Tensor:
    """Rows ``ids [...]`` of a table, packed as a weight or not."""
    return table.new_empty(*ids.shape, width, dtype=torch.float32)


@_define("(Tensor x, Tensor? weight, Tensor? bias, float eps, bool center) -> Tensor")
def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, center: bool) -> Tensor:
    """``memc::norm``."""
    return x.new_empty(x.shape)


@_define("(Tensor x, Tensor cosine, Tensor sine, bool interleaved) -> Tensor")
def rotary(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """``memc::rotary`` with ``cosine`` and ``sine [B,T,R/2]``."""
    return x.new_empty(x.shape)


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor keys, Tensor values, Tensor? slopes,"
    " Tensor? sink_logits, float scale, float softcap, int window, int chunk, int prefix) -> Tensor"
)
def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """``memc::attention`` without its states, which are written in place."""
    return query.new_empty(*query.shape[:3], value.shape[3])


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor? key_positions, Tensor? bias, Tensor? sink_logits, float scale,"
    " float softcap) -> Tensor"
)
def full_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """``memc::full_attention``."""
    return query.new_empty(*query.shape[:3], value.shape[3])


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor keys, Tensor values, Tensor? slopes,"
    " Tensor? sink_logits, float scale, float softcap, int window, int sinks, bool lse, bool left)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def window_memory(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``memc::window_memory`` without its states: output, log-sum-exp, key and value that left, ``[1]`` if unread."""
    *_, lse, left = rest
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[:3] if lse else [1]),
        query.new_empty(key.shape if left else [1]),
        query.new_empty(value.shape if left else [1]),
    )


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor keys, Tensor values, Tensor pages,"
    " Tensor? choice, Tensor? sink_logits, float scale, float softcap, str method, int page, int budget, int sinks,"
    " int window, int rerank, int dense_below, int channels, float mass, int beam, int refresh, float contiguity,"
    " int delay, bool lse) -> (Tensor, Tensor)"
)
def sparse_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``memc::sparse_attention`` and its like, without states: output and log-sum-exp, ``[1]`` if unread.

    ``choice`` is a shared choice, or the numbers of events.
    """
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3] if rest[-1] else [1])


@_define(
    "(Tensor logits, Tensor tokens, Tensor positions, Tensor key, Tensor past_logits, Tensor past_surprises,"
    " Tensor past_keys, Tensor past_events, float gamma, int longest, str refine)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def events(logits: Tensor, tokens: Tensor, positions: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """``memc::events`` without its positions: surprises, and the next states, which it does not write in place."""
    return logits.new_empty(positions.shape), *(past.new_empty(past.shape) for past in rest[:4])


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor codes, Tensor values, Tensor pages,"
    " Tensor ranges, Tensor key_tail, Tensor value_tail, Tensor? sink_logits, float scale, float softcap, int bits,"
    " int page, int budget, int sinks, int window, int rerank, int dense_below, bool lse) -> (Tensor, Tensor)"
)
def quantised_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``memc::quantised_attention`` without its states: output and log-sum-exp, ``[1]`` if unread."""
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3] if rest[-1] else [1])


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor positions, Tensor keys, Tensor values, Tensor pages,"
    " Tensor angles, Tensor? sink_logits, float scale, float softcap, bool interleaved, str method, int page,"
    " int budget, int sinks, int window, int dense_below, bool lse) -> (Tensor, Tensor)"
)
def compact_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``memc::compact_attention`` without its states: output and log-sum-exp, ``[1]`` if unread."""
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3] if rest[-1] else [1])


@_define(
    "(Tensor query, Tensor key, Tensor value, Tensor log_decay, Tensor positions, Tensor state, Tensor? beta) -> Tensor"
)
def linear_memory(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """``memc::linear_memory`` without its state, which is written in place."""
    return query.new_empty(*query.shape[:3], value.shape[3])


@_define("(Tensor x, Tensor block, str activation) -> Tensor")
def bank_ffn(x: Tensor, block: Tensor, activation: str) -> Tensor:
    """``memc::bank_ffn``."""
    return x.new_empty(x.shape)

"""Host code of the softmax kernels: what to launch for a prompt and for gradients.

``memc::attention`` and ``memc::window_memory`` differ in who reads whom (:class:`Rule`) and in how their state is held;
the keys of either are a state and a call, each key with a position and the number of its sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memc.kernels.common import segments
from memc.kernels.launch import FLOATS, Launch, Tile, gpu_of, launch, power_of_two, precision, tile
from memc.kernels.softmax_tiles import default

LARGEST_HEAD = 256
MOST_HEADS_OF_A_GROUP = 64
BIAS = ("batch", "head", "query", "key")
"""What the dimensions of a bias are of."""


@dataclass(frozen=True)
class Rule:
    """Who reads whom, and how scores are made; fields as the ops' arguments, 0 for none."""

    scale: float
    softcap: float = 0.0
    window: int = 0
    chunk: int = 0
    prefix: int = 0
    sinks: int = 0


@dataclass(frozen=True)
class Held:
    """The keys that a call may read, and where they and its queries stand.

    ``key [B,G,N,D]`` and ``value [B,G,N,E]`` are contiguous. ``positions [B,N]`` and ``numbers [B,N]``, the sequence of
    its row that each belongs to, are int32; ``query_positions`` and ``query_numbers [B,T]`` are so for the queries.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    numbers: Tensor
    query_positions: Tensor
    query_numbers: Tensor

    @property
    def arguments(self) -> dict[str, Tensor]:
        """What tells the kernels who may read whom."""
        return {
            "query_positions": self.query_positions,
            "query_numbers": self.query_numbers,
            "positions": self.positions,
            "numbers": self.numbers,
        }


def refusal(query: Tensor, key: Tensor, value: Tensor, *others: Tensor | None) -> str:
    """Return why the kernels do not take a call of these queries, keys and values; "" where they do."""
    tensors = [x for x in (query, key, value, *others) if x is not None]
    if any(x.dtype not in FLOATS for x in tensors):
        return f"{next(x.dtype for x in tensors if x.dtype not in FLOATS)} values"
    if len({x.dtype for x in (query, key, value)}) > 1:
        return "queries, keys and values of different types"
    if max(query.shape[3], value.shape[3]) > LARGEST_HEAD:
        return f"heads of more than {LARGEST_HEAD} channels"
    if query.shape[1] // key.shape[1] > MOST_HEADS_OF_A_GROUP:
        return f"more than {MOST_HEADS_OF_A_GROUP} query heads to a key-value head"
    return "" if query.numel() and value.numel() else "a call without tokens"


def unordered(*states: Tensor) -> str:
    """Return why states are not taken as they lie; "" where they are contiguous, and may be written in place."""
    return "" if all(x.is_contiguous() for x in states) else "a state that is not contiguous"


def held(key: Tensor, value: Tensor, positions: Tensor, past_positions: Tensor) -> Held:
    """Return the keys of a state with a call appended; ``key`` and ``value`` are those of both."""
    current = segments(positions).to(torch.int32)
    own, past = positions.to(torch.int32), past_positions.to(torch.int32)
    return Held(key, value, torch.cat([past, own], 1), torch.cat([torch.zeros_like(past), current], 1), own, current)


def attend(
    query: Tensor,
    keys: Held,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    rule: Rule,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B,H,T,E]`` and the log-sum-exp ``[B,H,T]`` in float32 of a call, 0 for padding.

    ``bias``, broadcast to ``[B,H,T,N]``, is added to the scores.
    """
    batch, heads, tokens, _ = query.shape
    added = None if bias is None else bias.expand(batch, heads, tokens, keys.positions.shape[1])
    out = query.new_empty(batch, heads, tokens, keys.value.shape[3])
    lse = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    cut = tile_of("attention.prompt", query, keys.value)
    if bias is not None and max(query.shape[3], keys.value.shape[3]) > 64:  # it takes as many registers as the scores
        cut = replace(cut, sizes={**cut.sizes, "block_keys": max(16, cut.sizes["block_keys"] // 2)})
    sizes = sizes_of(query, keys.key, keys.value)
    launch(
        Launch(
            "attention.prompt",
            (blocks_of(tokens, cut.sizes["block_queries"]), heads, batch),
            {
                "out": out,
                "lse": lse,
                "query": query.contiguous(),
                "key": keys.key,
                "value": keys.value,
                **keys.arguments,
                "intervals": _visits(keys, tokens, rule, cut),
                "slopes": query if slopes is None else slopes.contiguous(),
                "sink_logits": query if sink_logits is None else sink_logits.contiguous(),
                "bias": query if added is None else added,
                "tokens": tokens,
                "held": keys.positions.shape[1],
                **{f"bias_{name}": 0 if added is None else added.stride(n) for n, name in enumerate(BIAS)},
            },
            {
                **sizes,
                **constants_of(rule, slopes, query),
                "has_sink_logits": sink_logits is not None,
                "has_bias": added is not None,
                **cut.sizes,
            },
            cut.warps,
            cut.stages,
        )
    )
    return out, lse


@dataclass(frozen=True)
class Gradients:
    """Gradients of one :func:`attend`: of queries, of all keys and values ``[B,G,N,.]``, of slopes and sink logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    slopes: Tensor | None
    sink_logits: Tensor | None


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    copied_key: Tensor,
    copied_value: Tensor,
    query: Tensor,
    keys: Held,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    rule: Rule,
) -> Gradients:
    """Return the gradients; ``copied_key [B,G,N,D]`` and ``copied_value`` are those of copies made of the keys."""
    query, grad_out = query.contiguous(), grad_out.contiguous()
    out, lse = attend(query, keys, slopes, sink_logits, rule)
    there = (keys.query_positions[:, None] >= 0).expand(lse.shape)
    # A row's D = do.o, Dao et al. 2022, equation 4; padding may hold anything.
    common = -(grad_out.float() * out.float()).sum(-1)
    if grad_lse is not None:
        common = common + grad_lse.float()
    common = torch.where(there, common, 0)
    grad_query, distances = _query_gradient(grad_out, common, lse, query, keys, slopes, rule)
    grad_key, grad_value = _key_gradient(
        copied_key.contiguous(), copied_value.contiguous(), grad_out, common, lse, query, keys, slopes, rule
    )
    grad_sinks = None
    if sink_logits is not None:
        weights = torch.where(there, torch.exp(sink_logits.float()[:, None] - lse), 0)
        grad_sinks = (weights * common).sum((0, 2))
    return Gradients(grad_query, grad_key, grad_value, None if slopes is None else distances.sum((0, 2)), grad_sinks)


def _query_gradient(
    grad_out: Tensor, common: Tensor, lse: Tensor, query: Tensor, keys: Held, slopes: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    grad_query, distances = query.new_empty(query.shape), lse.new_empty(lse.shape)
    cut = tile_of("attention.query_gradient", query, keys.value)
    launch(
        Launch(
            "attention.query_gradient",
            (blocks_of(tokens, cut.sizes["block_queries"]), heads, batch),
            {
                "grad_query": grad_query,
                "distances": distances,
                "grad_out": grad_out,
                "common": common,
                "lse": lse,
                "query": query,
                "key": keys.key,
                "value": keys.value,
                **keys.arguments,
                "intervals": _visits(keys, tokens, rule, cut),
                "slopes": query if slopes is None else slopes.contiguous(),
                "tokens": tokens,
                "held": keys.positions.shape[1],
            },
            {**sizes_of(query, keys.key, keys.value), **constants_of(rule, slopes, query), **cut.sizes},
            cut.warps,
            cut.stages,
        )
    )
    return grad_query, distances


def _key_gradient(
    copied_key: Tensor,
    copied_value: Tensor,
    grad_out: Tensor,
    common: Tensor,
    lse: Tensor,
    query: Tensor,
    keys: Held,
    slopes: Tensor | None,
    rule: Rule,
) -> tuple[Tensor, Tensor]:
    batch, groups, everything, _ = keys.key.shape
    grad_key, grad_value = keys.key.new_empty(keys.key.shape), keys.value.new_empty(keys.value.shape)
    cut = tile_of("attention.key_gradient", query, keys.value)
    blocks = blocks_of(everything, cut.sizes["block_keys"])
    intervals = keys.positions.new_empty(batch, blocks, 2)
    _bounds("attention.visitors", (blocks, batch, 1), intervals, keys, query.shape[2], rule, cut)
    launch(
        Launch(
            "attention.key_gradient",
            (blocks, groups, batch),
            {
                "grad_key": grad_key,
                "grad_value": grad_value,
                "copied_key": copied_key,
                "copied_value": copied_value,
                "grad_out": grad_out,
                "common": common,
                "lse": lse,
                "query": query,
                "key": keys.key,
                "value": keys.value,
                **keys.arguments,
                "intervals": intervals,
                "slopes": query if slopes is None else slopes.contiguous(),
                "tokens": query.shape[2],
                "held": keys.positions.shape[1],
            },
            {**sizes_of(query, keys.key, keys.value), **constants_of(rule, slopes, query), **cut.sizes},
            cut.warps,
            cut.stages,
        )
    )
    return grad_key, grad_value


def _visits(keys: Held, tokens: int, rule: Rule, cut: Tile) -> Tensor:
    """Return which blocks of keys each block of queries reads, ``[B, blocks of queries, 4]``."""
    batch = keys.positions.shape[0]
    blocks = blocks_of(tokens, cut.sizes["block_queries"])
    intervals = keys.positions.new_empty(batch, blocks, 4)
    _bounds("attention.visits", (blocks, batch, 1), intervals, keys, tokens, rule, cut)
    return intervals


def _bounds(
    kernel: str, grid: tuple[int, int, int], intervals: Tensor, keys: Held, tokens: int, rule: Rule, cut: Tile
) -> None:
    launch(
        Launch(
            kernel,
            grid,
            {
                "intervals": intervals,
                **keys.arguments,
                "tokens": tokens,
                "held": keys.positions.shape[1],
            },
            {**_reading(rule), "block_queries": cut.sizes["block_queries"], "block_keys": cut.sizes["block_keys"]},
            cut.warps,
            stages=1,
        )
    )


def _reading(rule: Rule) -> dict[str, int]:
    return {"window": rule.window, "chunk": rule.chunk, "prefix": rule.prefix, "sinks": rule.sinks}


def constants_of(rule: Rule, slopes: Tensor | None, query: Tensor) -> dict[str, int | float | bool | str]:
    """Return the constants by which kernels make scores."""
    return {
        "scale": rule.scale,
        "softcap": rule.softcap,
        **_reading(rule),
        "has_slopes": slopes is not None,
        "precision": precision(query.device, query.dtype),
    }


def sizes_of(query: Tensor, key: Tensor, value: Tensor) -> dict[str, int]:
    """Return the constants that say how large heads are and how many."""
    size, value_size = query.shape[3], value.shape[3]
    return {
        "heads": query.shape[1],
        "groups": key.shape[1],
        "size": size,
        "value_size": value_size,
        "block_size": max(16, power_of_two(size)),
        "block_value": max(16, power_of_two(value_size)),
    }


def tile_of(kernel: str, query: Tensor, value: Tensor) -> Tile:
    """Return how to cut a kernel for heads and types like these."""
    size = max(16, power_of_two(query.shape[3]), power_of_two(value.shape[3]))
    kind = str(query.dtype).removeprefix("torch.")
    return tile(
        kernel, f"{size}-{kind}", default(kernel, size, query.dtype.itemsize, gpu_of(query.device)), query.device
    )


def blocks_of(size: int, block: int) -> int:
    """Return how many blocks hold ``size``."""
    return -(-size // block)

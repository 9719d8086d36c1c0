"""What a mask or bias means: its subgraph is evaluated at several lengths and the values are classified."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from memc.blocks import (
    Alibi,
    Bias,
    Bidirectional,
    Causal,
    Chunked,
    Mask,
    OtherBias,
    OtherMask,
    Prefix,
    RelativeBias,
    SlidingWindow,
)
from memc.raising.attention import BLOCKED
from memc.raising.evaluate import ancestors, shape

_BLOCKED_FLOAT16 = -6.0e4
_LENGTHS = (6, 17)
_LARGEST_LENGTH = 1500
_LARGEST_TABLE = 2048
_STAND_IN = 5


@dataclass(frozen=True)
class Scores:
    """What happens to raw scores ``s`` before softmax: ``scale * s``, soft-cap, then an added bias and mask."""

    mask: Mask
    bias: Bias | None


def classify(
    matrix: Callable[[int, dict[int, int]], Tensor],
    constants: Iterable[int],
    causal_hint: bool,
    fixed_length: int | None = None,
    table: int = 0,
) -> Scores:
    """Classify the additive matrix ``[heads, T, T]`` that ``matrix(T, replace)`` evaluates.

    ``constants`` are the integers that its subgraph mentions: a window too wide to evaluate is found by putting a small
    number in the place of each. A mask that the model holds ready for ``table`` tokens mentions none, and is looked at
    as a whole. ``causal_hint`` tells that masking is causal beside the matrix (``is_causal``); ``fixed_length`` is the
    number of tokens where the model takes only one.
    """
    if fixed_length is not None:
        return _at_lengths(lambda tokens: matrix(tokens, {}), (fixed_length,), causal_hint)
    found = _at_lengths(lambda tokens: matrix(tokens, {}), _LENGTHS, causal_hint)
    if not isinstance(found.mask, Causal):
        return found
    if table > _LENGTHS[-1]:
        mask = _at_lengths(lambda tokens: matrix(tokens, {}), (min(table, _LARGEST_TABLE),), causal_hint).mask
        if not isinstance(mask, Causal):
            return Scores(mask, found.bias)
    for constant in sorted(set(constants)):
        if constant <= _LENGTHS[-1] - 2:
            continue
        mask = _mask_beyond(matrix, constant, causal_hint)
        if not isinstance(mask, Causal):
            return Scores(mask, found.bias)
    return found


def _mask_beyond(matrix: Callable[[int, dict[int, int]], Tensor], constant: int, causal_hint: bool) -> Mask:
    """Classify past the length that a constant names: at that length, or with a small number in its place."""
    try:
        if constant <= _LARGEST_LENGTH:
            return _at_lengths(lambda tokens: matrix(tokens, {}), (constant + 3,), causal_hint).mask
        small = _at_lengths(lambda tokens: matrix(tokens, {constant: _STAND_IN}), (17,), causal_hint).mask
    except (RuntimeError, IndexError):
        # The constant is a size that the subgraph cannot do without: no window hides behind it.
        return Causal()
    match small:
        case SlidingWindow(size):
            return SlidingWindow(size + constant - _STAND_IN)
        case Chunked(size):
            return Chunked(size + constant - _STAND_IN)
    return Causal()


def _at_lengths(matrix: Callable[[int], Tensor], lengths: Iterable[int], causal_hint: bool) -> Scores:
    """Classify at every length; the mask that the longest shows holds if the shorter ones agree with it."""
    scores: Scores | None = None
    for tokens in lengths:
        values = matrix(tokens).to(torch.float64)
        allowed = values > (_BLOCKED_FLOAT16 if values.min() > BLOCKED else BLOCKED)
        if causal_hint:
            allowed = allowed & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if not (allowed == allowed[:1]).all():
            return Scores(OtherMask("heads are masked differently"), None)
        mask = classify_mask(allowed[0])
        if scores is not None and not _consistent(scores.mask, mask, tokens):
            return Scores(OtherMask(f"changes with the length: {scores.mask} then {mask}"), None)
        scores = Scores(mask, classify_bias(values, allowed))
    assert scores is not None
    return scores


def _consistent(shorter: Mask, longer: Mask, tokens: int) -> bool:
    if shorter == longer:
        return True
    # A window or chunk longer than the short sequence looks causal there.
    return isinstance(shorter, Causal) and isinstance(longer, SlidingWindow | Chunked) and longer.size < tokens


def classify_mask(allowed: Tensor) -> Mask:
    """Name the pattern of an ``[T, S]`` boolean matrix, True where a query reads a key."""
    rows, columns = allowed.shape
    if bool(allowed.all()):
        return Bidirectional() if rows > 1 or columns > 1 else Causal()
    if rows != columns:
        return OtherMask("queries and keys differ in number")
    query = torch.arange(rows)[:, None]
    key = torch.arange(rows)[None, :]
    causal = key <= query
    if torch.equal(allowed, causal):
        return Causal()
    size = int(allowed[-1].sum())
    if torch.equal(allowed, causal & (query - key < size)):
        return SlidingWindow(size)
    for size in range(1, rows):
        if torch.equal(allowed, causal & (query // size == key // size)):
            return Chunked(size)
        if torch.equal(allowed, causal | ((query < size) & (key < size))):
            return Prefix(size)
    return OtherMask("matches no known pattern")


def classify_bias(values: Tensor, allowed: Tensor) -> Bias | None:
    """Name what is added where a query may read: ``values [heads, T, T]``, constants per row left out of account."""
    heads, tokens, _ = values.shape
    inside = torch.where(allowed, values, torch.zeros_like(values))
    # Softmax does not see what is added to a whole row, so every row is taken relative to its diagonal.
    relative = torch.where(allowed, inside - inside.diagonal(dim1=1, dim2=2)[..., None], torch.zeros_like(inside))
    if relative.abs().max() < 1e-6:
        return None
    distance = torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None]
    slopes = -relative[:, 1, 0] if tokens > 1 else torch.zeros(heads, dtype=values.dtype)
    linear = torch.where(allowed, slopes[:, None, None] * distance, torch.zeros_like(relative))
    if torch.allclose(relative, linear, rtol=1e-4, atol=1e-5):
        return Alibi(tuple(float(slope) for slope in slopes))
    for offset in range(1 - tokens, tokens):
        diagonal = inside.diagonal(offset, dim1=1, dim2=2)
        kept = allowed.expand_as(inside).diagonal(offset, dim1=1, dim2=2)
        if kept.all() and (diagonal - diagonal[:, :1]).abs().max() > 1e-5:
            return OtherBias("depends on more than the distance")
    return RelativeBias()


def constants_of(module: GraphModule, nodes: Iterable[Node], stop: Iterable[Node]) -> set[int]:
    """Return the integers that the subgraph under ``nodes`` mentions as operands, sizes and axes left out."""
    found: set[int] = set()
    for node in ancestors(nodes, stop):
        if node.op != "call_function":
            continue
        for argument in node.args[1:]:
            if isinstance(argument, int) and not isinstance(argument, bool) and 1 < abs(argument) < 2**31:
                found.add(abs(argument))
    return found


def table_of(module: GraphModule, nodes: Iterable[Node], stop: Iterable[Node]) -> int:
    """Return the tokens that the smallest square table under ``nodes`` has a row and a column for, 0 without one."""
    sizes = [shape(node)[-2:] for node in ancestors(nodes, stop) if node.op == "get_attr"]
    return min((size[0] for size in sizes if len(size) == 2 and size[0] == size[1]), default=0)

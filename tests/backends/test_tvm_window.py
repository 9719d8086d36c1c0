"""The chunked form of the tvm backend's window equals the reference in float64, however a prompt is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm

from memc.backends.tvm.isa import isa_of
from memc.backends.tvm.kernels import window_chunk
from memc.backends.tvm.kernels.common import SLOTS, Scores
from memc.backends.tvm.kernels.memory_chunk import CHUNK
from memc.backends.tvm.kernels.window import window_memory
from memc.backends.tvm.kernels.window_chunk import LEAST, Ring
from memc.dialect.window_memory import WindowMemory
from memc.kernels.window_memory.reference import forward
from memc.target import get_target
from tests.backends.runs import span

TOLERANCE = 1e-4
ISA = isa_of(get_target("cpu"))
RULES = {
    "plain": (Scores(6, 2, 8, ISA.tile.columns + 9, 0.7), Ring(20, 4, lse=True, left=True)),
    "every option": (Scores(4, 2, 7, 10, 0.7, 2.0, True, True), Ring(37, 2, lse=True, left=True)),
    "a window that a chunk does not fit": (Scores(3, 3, 8, 8, 0.7, slopes=True), Ring(5, 0, lse=True, left=True)),
}


def compiled(s: Scores, r: Ring) -> Any:
    module = tvm.IRModule({"window": window_memory(s, r, ISA.tile).with_attr("global_symbol", "window")})
    return tvm.compile(module, target=tvm.target.Target(ISA.options))["window"]


built = cache(compiled)


def drawn(s: Scores, batch: int, tokens: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = (s.heads, s.key_dim), (s.groups, s.key_dim), (s.groups, s.value_dim)
    return [torch.randn(batch, heads, tokens, width, generator=random) for heads, width in sizes]


def extras(s: Scores) -> list[torch.Tensor | None]:
    random = torch.Generator().manual_seed(1)
    slopes, sinks = torch.rand(s.heads, generator=random), torch.randn(s.heads, generator=random)
    return [slopes if s.slopes else None, sinks if s.sink_logits else None]


def run(
    s: Scores, r: Ring, qkv: list[torch.Tensor], positions: torch.Tensor, cuts: list[int], function: Any = None
) -> list[torch.Tensor]:
    """Run pieces over one state; outputs begin as what nothing may be left of."""
    batch, tokens = positions.shape
    made: list[list[torch.Tensor]] = []
    keys = tvm.runtime.tensor(np.zeros((batch, s.groups, -(-r.slots // SLOTS), s.key_dim, SLOTS), np.float32))
    values = tvm.runtime.tensor(np.zeros((batch, s.groups, r.slots, s.value_dim), np.float32))
    for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
        given = [x[:, :, start:stop].contiguous().numpy() for x in qkv]
        given.append(positions[:, start:stop].contiguous().numpy())
        added = [np.zeros(1, np.float32) if x is None else x.numpy() for x in extras(s)]
        count = stop - start
        shapes = [(batch, s.heads, count, s.value_dim), (batch, s.heads, count)]
        shapes += [(batch, s.groups, count, width) for width in (s.key_dim, s.value_dim)]
        results = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
        inputs = [tvm.runtime.tensor(array) for array in given]
        (function or built(s, r))(*inputs, keys, values, *map(tvm.runtime.tensor, added), *results)
        made.append([torch.from_numpy(result.numpy()) for result in results])
    return [torch.cat(parts, 2) for parts in zip(*made, strict=True)]


def reference(s: Scores, r: Ring, qkv: list[torch.Tensor], positions: torch.Tensor) -> list[torch.Tensor]:
    """Run everything in one call, in float64."""
    batch = len(positions)
    held = [torch.zeros(batch, s.groups, r.slots, width).double() for width in (s.key_dim, s.value_dim)]
    empty = torch.full((batch, r.slots), -1)
    added = [None if x is None else x.double() for x in extras(s)]
    options: dict[str, Any] = {"scale": s.scale, "window": r.window, "sinks": r.sinks, "softcap": s.softcap}
    args = WindowMemory(*(x.double() for x in qkv), positions, *held, empty, *added, **options)
    return list(forward(args)[:4])


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    finite = all(bool(torch.isfinite(part).all()) for part in found)
    worst = max(float((a.double() - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return worst if finite else float("inf")


@pytest.mark.parametrize("rule", RULES)
def test_any_length_and_any_cut_equal_the_reference(rule: str) -> None:
    s, r = RULES[rule]
    for tokens in (1, 2, LEAST, CHUNK + 1, 2 * CHUNK, 7 * CHUNK + 3):
        qkv, positions = drawn(s, 2, tokens), torch.arange(tokens).expand(2, -1)
        wanted = reference(s, r, qkv, positions)
        for cuts in ([], [1], [LEAST - 1, CHUNK], [tokens // 2], list(range(1, tokens, 5))):
            if all(0 < cut < tokens for cut in cuts):
                assert difference(run(s, r, qkv, positions, cuts), wanted) < TOLERANCE, (tokens, cuts)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_padded_start_and_end_where_they_like(rule: str) -> None:
    s, r = RULES[rule]
    tokens = 6 * CHUNK
    positions = torch.tensor(
        [
            span(0, tokens),
            span(0, tokens - 20, left=20),
            span(0, 5) + span(0, tokens - 25) + [-1] * 3 + [0] + span(0, 16),
            [-1] * tokens,
            [-1, -1, 0, -1, -1, 1, *span(2, tokens - 9, right=3)],
        ]
    )
    qkv = drawn(s, len(positions), tokens)
    wanted = reference(s, r, qkv, positions)
    for cuts in ([], [CHUNK + 3, 50]):
        assert difference(run(s, r, qkv, positions, cuts), wanted) < TOLERANCE, cuts


def test_a_wrong_tail_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no block of their own are left out."""
    s, r = RULES["plain"]
    monkeypatch.setattr(window_chunk, "blocks_of", lambda count, rows: count // rows)
    window_memory.cache_clear()
    function = compiled(s, r)
    window_memory.cache_clear()
    worst = {}
    for tokens in (2 * CHUNK, 2 * CHUNK + LEAST + 1):
        qkv, positions = drawn(s, 1, tokens), torch.arange(tokens)[None]
        worst[tokens] = difference(run(s, r, qkv, positions, [], function), reference(s, r, qkv, positions))
    assert worst[2 * CHUNK] < TOLERANCE < worst[2 * CHUNK + LEAST + 1]

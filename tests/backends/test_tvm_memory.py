"""The chunked form of the tvm backend's linear memory equals the reference in float64, however a prompt is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import tvm

from memc.backends.tvm.isa import Tile, isa_of
from memc.backends.tvm.kernels import memory_chunk
from memc.backends.tvm.kernels.memory import SHORT, linear_memory
from memc.backends.tvm.kernels.memory_chunk import CHUNK, Memory
from memc.dialect.linear_memory import LinearMemory
from memc.kernels.linear_memory.op import prepare
from memc.kernels.linear_memory.reference import loop
from memc.target import get_target
from tests.backends.runs import span

TOLERANCE = 1e-4
LENGTHS = (1, 2, 5, SHORT, SHORT + 1, CHUNK, 2 * CHUNK + 3, 5 * CHUNK - 1)
ISA = isa_of(get_target("cpu"))

RULES = {
    "per head": Memory(6, 2, 8, 10, per_channel=False, delta=False),
    "per head, a wide value and a column": Memory(3, 3, 12, ISA.tile.columns + 1, per_channel=False, delta=False),
    "per channel": Memory(6, 2, 8, 10, per_channel=True, delta=False),
    "per channel, odd": Memory(2, 1, 7, 33, per_channel=True, delta=False),
    "delta": Memory(6, 2, 8, 10, per_channel=False, delta=True),
    "delta per channel": Memory(4, 2, 8, 2 * ISA.tile.columns, per_channel=True, delta=True),
}


@cache
def built(m: Memory, tile: Tile = ISA.tile) -> Any:
    module = tvm.IRModule({"memory": linear_memory(m, tile).with_attr("global_symbol", "memory")})
    return tvm.compile(module, target=tvm.target.Target(ISA.options))["memory"]


def drawn(m: Memory, batch: int, tokens: int, strength: float = 0.1, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    key = normal(batch, m.groups, tokens, m.key_dim)
    return {
        "query": normal(batch, m.heads, tokens, m.key_dim),
        "key": key / key.norm(dim=-1, keepdim=True),
        "value": normal(batch, m.groups, tokens, m.value_dim),
        "decay": -strength * normal(batch, m.groups, tokens, m.decays).exp(),
        "state": normal(batch, m.groups, m.key_dim, m.value_dim),
        "beta": torch.sigmoid(normal(batch, m.groups, tokens)) if m.delta else torch.zeros(1),
    }


def compiled(
    m: Memory, given: dict[str, torch.Tensor], positions: torch.Tensor, function: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the function over a state of its own and outputs that nothing may be left of."""
    y = np.full((*given["query"].shape[:3], m.value_dim), np.nan, np.float32)
    arrays = [given[name].contiguous().numpy() for name in ("query", "key", "value", "decay")]
    arrays += [positions.contiguous().numpy(), given["state"].numpy().copy(), given["beta"].contiguous().numpy(), y]
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    (function or built(m))(*tensors)
    return torch.from_numpy(tensors[-1].numpy()), torch.from_numpy(tensors[5].numpy())


def reference(m: Memory, given: dict[str, torch.Tensor], positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Go token by token in float64."""
    wide = {name: value.double() for name, value in given.items()}
    tensors = [wide[name] for name in ("query", "key", "value", "decay")]
    beta, update = (wide["beta"], "gated_delta") if m.delta else (None, "gated")
    call = prepare(LinearMemory(*tensors, positions, wide["state"], beta, update=update))
    out, state = loop(call.query, call.key, call.value, call.gate, call.state, call.beta)
    return out.flatten(1, 2), state


def difference(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> float:
    """Return the largest difference over the largest value wanted, infinite where something is not finite."""
    parts = [
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in zip(found, wanted, strict=True)
    ]
    return max(parts) if all(bool(torch.isfinite(a).all()) for a in found) else float("inf")


@pytest.mark.parametrize("rule", RULES)
def test_any_length_equals_the_reference(rule: str) -> None:
    m = RULES[rule]
    for tokens in LENGTHS:
        given, positions = drawn(m, 2, tokens), torch.arange(3, 3 + tokens).expand(2, -1)
        found, wanted = compiled(m, given, positions), reference(m, given, positions)
        assert difference(found, wanted) < TOLERANCE, tokens


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_are_padded_start_and_end_where_they_like(rule: str) -> None:
    m, tokens = RULES[rule], 3 * CHUNK
    rows = [
        span(0, tokens),
        span(9, tokens - 20, left=20),
        span(0, 5) + span(0, tokens - 25) + [-1] * 3 + [0] + span(0, 16),
        [-1] * tokens,
        [-1, -1, 7, -1, -1, 8, *span(0, tokens - 9, right=3)],
    ]
    positions = torch.tensor(rows)
    given = drawn(m, len(rows), tokens)
    found, wanted = compiled(m, given, positions), reference(m, given, positions)
    assert difference(found, wanted) < TOLERANCE
    assert not found[0].transpose(1, 2)[positions < 0].any(), "padding reads nothing"
    assert torch.equal(found[1][3], given["state"][3]), "and changes nothing"
    for row in range(len(rows)):
        alone = {name: value[row : row + 1] if len(value) > 1 else value for name, value in given.items()}
        one = compiled(m, alone, positions[row : row + 1])
        assert torch.equal(one[0][0], found[0][row]) and torch.equal(one[1][0], found[1][row])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("strength", [0.0, 4.0, 400.0, 4e4, float("inf")])
def test_gates_of_any_strength(rule: str, strength: float) -> None:
    m, tokens = RULES[rule], 4 * CHUNK + 5
    given, positions = drawn(m, 2, tokens, min(strength, 1e30)), torch.arange(1, tokens + 1).expand(2, -1)
    weak = torch.rand(given["decay"].shape, generator=torch.Generator().manual_seed(1)) < 0.7
    given["decay"] = torch.where(weak, -1e-3, given["decay"] if strength < 1e30 else -torch.inf)
    assert difference(compiled(m, given, positions), reference(m, given, positions)) < TOLERANCE


@pytest.mark.parametrize("rule", RULES)
def test_any_cut_carries_the_state(rule: str) -> None:
    m, tokens = RULES[rule], 3 * CHUNK + 1
    given, positions = drawn(m, 1, tokens), torch.arange(tokens)[None]
    wanted = reference(m, given, positions)
    for cuts in ([1], [SHORT, SHORT + 1], [CHUNK], [CHUNK - 1, 2 * CHUNK + 1], list(range(1, tokens))):
        state, outputs = given["state"], []
        for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
            names = ("query", "key", "value", "decay", *(["beta"] if m.delta else []))
            piece = {**given, "state": state, **{name: given[name][:, :, start:stop] for name in names}}
            out, state = compiled(m, piece, positions[:, start:stop])
            outputs.append(out)
        assert difference((torch.cat(outputs, 2), state), wanted) < TOLERANCE, cuts


@pytest.mark.conformance
def test_tiles_of_every_shape_compute_the_same() -> None:
    for tile in (Tile(16, 2), Tile(16, 6), Tile(64, 4)):
        for m in (
            Memory(2, 1, 8, 70, per_channel=False, delta=True),
            Memory(2, 1, 8, 70, per_channel=True, delta=False),
        ):
            given, positions = drawn(m, 1, 37), torch.arange(37)[None]
            found = compiled(m, given, positions, built(m, tile))
            assert difference(found, reference(m, given, positions)) < TOLERANCE, tile


def test_a_wrong_tail_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no block of their own are left out."""
    m = RULES["per head"]
    monkeypatch.setattr(memory_chunk, "blocks_of", lambda count, rows: count // rows)
    linear_memory.cache_clear()
    module = tvm.IRModule({"memory": linear_memory(m, ISA.tile).with_attr("global_symbol", "memory")})
    function = tvm.compile(module, target=tvm.target.Target(ISA.options))["memory"]
    linear_memory.cache_clear()
    worst = {}
    for tokens in (2 * CHUNK, 2 * CHUNK + 3):
        given, positions = drawn(m, 1, tokens), torch.arange(tokens)[None]
        worst[tokens] = difference(compiled(m, given, positions, function), reference(m, given, positions))
    assert worst[2 * CHUNK] < TOLERANCE < worst[2 * CHUNK + 3]

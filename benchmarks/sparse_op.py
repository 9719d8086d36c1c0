"""Time of one attention for one new token through the onnx backend or another, sparse and dense."""

from __future__ import annotations

import operator
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Graph, GraphModule

from memc.backend import LowerOptions
from memc.conversion.lowering import lower
from memc.cost import work
from memc.dialect.quantised_attention import code_bytes
from memc.dialect.refreshed_attention import most_chosen
from memc.dialect.sparse_attention import described_tokens, description
from memc.infer import infer
from memc.plugins import load_plugin
from memc.program import InputSpec, ModelInfo, OutputSpec, Program, StateSpec
from memc.target import get_target

aten = torch.ops.aten


@dataclass(frozen=True)
class Shape:
    """An attention, and the choice that it is timed with."""

    name: str
    heads: int
    groups: int
    size: int
    budget: int


SHAPES = (
    Shape("9 heads, 3 key-value, size 64", 9, 3, 64, 512),
    Shape("32 heads, 8 key-value, size 128", 32, 8, 128, 2048),
)
VOCAB = 64
WARM = 8
"""Tokens that go before those that are timed."""


SIDES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "bounds": {"method": "bounds", "page": 16, "rerank": 2},
    "4 bits": {"bits": 4, "page": 64, "rerank": 4},
    "lowbit": {"method": "lowbit", "page": 64, "rerank": 2},
}
SEARCHED: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "bounds": {"method": "bounds", "page": 16, "rerank": 2},
    "bounds, for 8": {"method": "bounds", "page": 16, "rerank": 2, "refresh": 8},
    "hip": {"method": "hip", "page": 16, "rerank": 2},
    "hip, for 8": {"method": "hip", "page": 16, "rerank": 2, "refresh": 8},
    "lowbit": {"method": "lowbit", "page": 64, "rerank": 2},
    "lowbit, for 8": {"method": "lowbit", "page": 64, "rerank": 2, "refresh": 8},
}
"""A choice for each token beside one for 8, and a tree search."""
LEVELS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "bounds": {"method": "bounds", "page": 16},
    "in two levels": {"method": "bounds2", "page": 16},
    "bounds, ranked again": {"method": "bounds", "page": 16, "rerank": 2},
    "in two levels, ranked again": {"method": "bounds2", "page": 16, "rerank": 2},
    "in two levels, for 8": {"method": "bounds2", "page": 16, "rerank": 1, "refresh": 8},
}
"""Pages ranked in one level of bounds and in two."""
COMPILED: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "bounds": {"method": "bounds", "page": 16},
    "bounds, ranked again": {"method": "bounds", "page": 16, "rerank": 2},
    "bounds, for 8": {"method": "bounds", "page": 16, "rerank": 2, "refresh": 8},
    "hip": {"method": "hip", "page": 16, "rerank": 2},
    "landmark": {"method": "landmark", "page": 64},
    "4 bits": {"bits": 4, "page": 64, "rerank": 2},
    "lowbit": {"method": "lowbit", "page": 64},
    "lowbit, for 8": {"method": "lowbit", "page": 64, "rerank": 2, "refresh": 8},
}
"""What the tvm backend is timed with, beside the onnx backend."""


def states_of(shape: Shape, choice: dict[str, Any] | None) -> list[StateSpec]:
    """Return the states of an attention in the order of the op's arguments."""
    size, page = shape.size, (choice or {}).get("page", 0)

    def spec(name: str, *sizes: int | str, dtype: torch.dtype = torch.float32) -> StateSpec:
        grows = 2 if str(sizes[0]).startswith("S") else None
        return StateSpec(f"past_{name}", dtype, ("B", shape.groups, *sizes), grows=grows)

    positions = StateSpec("past_positions", torch.int64, ("B", "S"), -1.0, 1)
    if choice is None or "method" in choice:
        kept = [spec("key", "S", size), spec("value", "S", size), positions]
        if choice is not None:
            piece = described_tokens(choice["method"], page)
            kept.append(spec("pages", f"S/{piece}", *description(choice["method"], page, size)))
        if choice is not None and "refresh" in choice:
            most = most_chosen(choice["method"], page, shape.budget, choice["rerank"])
            kept.append(StateSpec("past_choice", torch.int64, ("B", shape.groups, most), -1.0))
        return kept
    code = code_bytes(size, choice["bits"])
    return [
        spec("key", f"S/{page}", page, code, dtype=torch.uint8),
        spec("value", "S", code, dtype=torch.uint8),
        positions,
        spec("pages", f"S/{page}", 2 * size),
        spec("ranges", "S", 2),
        spec("key_tail", page, size),
        spec("value_tail", page, size),
    ]


def op_of(shape: Shape, choice: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Return the op of a choice and its options."""
    options: dict[str, Any] = {"scale": shape.size**-0.5}
    if choice is None:
        return torch.ops.memc.attention.default, options
    options |= {**choice, "budget": shape.budget, "sinks": 4, "window": 48, "dense_below": shape.budget}
    if "bits" in choice:
        return torch.ops.memc.quantised_attention.default, options
    op = torch.ops.memc.refreshed_attention if "refresh" in choice else torch.ops.memc.sparse_attention
    return op.default, {**options, "channels": shape.size // 8}


def attention(shape: Shape, choice: dict[str, Any] | None) -> Program:
    """Build a program of one attention over looked-up queries, keys and values; a choice of None is dense."""
    graph, root = Graph(), torch.nn.Module()
    tokens, positions = graph.placeholder("tokens"), graph.placeholder("positions")
    states = states_of(shape, choice)
    op, options = op_of(shape, choice)
    held = [graph.placeholder(state.name) for state in states]
    made = []
    for name, heads in (("query", shape.heads), ("key", shape.groups), ("value", shape.groups)):
        root.register_parameter(name, torch.nn.Parameter(torch.randn(VOCAB, heads * shape.size)))
        flat = graph.call_function(aten.embedding.default, (graph.get_attr(name), tokens))
        split = graph.call_function(aten.unflatten.int, (flat, -1, [heads, shape.size]))
        made.append(graph.call_function(aten.transpose.int, (split, 1, 2)))
    results = graph.call_function(op, (*made, positions, *held), options)
    first = len(op._schema.returns) - len(states)
    parts = [graph.call_function(operator.getitem, (results, i)) for i in (0, *range(first, first + len(states)))]
    merged = graph.call_function(
        aten.flatten.using_ints, (graph.call_function(aten.transpose.int, (parts[0], 1, 2)), 2)
    )
    graph.output((merged, *parts[1:]))
    inputs = tuple(InputSpec(name, name, torch.int64, ("B", "T")) for name in ("tokens", "positions"))  # type: ignore[arg-type]
    outputs = (OutputSpec("logits", torch.float32, ("B", "T", shape.heads * shape.size)),)
    info = ModelInfo("benchmark", "", "benchmark", VOCAB)
    program = Program(GraphModule(root, graph), inputs, outputs, tuple(states), info, raised=True)
    infer(program)
    return program


def fill(array: Any, random: np.random.Generator) -> None:
    """Fill a state with random numbers, bytes with random bytes; lists stay empty until a token chooses."""
    if array.dtype in (np.int64, np.int32):
        return
    if array.dtype == np.uint8:
        array[...] = random.integers(0, 256, array.shape, np.uint8)
    else:
        random.standard_normal(dtype=np.float32, out=array)


def times(
    shape: Shape,
    contexts: Sequence[int],
    sides: Mapping[str, dict[str, Any] | None] = SIDES,
    backends: Sequence[str] = ("onnx",),
) -> Iterator[dict[str, Any]]:
    """Yield the time of one new token at each context, the sides taking turns.

    The tokens that are timed are three turns of 8, at whose first those choose that choose for 8. The sides of any but
    the first backend have its name behind their own.
    """
    named = {
        name if backend == backends[0] else f"{name}, {backend}": (load_plugin("memc.backends", backend)(), choice)
        for backend in backends
        for name, choice in sides.items()
    }
    programs, random = {name: attention(shape, choice) for name, (_, choice) in named.items()}, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for name, (backend, _) in named.items():
            place = Path(folder) / name.replace(" ", "-")
            options = LowerOptions("fp32", max(contexts) + 64, 1)
            _, manifest = lower(programs[name], backend, get_target("cpu"), place, options)
            runners[name] = backend.load(place, manifest, 1)
        for context in contexts:
            states = {name: runner.new_state(1, context + 64) for name, runner in runners.items()}
            for state in states.values():
                for array in state.current.values():
                    fill(array, random)
                state.lengths[:] = context
            query = torch.randn(1, shape.heads, 1, shape.size)
            key, value = torch.randn(2, 1, shape.groups, context, shape.size)
            taken: dict[str, list[float]] = {name: [] for name in ("sdpa", *runners)}
            for step in range(WARM + 24):
                begin = time.perf_counter()
                torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
                taken["sdpa"].append(time.perf_counter() - begin)
                for name, runner in runners.items():
                    token, at = np.full((1, 1), step % VOCAB), np.full((1, 1), context + step)
                    begin = time.perf_counter()
                    runner.run(token, at, states[name])
                    taken[name].append(time.perf_counter() - begin)
            read = {name: work(program, context).state_bytes_read for name, program in programs.items()}
            yield {
                "shape": f"{shape.name}, budget {shape.budget}",
                "context": context,
                "ms": {name: 1e3 * float(np.median(found[WARM:])) for name, found in taken.items()},
                "p90": {name: 1e3 * float(np.quantile(found[WARM:], 0.9)) for name, found in taken.items()},
                "mean": {name: 1e3 * float(np.mean(found[WARM:])) for name, found in taken.items()},
                "predicted": {name: read["dense"] / found for name, found in read.items()},
            }

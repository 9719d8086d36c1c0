"""What the tests of backends with slots share: running a program and what was lowered side by side."""

from __future__ import annotations

import numpy as np
import torch

import memc.kernels  # noqa: F401  runs the ops
from memc.artifact import Manifest
from memc.backend import Lowered, Runner
from memc.program import Program

Calls = list[tuple[list[list[int]], list[int] | None]]
"""Positions of each call, and the columns whose logits are wanted."""


def manifest_of(lowered: Lowered, program: Program, weights: str, backend: str = "onnx") -> Manifest:
    return Manifest(
        version="0",
        source="test",
        source_digest="",
        family="test",
        target="cpu",
        backend=backend,
        weights=weights,
        lowered=lowered.path,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
        symbols=lowered.symbols,
        capacity=lowered.capacity,
        vocab_size=program.model.vocab_size,
        how_to_run=lowered.how_to_run,
    )


def compare(program: Program, runner: Runner, calls: Calls, seed: int = 0) -> float:
    """Return the largest difference of logits over all calls; the states go from call to call."""
    random = np.random.default_rng(seed)
    batch = len(calls[0][0])
    eager, state = program.new_state(batch), runner.new_state(batch)
    fetched = {
        spec.name: random.standard_normal([batch, *spec.shape[1:]], np.float32) * 0.3
        for spec in program.inputs
        if spec.role == "fetched"
    }
    blocks = [torch.from_numpy(block) for block in fetched.values()]
    worst = 0.0
    for rows, keep in calls:
        positions = np.array(rows, np.int64)
        tokens = random.integers(0, program.model.vocab_size or 0, positions.shape)
        with torch.no_grad():
            want, *eager_ = program(torch.from_numpy(tokens), torch.from_numpy(positions), *blocks, *eager)
        eager = tuple(eager_)
        got = runner.run(tokens, positions, state, None if keep is None else np.array(keep), fetched)
        expected = want.float().numpy() if keep is None else want.float().numpy()[:, keep]
        assert got.shape == expected.shape
        assert np.isfinite(got).all()
        worst = max(worst, float(np.abs(got - expected).max()))
    return worst


def span(start: int, count: int, left: int = 0, right: int = 0) -> list[int]:
    """Positions of ``count`` tokens from ``start``, padded."""
    return [-1] * left + list(range(start, start + count)) + [-1] * right


# One row or several; whole prompts longer than the window; pieces; one token at a time; padding on both sides; rows
# that have ended; a new sequence in a row that held another.
SCENARIOS: dict[str, Calls] = {
    "prompt": [([span(0, 13)], None)],
    "one token": [([[0]], None)] + [([[i]], [0]) for i in range(1, 9)],
    "pieces": [([span(0, 7), span(0, 7)], [6]), ([span(7, 3), span(7, 3)], None), ([[10], [10]], None)],
    "padding": [
        ([span(0, 3, left=2), span(0, 5)], None),
        ([span(3, 4), span(5, 2, right=2)], [0, 3]),
        ([[7], [-1]], None),
        ([[-1], [7]], None),
        ([[8, 9], [-1, 8]], None),
        ([[-1, -1], [-1, -1]], None),
        ([[10], [9]], None),
    ],
    "restart": [
        ([span(0, 9), span(0, 9)], None),
        ([span(9, 4), span(0, 4)], None),
        ([[0], [4]], None),
        ([[1], [5]], None),
    ],
    # Rows start sequences at columns of their own, after tokens, after padding, and several times in one call.
    "restart inside": [
        ([span(0, 5) + span(0, 8), [-1, *span(0, 3), *span(0, 9)]], None),
        ([span(8, 2) + span(0, 4), span(9, 6)], [1, 5, 3]),
        ([[4], [15]], None),
        ([[0, 1, 0, -1], [16, 0, 0, 1]], [3]),
        ([[0, 1, 2], [2, -1, 0]], None),
        ([[3], [1]], None),
    ],
}

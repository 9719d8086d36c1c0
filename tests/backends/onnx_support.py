"""What the onnx backend's tests share: lowering into a folder."""

from __future__ import annotations

from pathlib import Path

from memc.artifact import seal
from memc.backend import LowerOptions
from memc.backends.onnx import OnnxBackend
from memc.backends.onnx.backend import lower
from memc.backends.onnx.runner import OnnxRunner
from memc.program import Program
from memc.target import get_target
from tests.backends.runs import SCENARIOS, Calls, compare, manifest_of, span

__all__ = ["SCENARIOS", "Calls", "build", "compare", "span"]


def build(
    program: Program, folder: Path, *, weights: str = "fp32", context: int | None = 24, portable: bool = False
) -> OnnxRunner:
    options = LowerOptions(weights, context, 1)
    lowered = lower(program, get_target("cpu"), folder, options, portable=portable)
    manifest = manifest_of(lowered, program, weights)
    seal(folder, manifest)
    runner = OnnxBackend().load(folder, manifest, 1)
    assert isinstance(runner, OnnxRunner)
    return runner

"""What the tvm backend's tests share: lowering into a folder."""

from __future__ import annotations

from pathlib import Path

from memc.artifact import read_manifest, seal
from memc.backend import LowerOptions
from memc.backends.tvm import TvmBackend
from memc.backends.tvm.runner import TvmRunner
from memc.program import Program
from memc.target import get_target
from tests.backends.runs import manifest_of


def lower(
    program: Program, folder: Path, *, weights: str = "fp32", context: int | None = 24, target: str = "cpu"
) -> None:
    lowered = TvmBackend().lower(program, get_target(target), folder, LowerOptions(weights, context, 1))
    manifest = manifest_of(lowered, program, weights, "tvm").model_copy(update={"target": target})
    seal(folder, manifest)


def build(
    program: Program, folder: Path, *, weights: str = "fp32", context: int | None = 24, target: str = "cpu"
) -> TvmRunner:
    lower(program, folder, weights=weights, context=context, target=target)
    runner = TvmBackend().load(folder, read_manifest(folder), 1)
    assert isinstance(runner, TvmRunner)
    return runner

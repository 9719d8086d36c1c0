"""What the benchmark of GPUs times runs, here interpreted and in small sizes, and computes what the references do."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from memc.kernels.launch import INTERPRETER, Jit, Tile, launching
from memc.kernels.tiles import parse
from tests.kernels.triton_support import interpreted  # noqa: F401

pytestmark = pytest.mark.usefixtures("interpreted")

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    yield
    for name in ("gpu_sides", "gpu_tune"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("side", ["linear", "prompt", "sparse"])
def test_sides_run_and_agree_with_the_references(side: str) -> None:
    import gpu_sides

    shape = gpu_sides.Shape(1, 2, 1, 1 if side == "sparse" else 40, 16, CPU, torch.float32)
    if side == "linear":
        found = gpu_sides.linear(gpu_sides.Shape(1, 2, 2, 40, 16, CPU, torch.float32))
        found[1]["memc"]()
        own = found[0]["memc"]
    else:
        own = (gpu_sides.prompt(shape, 16) if side == "prompt" else gpu_sides.sparse(shape, 128, 64, 16))["memc"]
    with torch.no_grad():
        kernels = own()
        with launching(None):
            torch.testing.assert_close(kernels, own(), rtol=1e-4, atol=1e-5)


def test_a_step_of_a_whole_model_runs_from_its_configuration_alone() -> None:
    import gpu_sides

    program = gpu_sides.hybrid(SIZES, "linearize:window=8,keep=every:2", "nvidia-sm90", torch.float32, CPU)
    steps = gpu_sides.Steps(program, Jit(INTERPRETER), 1, 24, CPU)
    steps()
    steps()
    assert steps.position == 26 and steps.bytes > sum(p.numel() * 4 for p in program.module.parameters()) // 2
    gpu_sides.Dense(SIZES, 1, 24, torch.float32, CPU, compiled=False)()


def test_the_tuner_keeps_what_is_faster_and_writes_it(tmp_path: Path) -> None:
    import gpu_sides
    import gpu_tune

    shape = gpu_sides.Shape(1, 2, 2, 40, 16, CPU, torch.float32)
    side = gpu_sides.linear(shape)[0]["memc"]
    times = iter(range(1000, 0, -1))

    def faster_each_time(run: object) -> float:
        assert callable(run)
        run()
        return next(times)

    tuner = gpu_tune.Tuner(Jit(INTERPRETER), faster_each_time)
    with torch.no_grad():
        tuner.tune(side)
    assert tuner.best and any(kernel == "linear_memory.outputs" for kernel, _ in tuner.best)
    path = tmp_path / "tiles.toml"
    path.write_text('# kept\n\n["other"."a.b"."s"]\nsizes = { n = 16 }\nwarps = 4\nstages = 1\n')
    for _ in range(2):  # writing again replaces
        gpu_tune.write(path, "nvidia-sm90", tuner.best)
    read = tomllib.loads(path.read_text())
    assert path.read_text().startswith("# kept") and parse(read["other"])["a.b"]["s"] == Tile({"n": 16}, 4, 1)
    assert {(k, s): t for k, shapes in parse(read["nvidia-sm90"]).items() for s, t in shapes.items()} == tuner.best

"""What every test shares: one thread, and quick hypothesis runs without a deadline."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch._subclasses import FakeTensor
from torch.onnx._internal.exporter._registration import ONNXRegistry

from memc.conversion.speed import fits_beside
from memc.frontend import huggingface
from memc.program import ModelInfo, Program

torch.set_num_threads(1)
# The exporter traces at debug level for whoever listens, and pytest listens.
logging.getLogger("torch.__trace").setLevel(logging.ERROR)

settings.register_profile(
    "memc",
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
settings.load_profile("memc")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Give every test the same random numbers, whatever ran before it."""
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True, scope="session")
def _alone() -> Iterator[None]:
    """Have conversions lower their result alone: the original beside it, to be timed, takes as long again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memc.conversion.driver.fits_beside", lambda _: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _shapes_inferred() -> Iterator[None]:
    """Have shapes inferred each time: of models of two layers that is quicker than to look them up."""
    import torch._dynamo.config as options  # with Triton, which the tests of kernels set up before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "fake_tensor_cache_enabled", False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_registry() -> Iterator[None]:
    """Have torch's ONNX exporter make its table of ops once: it makes the same one at each export, for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(autouse=True, scope="session")
def _traced_once() -> Iterator[None]:
    """Have the graph of a configuration traced once: the same tiny models are captured all over, seconds each."""
    trace, made = huggingface.trace_model, {}

    def traced(module: Any, info: ModelInfo) -> Program:
        if any(not isinstance(value, FakeTensor) for value in module.parameters()):
            return trace(module, info)
        facts = {**module.config.to_dict(), "_name_or_path": ""}
        tensors = [(name, value.dtype, value.shape) for name, value in module.state_dict().items()]
        key = repr((type(module), facts, tensors, replace(info, source="", digest="")))
        if key not in made:
            made[key] = trace(module, info)
        program = made[key].copy()
        return replace(program, model=replace(program.model, source=info.source, digest=info.digest))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "trace_model", traced)
        yield


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have conversions time their result beside the original, as they do."""
    monkeypatch.setattr("memc.conversion.driver.fits_beside", fits_beside)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers of a test's own."""
    return torch.Generator().manual_seed(0)

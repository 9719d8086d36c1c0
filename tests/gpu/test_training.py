"""Training on a GPU comes to what it comes to on a CPU, within the rounding of TensorFloat-32."""

from __future__ import annotations

import pytest
import torch

from memc.program import named_tensors
from memc.train.device import CPU, accelerator, lent
from memc.verify import sample_text
from tests.passes.tiny_program import tiny
from tests.train.test_trainer import few_tokens, train

few_tokens = pytest.fixture(autouse=True)(few_tokens)


def test_training_on_a_gpu_comes_to_the_same() -> None:
    before = tiny()
    here, there = (train(before, "auto:50%", device=device) for device in (CPU, accelerator()))
    assert there.facts is not None and here.facts is not None
    assert there.facts.device == torch.cuda.get_device_name(accelerator())
    assert all(value.device == CPU for _, value in named_tensors(there.program.module))
    for (_, mine), (_, its) in zip(here.facts.recovery.guard_kl, there.facts.recovery.guard_kl, strict=True):
        assert its == pytest.approx(mine, rel=0.05)


def test_a_gpu_samples_tokens_of_the_vocabulary() -> None:
    program = tiny()
    with lent(accelerator(), program):
        text = sample_text(program, 0, sequences=3, length=12)
    assert text.tokens.shape == (3, 12) and text.tokens.device == CPU

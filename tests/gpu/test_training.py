"""Training on a GPU comes to what it comes to on a CPU, within the rounding of TensorFloat-32."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from memc.program import named_tensors
from memc.train.device import CPU, accelerator, lent
from memc.train.parallel import whole
from memc.train.sharding import Sharded
from memc.verify import sample_text
from tests.passes.tiny_program import tiny
from tests.train.processes import free_port
from tests.train.test_sharding import recovery_of
from tests.train.test_trainer import few_tokens, train
from tests.train.tiny_training import packed

few_tokens = pytest.fixture(autouse=True)(few_tokens)


@pytest.mark.parametrize("shard", ["never", "always"])
def test_training_on_a_gpu_comes_to_the_same(shard: str) -> None:
    before = tiny()
    here, there = (train(before, "auto:50%", device=device, shard=shard) for device in (CPU, accelerator()))
    assert there.facts is not None and here.facts is not None
    assert there.facts.device == torch.cuda.get_device_name(accelerator())
    assert all(value.device == CPU for _, value in named_tensors(there.program.module))
    for (_, mine), (_, its) in zip(here.facts.recovery.guard_kl, there.facts.recovery.guard_kl, strict=True):
        assert its == pytest.approx(mine, rel=0.05)


def test_shares_on_a_gpu_give_the_same_logits_and_gradients() -> None:
    recovery, batch = recovery_of("everything"), packed(2, 3)
    there = [part.to(accelerator()) for part in batch]
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        programs = Sharded(recovery.before, recovery.after, recovery.rates, None, accelerator(), 1)
        found = programs(*there)
        found[1].square().mean().backward()
        slopes = {name: whole(share.grad).cpu() for name, share in programs.trained.items() if share.grad is not None}
    finally:
        dist.destroy_process_group()
    wanted = [program.run(*batch) for program in (recovery.before, recovery.after)]
    wanted[1].square().mean().backward()
    for mine, its in zip(wanted, found, strict=True):
        torch.testing.assert_close(its.detach().cpu(), mine.detach(), rtol=1e-2, atol=1e-2)
    for name, slope in slopes.items():
        torch.testing.assert_close(
            slope, recovery.after.module.get_parameter(name).grad, rtol=1e-2, atol=1e-2, msg=name
        )


def test_a_gpu_samples_tokens_of_the_vocabulary() -> None:
    program = tiny()
    with lent(accelerator(), program):
        text = sample_text(program, 0, sequences=3, length=12)
    assert text.tokens.shape == (3, 12) and text.tokens.device == CPU

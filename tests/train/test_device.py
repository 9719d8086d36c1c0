"""Training elsewhere than where programs live: everything goes there together, and comes back where it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memc.program import Program, named_tensors
from memc.recipe import Shard
from memc.train.device import CPU, FILLED, TRAINED, Streamed, accelerator, lent, name_of, too_large
from tests.core.tiny import tiny_program
from tests.passes.tiny_program import tiny, tokens_of
from tests.train.test_trainer import facts_of, few_tokens, train
from tests.train.tiny_training import TEACHERS, linearized, tensors_of

ELSEWHERE = torch.device("cpu", 0)
"""The CPU by another name: whoever goes by what a device is called takes it for another one."""

few_tokens = pytest.fixture(autouse=True)(few_tokens)


def everything(program: Program) -> dict[str, Tensor]:
    return dict(named_tensors(program.module))


def test_training_elsewhere_comes_to_the_same_and_back() -> None:
    before = tiny()
    here = train(before, "auto:50%")
    for shard in ("never", "always"):  # with all weights there, and with those of the original at home
        there = train(before, "auto:50%", device=ELSEWHERE, shard=shard)
        for name, value in tensors_of(here.program).items():
            torch.testing.assert_close(tensors_of(there.program)[name], value, rtol=0, atol=0)
        assert facts_of(here) == facts_of(there)


def test_what_is_lent_comes_back_to_its_own_storage_unless_it_changed() -> None:
    program = tiny_program()
    tensors = everything(program)
    storage = {name: value.data_ptr() for name, value in tensors.items()}
    changed = next(name for name in tensors if name.endswith(("down_proj.weight", "down.weight")))
    with lent(ELSEWHERE, program), torch.no_grad():
        tensors[changed].data = tensors[changed] + 1
    after = everything(program)
    assert all(after[name] is value for name, value in tensors.items())
    assert {name for name, value in after.items() if value.data_ptr() != storage[name]} == {changed}


def test_what_is_lent_comes_back_when_training_fails() -> None:
    program, precision = tiny(), torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), lent(ELSEWHERE, program):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == precision
    assert all(value.device == CPU for value in everything(program).values())


@pytest.mark.parametrize("options", TEACHERS, ids=str)
def test_a_program_makes_nothing_where_it_is_not(options: dict[str, object]) -> None:
    # Tensors of the device `meta` hold no values, and do not mix with those of another device.
    program, _ = linearized(tiny(**options))
    program.module.to("meta")
    program.make_tensors_on(torch.device("meta"))
    tokens = tokens_of(2, 24).to("meta")
    assert program.run(tokens).device.type == "meta"


def test_without_a_gpu_training_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accelerator(3) == CPU
    assert name_of(CPU) == "cpu"


def test_processes_share_the_gpus_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [accelerator(rank).index for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("options", TEACHERS, ids=str)
def test_every_op_is_given_what_is_at_home(options: dict[str, object]) -> None:
    program, _ = linearized(tiny(**options))
    program.make_tensors_on(torch.device("meta"))
    tokens = tokens_of(2, 24).to("meta")
    with Streamed(torch.device("meta")):
        assert program.run(tokens).device.type == "meta"
    assert all(value.device == CPU for value in everything(program).values())


def test_what_is_too_large_is_known_from_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny()
    learns = next(program.module.parameters())
    held = sum({id(value): value.nbytes for value in everything(program).values()}.values())

    def said(total: float | None, products: torch.dtype | None = None, shard: Shard = "auto") -> bool:
        monkeypatch.setattr("memc.train.device.memory_bytes", lambda: total)
        return too_large(shard, CPU, [program, program.copy()], products, [learns])

    least = (held + TRAINED * learns.nbytes) / FILLED
    assert not said(least + 2) and said(least - 2) and not said(None)
    assert said(least + 2, torch.bfloat16) and not said(least + 2, torch.float32)
    assert said(None, shard="always") and not said(0, shard="never")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert said(least + 2) and not said(2 * least + 4)

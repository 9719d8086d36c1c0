"""A conversion that is there to be faster is timed beside the original, and refused when it is slower."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from memc import api
from memc.backend import LowerOptions, Runner, RunState
from memc.backends.eager import EagerBackend
from memc.conversion import speed
from memc.conversion.lowering import lower
from memc.conversion.speed import SPEED_CHECKS, check_speed, lowered_beside, speed_budgets
from memc.errors import MemcError
from memc.passes.prune import Prune
from memc.passes.window import Window
from memc.plugins import load_kernels
from memc.program import Program
from memc.recipe import Recipe
from memc.target import get_target
from memc.verify import CheckResult
from tests.core.converting import make_llama
from tests.core.runtime_fakes import FakeRunner, make_manifest
from tests.core.tiny import TinyConfig, tiny_program

PROMISED = dict.fromkeys(SPEED_CHECKS, 1.0)


class Slowed(Runner):
    """A runner that takes so many seconds of the processor more for a call."""

    def __init__(self, inner: Runner, seconds: float) -> None:
        self.inner, self.manifest, self.seconds = inner, inner.manifest, seconds

    def new_state(self, batch: int, capacity: int | None = None) -> RunState:
        return self.inner.new_state(batch, capacity)

    def restore(self, arrays: Any, capacity: int | None = None) -> RunState:
        return self.inner.restore(arrays, capacity)

    def run(self, *args: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return self.inner.run(*args, **kwargs)


def timed(original: Program, result: Program, place: Path, budgets: dict[str, float], seconds: float = 0.0) -> Any:
    load_kernels()
    backend, target, options = EagerBackend(), get_target("cpu"), LowerOptions("fp32", threads=1)
    _, manifest = lower(result, backend, target, place, options)
    runner = Slowed(backend.load(place, manifest, 1), seconds)
    with lowered_beside(original, place, backend, target, options) as dense:
        found = check_speed(runner, dense, original.model.vocab_size or 1, budgets)
    assert [check.name for check in found] == list(SPEED_CHECKS)
    assert not (place / "original").exists()
    return found


def test_what_is_slower_breaks_the_promise(tmp_path: Path) -> None:
    program = tiny_program()
    checks: list[CheckResult] = timed(program, program, tmp_path, PROMISED, seconds=0.02)
    assert [check.passed for check in checks] == [False, False]
    assert all(check.value > 1.5 and check.budget is not None and check.budget < 1.5 for check in checks)


def test_what_is_faster_keeps_it(tmp_path: Path) -> None:
    checks = timed(tiny_program(TinyConfig(layers=8)), tiny_program(), tmp_path, PROMISED)
    assert [check.passed for check in checks] == [True, True]
    assert all(check.value < 0.7 for check in checks)


def test_without_a_promise_time_is_measured(tmp_path: Path) -> None:
    program = tiny_program()
    checks = timed(program, program, tmp_path, {}, seconds=0.02)
    assert all(check.passed and check.budget is None for check in checks)


def test_a_promise_needs_every_pass_and_gives_way_to_the_recipe() -> None:
    prune = Prune(amount=0.1)
    assert speed_budgets([prune], {}) == PROMISED
    assert speed_budgets([prune], {"decode_time_ratio": 0.8, "kl_mean": 1.0}) == {**PROMISED, "decode_time_ratio": 0.8}
    assert speed_budgets([prune, Window()], {}) == speed_budgets([], {}) == speed_budgets([Prune(amount=0.0)], {}) == {}


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_conversion_that_is_too_slow_is_refused(dry_run: bool, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    budgets = {"decode_time_ratio": 0.01}
    recipe = Recipe.model_validate({"recipe": 1, "verify": {"budgets": budgets}})
    passes = ["prune:amount=0.25,round=8,protect=none,refit=false,score=magnitude"]
    with pytest.raises(MemcError, match="E401 check decode_time_ratio failed"):
        api.convert(model, tmp_path / "out", passes=passes, recipe=recipe, backend="eager", threads=1, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_time_is_modelled(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "llama")
    document = api.convert(model, tmp_path / "out", passes=["prune:amount=0.25,round=8,protect=none"], dry_run=True)
    (check,) = document.checks
    assert check.name == "decode_time_ratio" and check.passed and check.value < 1
    assert check.detail.startswith("modelled")


def test_tokens_are_timed_where_there_is_room_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Steady(FakeRunner):
        def restore(self, arrays: Any, capacity: int | None = None) -> Any:
            self.given = {name: array.shape for name, array in arrays.items()}
            return self.new_state(1, capacity)

        def run(self, *args: Any, **kwargs: Any) -> Any:
            end = time.process_time() + 0.002
            while time.process_time() < end:
                pass
            return super().run(*args, **kwargs)

    runner = Steady(make_manifest(capacity=600))
    short = Steady(make_manifest(capacity=200))
    found, other = speed.decode_times([runner, short], (128, 4096, 512), threads=1)
    assert list(found) == [128, 512] and min(found.values()) >= 2.0
    assert list(other) == [128]
    assert runner.given == {"hidden": (1, 8)}
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    assert speed.decode_times([runner], (128, 512), threads=1) == [{}]
    monkeypatch.setattr(speed, "SECONDS", 60.0)
    monkeypatch.setattr("memc.machine.memory_bytes", lambda: 100)
    assert speed.decode_times([runner], (128, 512), threads=1) == [{}], "no memory for a copy of the states"


def test_what_a_call_costs_that_computes_nothing_is_no_difference() -> None:
    """A twentieth of a millisecond decides of a model that takes three tenths, and not of one that takes thirty."""
    for dense, mine, passed in ((3e-4, 3.3e-4, True), (3e-4, 4e-4, False), (3e-2, 3.1e-2, False)):
        check = speed._compare("decode_time_ratio", "token", [[mine], [dense], [dense]], PROMISED)
        assert check.passed == passed

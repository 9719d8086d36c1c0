"""Learning rate, curve and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memc.errors import MemcError
from memc.train import loop
from memc.train.loop import Checkpoints, Curve, Schedule

STATE = {"x": torch.arange(3.0)}


def test_the_rate_rises_and_falls() -> None:
    rates = [Schedule(100).share(step) for step in range(100)]
    assert rates[9] == 1.0 and rates[0] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, rel=0.01) and Schedule(1).share(0) == 1.0


def test_a_curve_that_was_kept_goes_on_within_a_point() -> None:
    whole, parts = Curve(), Curve()
    for step in range(9):
        whole.add(step, {"a": float(step)}, every=4)
        parts.add(step, {"a": float(step)}, every=4)
        parts = Curve.of(parts.to_json())
    assert parts == whole and whole.steps == [4, 8] and whole.losses == {"a": [1.5, 5.5]}


def test_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {"seed": 1})
    assert checkpoints.load() is None
    for step in (0, 3, 12):
        checkpoints.save(step, {"x": torch.full((2,), float(step))}, {"more": step})
    step, tensors, facts = checkpoints.load() or (None, {}, {})
    assert (step, tensors["x"].tolist(), facts["more"]) == (12, [12.0, 12.0], 12)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000012"]


def test_a_checkpoint_can_be_written_again_and_leftovers_go(tmp_path: Path) -> None:
    """A kill may come after a checkpoint is written and before anything else is, or before the old one is removed."""
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(4, STATE, {})
    checkpoints.save(4, STATE, {})
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "writing").mkdir()
    checkpoints.save(6, STATE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize(
    ("old", "said"),
    [({"seed": 1, "data": "a"}, "seed 1, wanted 2"), ({"seed": 2, "data": "a", "more": 3}, "more 3, wanted None")],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, old: dict[str, Any], said: str) -> None:
    Checkpoints(tmp_path, old).save(1, STATE, {})
    with pytest.raises(MemcError, match=f"E204.*another training: {said}"):
        Checkpoints(tmp_path, {"seed": 2, "data": "a"}).load()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, {})
    checkpoints.save(1, STATE, {})

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "write_tensors", full)
    with pytest.raises(MemcError, match=r"E502.*No space left"):
        checkpoints.save(2, STATE, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert (checkpoints.load() or (None,))[0] == 1


@pytest.mark.parametrize(
    ("gradient", "peak", "said"), [(float("nan"), 1.0, "gradient"), (1.0, float("inf"), "a parameter")]
)
def test_a_step_that_breaks_is_named(gradient: float, peak: float, said: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    made = loop.optimiser([{"params": [parameter], "peak": peak}])
    parameter.grad = torch.tensor([1.0, gradient])
    with pytest.raises(MemcError, match=f"E403.*{said} is not finite at step 7 \\[layer 3"):
        loop.step_optimiser(made, 1.0, "layer 3", 7)

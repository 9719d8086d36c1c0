"""Measuring the machine: on models so small that the figures mean nothing, and what is done with figures that do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memc import calibrate as c
from memc import machine
from memc.cli import main
from memc.cost import predict
from memc.errors import MemcError
from memc.report.tools import CalibrateDocument
from memc.target import Target, get_target, targets, write_target
from tests.core.runtime_fakes import FakeRunner, make_manifest
from tests.core.tiny import tiny_program

SMALL = c.Scale(weight_bytes=1 << 16, state_bytes=1 << 18, file_bytes=1 << 16)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    targets.cache_clear()
    yield tmp_path / "memc" / "targets"
    targets.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NARROW", "LAYER", "LONG"):
        monkeypatch.setattr(c, name, c.Shape(hidden=64, inner=64, layers=1, heads=2, kv_heads=1))
    monkeypatch.setattr(c, "CHOICE", 512)


def check_rates(after: Target, before: Target) -> None:
    assert after.memory_bandwidth and after.state_bandwidth and after.disk_bandwidth
    assert after.state_bandwidth <= after.memory_bandwidth
    assert set(after.flops) == {"fp32", *c.QUANTISED} and min(after.flops.values()) > 0
    assert set(after.prompt_flops) == set(c.QUANTISED) and min(after.prompt_flops.values(), default=1) > 0
    assert set(after.prompt_ops) == set(before.prompt_ops) == set(c.IN_PROMPTS) and min(after.prompt_ops.values()) > 0
    assert 0 < after.launch_overhead < 1e-2
    assert (after.name, after.backend, after.kind) == (before.name, before.backend, before.kind)
    assert "measured on" in after.description


def test_every_rate_is_measured(small: None, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = get_target("cpu").model_copy(update={"backend": "eager"})
    write_target(mine, own_folder / "cpu.toml")
    monkeypatch.setattr(c, "QUANTISED", ())
    check_rates(c.calibrate(threads=1, scale=SMALL), mine)


@pytest.mark.conformance
def test_every_rate_is_measured_on_the_lowered_models(small: None) -> None:
    check_rates(c.calibrate(threads=1, scale=SMALL), get_target("cpu"))


class Steady(FakeRunner):
    """Takes so many seconds of the processor for a call."""

    seconds = 0.004

    def restore(self, arrays: Any, capacity: int | None = None) -> Any:
        return self.new_state(1, capacity)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return super().run(*args, **kwargs)


def test_a_step_takes_what_the_runner_takes() -> None:
    probe = c.Probe(tiny_program(), Steady(make_manifest()), 1)
    assert probe.step_seconds(5) == pytest.approx(Steady.seconds, rel=0.5)
    assert probe.prompt_seconds(3) == pytest.approx(Steady.seconds, rel=0.5)


def test_states_are_random_and_as_long_as_the_context() -> None:
    manifest = make_manifest(
        states=[
            {"input": "k", "output": "k.next", "dtype": "float32", "shape": ["B", 2, "S", 8], "grows": 2},
            {"input": "n", "output": "n.next", "dtype": "int64", "shape": ["B", "S/16"], "grows": 1},
        ]
    )
    made = c.random_states(manifest, 33)
    assert made["k"].shape == (1, 2, 33, 8) and made["n"].shape == (1, 3)
    assert np.std(made["k"]) > 0.05 and made["n"].dtype == np.int64


def test_too_little_memory_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    with pytest.raises(MemcError, match="E501"):
        c.calibrate(scale=c.Scale())


def test_state_is_read_at_its_own_rate_and_weights_at_theirs() -> None:
    program, target = tiny_program(), get_target("cpu")

    def ms(**rates: Any) -> dict[int, float]:
        found: Target = target.model_copy(update={"launch_overhead": 0.0, "flops": {"fp32": 1e15}, **rates})
        return predict(program, found, (64, 4096), threads=1).decode_ms

    both = ms(memory_bandwidth=1e9, state_bandwidth=None)
    slow = ms(memory_bandwidth=1e9, state_bandwidth=1e8)
    light = ms(memory_bandwidth=1e30, state_bandwidth=1e9)
    for context in (64, 4096):
        assert slow[context] - both[context] == pytest.approx(9 * light[context])


def test_the_command_writes_the_target_that_predictions_use(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = get_target("cpu")
    found = before.model_copy(update={"memory_bandwidth": 5e9, "description": "measured"})
    monkeypatch.setattr(c, "calibrate", lambda **options: found)
    assert main(["targets", "calibrate", "--threads", "1", "-o", str(tmp_path / "mine.toml")]) == 0
    shown = capsys.readouterr().out.replace("\n", "")  # a long path is folded
    assert "12 GB/s" in shown and "5 GB/s" in shown and "mine.toml" in shown
    assert get_target("cpu") == before
    assert main(["targets", "calibrate", "--json", "-q"]) == 0
    document = CalibrateDocument.model_validate_json(capsys.readouterr().out)
    assert document.path == str(own_folder / "cpu.toml")
    assert (document.before.memory_bandwidth, document.after.memory_bandwidth) == (1.2e10, 5e9)
    assert get_target("cpu") == found

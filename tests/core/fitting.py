"""A small model's menu: settings, a target, and text for what learns from it."""

from __future__ import annotations

from typing import Any

from memc.fit import menu
from memc.passes.linearize import Linearize
from memc.passes.prune import Prune
from memc.passes.sparsify import Sparsify
from memc.passes.window import Window
from memc.pipeline import Calibration, Pass
from memc.target import Target
from memc.verify.inputs import positions_of
from tests.passes.tiny_program import tokens_of

WEIGHTS = ("fp32", "int8", "int4")

LENGTH = 40

TARGET = Target(
    name="cpu",
    description="test",
    kind="cpu",
    backend="eager",
    instruction_set="any",
    memory_bandwidth=1e9,
    flops={"fp32": 1e9},
)

SETTINGS: tuple[Pass, ...] = (
    Prune(amount=0.2, unit="ffn", of="layers", alike=True, protect="none", round=1, sequences=8, length=LENGTH),
    Linearize(window=3, sinks=1, feature_size=8, start="fitted"),
    Window(window=3, sinks=1),
    Window(window=9, sinks=1),
    Sparsify(budget=12, page=4, sinks=1, window=2, dense_below=0, method="bounds"),
)

PRESENT = {"attention": (0, 1), "feed_forward": (0, 1)}

CALIBRATION = tokens_of(8, LENGTH, 7)


def calibrate(count: int, length: int) -> Calibration:
    tokens = CALIBRATION[:count, :length]
    return Calibration(tokens, positions_of(tokens), "random tokens")


def on_offer(original: Any) -> list[menu.Setting]:
    plans = [(one, one.plan(original, TARGET)) for one in SETTINGS]
    return [menu.Setting(one, plan) for one, plan in plans if plan.sites]

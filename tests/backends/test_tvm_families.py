"""Captured families run in the tvm backend as in the program, unrewritten and after each pass that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tvm_support import build

from tests.backends.runs import SCENARIOS, compare
from tests.backends.test_families_lowered import KEYS, SPARSE, rewrite
from tests.core.test_families import raised

TOLERANCE = 1e-4
FAMILIES = ("llama", "gemma2", "phi3", "bloom", "gpt2")
PASSES = ("", "window:window=4,sinks=2", "linearize:window=4,sinks=2,feature_size=12", KEYS, SPARSE)
QUICK = {("gpt2", ""), ("llama", PASSES[2]), ("phi3", KEYS), ("gemma2", SPARSE)}

FORMS = (
    f"{SPARSE},method=hip,refresh=2",
    f"{SPARSE},method=landmark,rerank=1,mass=0.7",
    f"{SPARSE},method=bounds,bits=4,retrieve=heads:50%",
    "sparsify:budget=8,page=2,sinks=1,window=2,dense_below=3,method=longheads",
)
"""What else one family runs: its attentions have rotary positions and groups of heads."""

REJECTED = {("phi3", SPARSE), *(("bloom", spec) for spec in (KEYS, SPARSE))}
"""Where a pass takes no layer: Phi-3's all slide; BLOOM has ALiBi, and its keys share one axis with its values."""

CASES = [
    pytest.param(name, spec, marks=() if (name, spec) in QUICK else pytest.mark.conformance)
    for name in FAMILIES
    for spec in PASSES
] + [pytest.param("llama", spec, marks=pytest.mark.conformance) for spec in FORMS]


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_a_family_runs_compiled(name: str, spec: str, tmp_path: Path) -> None:
    program = rewrite(name, spec) if spec else raised(name)[0].program
    assert (program is None) == ((name, spec) in REJECTED)
    if program is None:
        return
    runner = build(program, tmp_path)
    for scenario in ("prompt", "pieces", "padding"):
        assert compare(program, runner, SCENARIOS[scenario]) < TOLERANCE, scenario

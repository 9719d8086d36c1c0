"""Artifacts that choose what they read are checked where they choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import memc
from memc import api
from memc.recipe import Recipe
from memc.verify import VerificationText, past
from tests.core.converting import TRAINED

SPARSE = "sparsify:method=bounds,budget=16,page=4,sinks=1,window=5,dense_below=24"
COMPENSATED = "method=bounds,retrieve=heads:[0.1],stream_window=6,compensation=true"


@pytest.mark.parametrize("backend", ["eager", "onnx"])
def test_a_sparse_artifact_is_checked_where_it_chooses(llama: Path, tmp_path: Path, backend: str) -> None:
    recipe = Recipe(recipe=1)
    document = api.convert(llama, tmp_path / "out", passes=[SPARSE], backend=backend, recipe=recipe, context=100)
    assert document.verified
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    close, ratio = document.passes[0].relations
    assert (close.tokens, close.passed) == (24, True)
    assert ratio.value is not None and ratio.value != 1.0, "measured past what is read whole"
    page_bytes = 2 * 2 * 2 * 10 * 4
    assert document.original is not None
    for context, held in document.predicted.state_bytes.items():
        assert held - document.original.state_bytes[context] == -(-context // 4) * page_bytes
        less = document.original.bytes_read_per_token[context] - document.predicted.bytes_read_per_token[context]
        assert less == 2 * 2 * 10 * 4 * (2 * context - 2 * -(-context // 4) - 2 * 16 - 16)
    session = memc.load(tmp_path / "out")
    assert session.generate("w1 w2 w3", max_new_tokens=40, seed=1).ids


@pytest.mark.parametrize(
    ("chosen_by", "exact", "backend"),
    [
        ("method=bounds,bits=4,rerank=2", 4, "eager"),
        ("method=bounds,bits=4,rerank=2", 4, "onnx"),
        ("method=hip,refresh=4,rerank=1", 24, "eager"),
        ("method=bounds,levels=2,beam=1", 24, "onnx"),
        ("method=lowbit,refresh=4,mass=0.6", 24, "onnx"),
        ("method=em,rerank=1,longest=4,calls=9", 24, "onnx"),
        (COMPENSATED, 6, "onnx"),
        (COMPENSATED, 6, "tvm"),
        pytest.param(
            "method=em,rerank=1,longest=4,calls=9,refine=conductance", 24, "tvm", marks=pytest.mark.conformance
        ),
    ],
)
def test_an_artifact_with_a_state_of_its_own_is_checked_saved_and_restored(
    llama: Path, tmp_path: Path, chosen_by: str, exact: int, backend: str
) -> None:
    spec, recipe = SPARSE.replace("method=bounds", chosen_by), Recipe(recipe=1)
    document = api.convert(llama, tmp_path / "out", passes=[spec], backend=backend, recipe=recipe, context=100)
    assert document.verified
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    close, _ = document.passes[0].relations
    assert (close.tokens, close.passed) == (exact, True), "with bits a page"
    session = memc.load(tmp_path / "out")
    state = session.new_state()
    session.prefill([list(range(1, 28))], state)
    session.save(state, tmp_path / "state.npz")
    again = session.load_state(tmp_path / "state.npz")
    for token in (3, 5):
        assert np.array_equal(session.step([token], state), session.step([token], again))


@pytest.mark.parametrize(("method", "backend"), [("longheads", "onnx"), ("infllm", "eager")])
def test_an_artifact_runs_beyond_the_trained_length(llama: Path, tmp_path: Path, method: str, backend: str) -> None:
    spec = f"sparsify:method={method},budget=32,page=4,sinks=1,window=8,dense_below=0"
    options = {"backend": backend, "recipe": Recipe(recipe=1), "context": 8 * TRAINED}
    document = api.convert(llama, tmp_path / "out", passes=[spec], **options)
    assert document.verified and not document.warnings
    checks = {check.name: check for check in document.checks}
    assert {"split_invariance", "lowered_logits", "lowered_choice"} <= set(checks)
    session = memc.load(tmp_path / "out")
    state = session.new_state()
    session.prefill([[n % 30 for n in range(8 * TRAINED - 2)]], state)
    assert np.isfinite(session.step([3], state)).all()
    for others in (f"{spec},keep=[0]", SPARSE):
        (warning,) = api.convert(llama, tmp_path / "other", passes=[others], dry_run=True, **options).warnings
        assert warning.startswith(f"beyond_trained: context {8 * TRAINED}")


def test_a_relation_is_measured_past_what_is_exact() -> None:
    tokens = torch.arange(80).reshape(2, 40)
    text = VerificationText(tokens, "made")
    assert past(text, None, None) is text and past(text, 39, None) is text
    longer = past(text, 100, None)
    assert longer.tokens.shape == (1, 356) and torch.equal(longer.tokens[0, :160], torch.arange(80).repeat(2))
    assert longer.origin == "made, repeated to 356 tokens"
    assert past(text, 100, 128).tokens.shape == (1, 128)
    assert past(text, 100, 90) is text

"""Sparsify with heads that stream: equations, identity, state law, lowering, states, and which heads are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.conversion.pipeline import Pipeline
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.pipeline import parse_spec
from memc.relation import Close
from memc.report.files import HeadFacts
from memc.sites import listed_groups
from memc.verify import VerificationText, well_formed
from tests.backends.onnx_support import SCENARIOS, build, compare
from tests.core.test_heads import VOCAB, planted
from tests.passes.test_sparsify import SMALL, VARIANTS, chosen_softmax, rewrite
from tests.passes.tiny_program import TARGET, Attention, masked_softmax, naive_run, run_pieces, tiny, tokens_of

MIXED = {**SMALL, "retrieve": "heads:[0.1]", "stream_window": 5}


def by_head(retrieving: set[tuple[int, int]], stream_window: int, **options: Any) -> Attention:
    """What the oracle chooses in the heads that retrieve, sinks and window in the others."""
    far, near = chosen_softmax(**options), masked_softmax(stream_window, options["sinks"])

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        size = block.num_heads // block.num_kv_heads
        groups = torch.tensor([(block.layer, h // size) in retrieving for h in range(block.num_heads)])
        return torch.where(groups[:, None, None], far(a, block, hidden), near(a, block, hidden))

    return attention


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["bounds", "lowbit"])
def test_heads_that_stream_read_sinks_and_window(variant: str, method: str) -> None:
    program, tokens = tiny(**VARIANTS[variant]), tokens_of(2, 30)
    options = {**SMALL, "method": method, "channels": 2, "rerank": 2}
    result = rewrite(program, **{**MIXED, **options}).run(tokens)
    expected = naive_run(program, by_head({(0, 1)}, 5, **options), tokens)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    wrong = naive_run(program, by_head({(0, 0)}, 5, **options), tokens)
    assert (result - wrong).abs().max() > 1e-3


@settings(max_examples=6, deadline=None)
@given(
    retrieving=st.sets(st.integers(0, 2)),
    window=st.integers(2, 9),
    cuts=st.lists(st.integers(1, 29), max_size=4),
)
def test_any_choice_of_heads_keeps_identity_and_state_law(retrieving: set[int], window: int, cuts: list[int]) -> None:
    program = tiny(layers=1, heads=6, kv_heads=3, head_dim=6)
    retrieve = listed_groups((0, group) for group in retrieving)
    result = rewrite(program, **{**MIXED, "retrieve": retrieve, "stream_window": window})
    short = tokens_of(2, window, seed=window)
    torch.testing.assert_close(result.run(short), program.run(short), atol=1e-5, rtol=0)
    tokens = tokens_of(2, 30)
    positions = torch.arange(30).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("retrieve", ["heads:[0.1]", "heads:[0.0,0.1,1.1]", "heads:[]"])
@pytest.mark.parametrize("variant", ["plain", "sink_logits"])
def test_layers_of_both_kinds_run_in_onnx(retrieve: str, variant: str, tmp_path: Path) -> None:
    result = rewrite(tiny(**VARIANTS[variant]), **{**MIXED, "retrieve": retrieve})
    runner = build(result, tmp_path)
    for name, calls in SCENARIOS.items():
        assert compare(result, runner, calls) < 1e-4, name


def test_only_the_states_of_heads_that_retrieve_grow() -> None:
    program = tiny()
    result = rewrite(program, **MIXED)
    assert well_formed(result) == []
    shapes = {spec.name: spec.shape for spec in result.states}
    assert shapes["layer0_key"] == ("B", 1, "S", 10) and shapes["layer0_pages"] == ("B", 1, "S/3", 10, 3)
    assert shapes["layer0_key_window"] == ("B", 1, 6, 10) and shapes["layer1_key"] == ("B", 2, 6, 10)
    grown = result.state_bytes(3000) - result.state_bytes(0)
    # Of the four key-value heads one grows, by key, value and the copy of the key.
    assert grown == 3000 * (3 * 10 * 4 + 8)
    assert grown < (program.state_bytes(3000) - program.state_bytes(0)) / 2


def test_exactness_ends_with_the_window_of_the_heads_that_stream() -> None:
    relations = Sparsify(**MIXED).plan(tiny(), TARGET).relations
    assert relations[0] == Close(1e-4, tokens=5)
    assert Sparsify(**SMALL).plan(tiny(), TARGET).relations[0] == Close(1e-4, tokens=12)


def test_the_share_is_settled_by_the_weights_and_reported(tmp_path: Path) -> None:
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    spec = "sparsify:budget=8,page=2,sinks=1,window=2,dense_below=0,stream_window=4,retrieve=heads:50%"
    text = VerificationText(tokens, "random")
    result, (run,) = Pipeline([parse_spec(spec)], TARGET, text, folder=tmp_path).run(planted())
    assert run.report.spec.endswith("retrieve=heads:[1.1],stream_window=4")
    facts = HeadFacts.model_validate(run.report.details["heads"])
    assert [(layer.layer, layer.kept) for layer in facts.layers] == [(0, []), (1, [1])]
    assert run.report.details["1"]["retrieving"] == [1]
    assert [(site.layer, site.kept) for site in run.report.sites] == [(1, [1])]
    shapes = {spec.name: spec.shape for spec in result.states}
    assert shapes["layer1_key"] == ("B", 1, "S", VOCAB) and shapes["layer1_key_window"] == ("B", 1, 5, VOCAB)


@pytest.mark.parametrize(
    ("retrieve", "reason"),
    [
        ("some", "'retrieve' is all"),
        ("heads:0%", "'retrieve' names heads as"),
        ("heads:[0.2]", "'retrieve' names key-value head 0.2"),
    ],
)
def test_heads_that_are_not_there_are_refused(retrieve: str, reason: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        Sparsify(**{**MIXED, "retrieve": retrieve}).plan(tiny(), TARGET)

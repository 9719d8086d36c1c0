"""Sparsify where the decay with the distance tells which heads retrieve: its areas, who is chosen, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.analysis import decay
from memc.analysis.decay import LayerDecay, areas, farthest, head_decay
from memc.analysis.heads import SEQUENCES, repeated_tokens
from memc.blocks import AttentionBlock
from memc.conversion.pipeline import Pipeline
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.pipeline import parse_spec
from memc.program import Program
from memc.report.files import HeadFacts
from memc.sites import attention_blocks
from memc.verify import VerificationText
from memc.verify.inputs import token_limit
from tests.core.test_heads import planted
from tests.passes.test_sparsify import SMALL, VARIANTS, rewrite
from tests.passes.tiny_program import TARGET, naive_run, tiny, tokens_of

OPEN: dict[str, Any] = {**SMALL, "retrieve": "decay:50%", "stream_window": 5}


def turned(x: Tensor, at: int, inv_freq: Tensor) -> Tensor:
    """Rotate the halves of one vector, as complex numbers."""
    half = len(inv_freq)
    pairs = torch.complex(x[:half], x[half : 2 * half]) * torch.exp(1j * at * inv_freq)
    return torch.cat([pairs.real, pairs.imag, x[2 * half :]])


def formula(program: Program, distances: int) -> list[Tensor]:
    """Return the area ``[H]`` of each layer, head by head and key by key."""
    rows, _ = repeated_tokens(token_limit(program), program.model.max_positions)
    found = [torch.zeros(block.num_heads, dtype=torch.float64) for block in attention_blocks(program)]
    inv_freq = next(t for n, t in program.module.named_buffers() if "inv_freq" in n).double()

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        size = block.num_heads // block.num_kv_heads
        for h in range(block.num_heads):
            query = turned(a["query_pre_rotary"][0, h].mean(0), distances - 1, inv_freq)
            mean = a["key_pre_rotary"][0, h // size].mean(0)
            s = torch.stack([query @ turned(mean, at, inv_freq) for at in range(distances)]) * a["scale"]
            if a["softcap"]:
                s = a["softcap"] * torch.tanh(s / a["softcap"])
            total = s.exp().sum() + (0 if a["sink_logits"] is None else a["sink_logits"][h].exp())
            sums = [s[: at + 1].exp().sum() / total for at in range(distances)]
            found[block.layer][h] += torch.stack(sums).mean() / SEQUENCES
        return torch.zeros_like(a["query"])

    for row in rows:
        naive_run(program, attention, row[None])
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_areas_are_those_of_the_formula(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decay, "DISTANCES", 30)
    program = tiny(layers=1, **VARIANTS[variant])
    (found,) = head_decay(program)
    (wanted,) = formula(program, 30)
    torch.testing.assert_close(torch.tensor(found.areas, dtype=torch.float64), wanted, atol=1e-6, rtol=0)


def test_attention_to_all_keys_alike_has_half_the_area() -> None:
    one = torch.ones(1, 2, 4, 6)
    a: dict[str, Any] = {"query": one, "key": one, "scale": 1.0, "softcap": 0.0, "window": 0, "chunk": 0, "prefix": 0}
    a |= {"slopes": None, "sink_logits": None}
    torch.testing.assert_close(areas(a, None, 9), torch.full((2,), 5 / 9))
    near = {**a, "window": 1}
    torch.testing.assert_close(areas(near, None, 9), torch.full((2,), 1 / 9))


def test_models_without_rotation_decay_nowhere() -> None:
    first, second = head_decay(planted())
    assert first.of_groups[0] < 0.01  # its window is two tokens
    assert second.of_groups == pytest.approx((0.5 * (1 + 1 / 500),) * 2)


def test_the_mean_of_the_query_heads_speaks_for_their_group() -> None:
    layers = (LayerDecay(0, "a", 2, (0.1, 0.5, 0.2, 0.2)), LayerDecay(1, "b", 2, (0.4, 0.0, 0.6, 0.6)))
    assert layers[0].of_groups == pytest.approx((0.3, 0.2))
    assert farthest(layers, 0.5, [(0, "a"), (1, "b")]) == [(0, 0), (1, 1)]
    assert farthest(layers, 0.5, [(0, "a")]) == [(0, 0)]


def test_the_share_is_settled_by_the_weights_and_reported(tmp_path: Path) -> None:
    program, text = tiny(), VerificationText(tokens_of(2, 12), "random")
    layers = head_decay(program)
    kept = farthest(layers, 0.25, [(one.layer, one.path) for one in layers])
    spec = "sparsify:budget=12,page=3,sinks=1,window=4,rerank=1,dense_below=0,stream_window=5,retrieve=decay:25%"
    result, (run,) = Pipeline([parse_spec(spec)], TARGET, text, folder=tmp_path).run(program)
    assert [(site.layer, group) for site in run.report.sites for group in site.kept] == kept
    assert f"retrieve=heads:[{kept[0][0]}.{kept[0][1]}]" in run.report.spec
    facts = HeadFacts.model_validate(run.report.details["heads"])
    assert [(one.layer, tuple(one.decay)) for one in facts.layers] == [(one.layer, one.areas) for one in layers]
    assert [(one.layer, group) for one in facts.layers for group in one.kept] == kept
    named = rewrite(program, **{**OPEN, "retrieve": f"heads:[{kept[0][0]}.{kept[0][1]}]"})
    tokens = tokens_of(2, 30)
    torch.testing.assert_close(result.run(tokens), named.run(tokens), atol=0, rtol=0)


def test_a_plan_spreads_as_many_heads_evenly() -> None:
    open_, named = Sparsify(**OPEN), Sparsify(**{**OPEN, "retrieve": "heads:50%"})
    sites = open_.plan(tiny(), TARGET).sites
    assert sites == named.plan(tiny(), TARGET).sites and sum(len(site.kept) for site in sites) == 2
    settled, _ = open_.resolve(tiny(), TARGET)
    assert settled == replace(open_, retrieve=settled.retrieve) and settled.retrieve.startswith("heads:[")


@pytest.mark.parametrize("retrieve", ["decay", "decay:0%", "decay:100%", "decay:[0.1]"])
def test_what_is_no_share_is_refused(retrieve: str) -> None:
    with pytest.raises(MemcError, match=r"E203.*decay:P%"):
        Sparsify(**{**OPEN, "retrieve": retrieve})

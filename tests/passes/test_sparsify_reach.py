"""Sparsify where text tells which heads retrieve: what is measured, who is chosen, identity and state law."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.analysis import reach
from memc.analysis.reach import Reach, farthest, reaches
from memc.blocks import AttentionBlock
from memc.conversion.pipeline import Pipeline
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.pipeline import Calibration, Plan, parse_spec
from memc.program import Program
from memc.report.files import PassReportFile
from memc.sites import attention_blocks
from memc.verify import VerificationText
from tests.backends.onnx_support import SCENARIOS, build, compare
from tests.passes.test_sparsify import SMALL, VARIANTS, rewrite
from tests.passes.tiny_program import TARGET, naive_run, run_pieces, scores, tiny, tokens_of

WINDOW, SINKS = 5, 1
OPEN: dict[str, Any] = {**SMALL, "retrieve": "reach:50%", "stream_window": WINDOW}


def text_of(batch: int, length: int) -> Calibration:
    tokens = tokens_of(batch, length)
    return Calibration(tokens, torch.arange(length).expand_as(tokens), "a test")


def formula(program: Program, text: Calibration) -> list[Tensor]:
    """Return the mean mass ``[H]`` of each layer on what is neither in the window nor among the sinks."""
    found: list[Tensor] = []

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        s, groups = scores(a), block.num_heads // block.num_kv_heads
        length = s.shape[-1]
        terms = s.exp() * torch.ones(length, length).tril()
        total = terms.sum(-1)
        if a["sink_logits"] is not None:
            total = total + a["sink_logits"].exp()[:, None]
        mean = torch.zeros(block.num_heads, dtype=torch.float64)
        for p in range(WINDOW + SINKS, length):
            mean += (terms[:, :, p, SINKS : p - WINDOW + 1].sum(-1) / total[:, :, p]).sum(0)
        found.append(mean / (len(s) * (length - WINDOW - SINKS)))
        return terms / total[..., None] @ a["value"].repeat_interleave(groups, 1)

    naive_run(program, attention, text.tokens)
    return found


@pytest.mark.parametrize("block", [60, 1 << 22])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mass_is_that_of_the_softmax(variant: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "BLOCK_SCORES", block)
    program, text = tiny(**VARIANTS[variant]), text_of(2, 30)
    found = reaches(program, attention_blocks(program), text, window=WINDOW, sinks=SINKS)
    for one, wanted in zip(found, formula(program, text), strict=True):
        torch.testing.assert_close(torch.tensor(one.beyond, dtype=torch.float64), wanted, atol=1e-6, rtol=0)


def test_the_farthest_query_head_speaks_for_its_group() -> None:
    layers = (Reach(0, 2, (0.1, 0.5, 0.2, 0.3)), Reach(1, 2, (0.4, 0.0, 0.6, 0.6)))
    assert layers[0].of_groups == (0.5, 0.3)
    assert farthest(layers, 0.5) == [(0, 0), (1, 1)]
    assert farthest((Reach(0, 2, (0.0, 0.0)), Reach(1, 2, (0.0, 0.0))), 0.25) == [(0, 0)]


def planned(**options: Any) -> tuple[Program, Sparsify, Plan]:
    program, sparsify = tiny(), Sparsify(**{**OPEN, **options})
    return program, sparsify, sparsify.plan(program, TARGET)


def test_text_chooses_as_many_heads_as_a_plan_spreads() -> None:
    program, sparsify, plan = planned()
    assert sum(len(site.kept) for site in plan.sites) == 2
    without, _ = sparsify.apply(program, plan)
    text = text_of(2, 30)
    result, report = sparsify.apply(program, Plan(plan.spec, plan.sites, plan.rejections, plan.relations, text))
    found = reaches(program, attention_blocks(program), text, window=WINDOW, sinks=SINKS)
    kept = farthest(found, 0.5)
    assert f"retrieve=heads:[{','.join(f'{layer}.{group}' for layer, group in kept)}]" in report.spec
    assert [(site.layer, group) for site in report.sites for group in site.kept] == kept
    assert result.state_bytes(300) == without.state_bytes(300)
    assert report.details["0"]["beyond_window"] == list(found[0].beyond)
    assert report.details["total"] == {"calibration": "60 tokens: a test"}
    named = rewrite(program, **{**OPEN, "retrieve": report.spec.split("retrieve=")[1].split("]")[0] + "]"})
    assert torch.equal(result.run(text.tokens), named.run(text.tokens))
    torch.testing.assert_close(
        run_pieces(result, text.tokens, text.positions, [1, 7, 19]), result.run(text.tokens), atol=2e-5, rtol=0
    )
    short = tokens_of(2, WINDOW)
    torch.testing.assert_close(result.run(short), program.run(short), atol=1e-5, rtol=0)


def test_a_conversion_gives_it_text_and_its_result_runs_in_onnx(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def calibrate(count: int, length: int) -> Calibration:
        asked.append((count, length))
        return text_of(count, length)

    spec = "sparsify:budget=12,page=3,sinks=1,window=4,rerank=1,dense_below=0,stream_window=5,retrieve=reach:25%"
    passes, checked = [parse_spec(spec)], VerificationText(tokens_of(2, 12), "random")
    result, (run,) = Pipeline(passes, TARGET, checked, folder=tmp_path, calibrate=calibrate).run(tiny())
    assert asked == [(8, 24)]
    assert isinstance(run.report, PassReportFile) and "retrieve=heads:[" in run.report.spec
    runner = build(result, tmp_path)
    for name, calls in SCENARIOS.items():
        assert compare(result, runner, calls) < 1e-4, name


@pytest.mark.parametrize("retrieve", ["reach", "reach:0%", "reach:100%", "reach:[0.1]"])
def test_what_is_no_share_is_refused(retrieve: str) -> None:
    with pytest.raises(MemcError, match=r"E203.*reach:P%"):
        Sparsify(**{**OPEN, "retrieve": retrieve})


def test_text_that_ends_with_the_window_is_refused() -> None:
    program, sparsify, plan = planned()
    text = text_of(2, WINDOW + SINKS)
    with pytest.raises(MemcError, match=r"E207.*6 tokens show nothing beyond 1 sinks and a window of 5"):
        sparsify.apply(program, Plan(plan.spec, plan.sites, plan.rejections, plan.relations, text))

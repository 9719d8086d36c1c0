"""Whole blocks and layers that go: what each is worth by every score, which go, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from memc.analysis.stream import Stream
from memc.blocks import AttentionBlock
from memc.errors import MemcError
from memc.passes.prune import Prune, removal
from memc.passes.prune.curves import ROWS, STRIDE
from memc.passes.prune.draft import Draft
from memc.passes.prune.rewrite import Pruner
from memc.pipeline import Calibration, parse_spec
from memc.program import Program, set_tensor
from memc.train.blocks import logits_node
from memc.verify import require_well_formed
from tests.core.test_families import DECODERS, every
from tests.families import VOCAB
from tests.passes.pruning import prune, text, values
from tests.passes.test_prune_groups import groups_of
from tests.passes.tiny_program import TARGET, tiny, tokens_of


def quiet(*names: str, layers: int = 4) -> Program:
    """Return the tiny program with some projections that add next to nothing."""
    program = tiny(layers=layers).copy()
    for name in names:
        set_tensor(program.module, name, program.module.get_parameter(name).detach() * 1e-3)
    return program


def draft_of(program: Program, unit: str, amount: float = 0.25, **options: Any) -> Draft:
    return Prune(amount=amount, unit=unit, protect="none", protect_heads="none", **options).draft(program)


def without(program: Program, *removals: removal.Removal) -> Program:
    return Pruner(program).run([], [branch for one in removals for branch in one.branches])


def family(name: str) -> Program:
    return groups_of(name).program


def on(program: Program, seed: int = 1) -> Calibration:
    return text(6, 9, seed=seed, vocabulary=program.model.vocab_size or VOCAB)


@pytest.mark.parametrize("unit", ["layers", "attention_blocks", "ffn_blocks"])
@pytest.mark.parametrize("name", ["llama", "gptj", "gemma2"])
def test_influence_is_how_far_the_stream_turns(name: str, unit: str) -> None:
    program = family(name)
    draft, calibration = draft_of(program, unit, amount=0), on(program)
    found = removal.influence(program, draft.groups, draft.removals, calibration)
    assert len(found) == 2
    for one, value in zip(draft.removals, found, strict=True):
        before, after = draft.groups.stream_of(one.branches)
        end = values(program, after, calibration)
        added = sum(values(program, branch.addend, calibration) for branch in one.branches)
        assert value == pytest.approx(float((1 - cosine_similarity(end - added, end, dim=-1)).mean()), rel=1e-3)
        if unit == "layers":
            start = values(program, before, calibration)
            assert value == pytest.approx(float((1 - cosine_similarity(start, end, dim=-1)).mean()), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gptj", "gemma2", "falcon"])
def test_a_stream_without_blocks_is_the_program_without_them(name: str) -> None:
    program = family(name)
    calibration = on(program)
    end = logits_node(program)
    for unit in ("layers", "attention_blocks", "ffn_blocks"):
        removals = draft_of(program, unit, amount=0).removals
        for chosen in ([removals[1]], list(removals)):
            stream = removal.without(Stream(program, calibration), chosen)
            found = torch.cat([seen[end] for seen in stream.advance(end, [end])])
            expected = without(program, *chosen).run(calibration.tokens)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_run_of_layers_goes_by_the_angle_over_it() -> None:
    names = [f"model.layers.{n}.{name}.weight" for n in (1, 2) for name in ("attention.o", "mlp.down")]
    program, calibration = quiet(*names), text()
    result, report = prune(program, calibration, unit="layers", amount=0.5, score="similarity")
    assert {site.layer for site in report.sites} == {1, 2} and len(result.states) == 6
    draft = draft_of(program, "layers", 0.5)
    ends = [draft.groups.stream_of(one.branches) for one in draft.removals]
    for first in range(3):
        ins, outs = (
            values(program, node, calibration).unflatten(0, (12, 16))[:, -1]
            for node in (ends[first][0], ends[first + 1][1])
        )
        expected = float(torch.arccos(cosine_similarity(ins, outs, dim=-1)).mean()) / math.pi
        assert report.details[str(first)]["layer_similarity"] == pytest.approx(expected, rel=1e-3)
    assert report.details["total"]["chosen_by"] == "similarity" and report.details["1"]["layer"] == "removed"


def test_scores_of_runs_stand_under_their_first_layer_where_a_layer_between_stays() -> None:
    program, calibration = tiny(layers=5), text()
    names = {"unit": "layers", "amount": 0.4, "score": "similarity"}
    _, report = prune(program, calibration, **names, protect="[1]")
    draft = draft_of(program, "layers", 0.4)
    ends = [draft.groups.stream_of(one.branches) for one in draft.removals]
    scored = {layer: facts for layer, facts in report.details.items() if "layer_similarity" in facts}
    assert set(scored) == {"2", "3"}, "layers 0 and 1 begin no run of two"
    for layer, facts in scored.items():
        ins, outs = (
            values(program, node, calibration).unflatten(0, (12, 16))[:, -1]
            for node in (ends[int(layer)][0], ends[int(layer) + 1][1])
        )
        expected = float(torch.arccos(cosine_similarity(ins, outs, dim=-1)).mean()) / math.pi
        assert facts["layer_similarity"] == pytest.approx(expected, rel=1e-3)


def nll(program: Program, tokens: Tensor) -> float:
    return float(cross_entropy(program.run(tokens)[0, :-1], tokens[0, 1:]))


def test_position_counts_a_change_of_an_early_layer_for_more() -> None:
    program, calibration = tiny(layers=3), text()
    removals = draft_of(program, "layers").removals[:2]
    tokens = calibration.tokens[:ROWS]
    first = program.run(tokens)[:, ::STRIDE].double().log_softmax(-1)
    for one, value in zip(removals, removal.position(program, removals, calibration), strict=True):
        second = without(program, one).run(tokens)[:, ::STRIDE].double().log_softmax(-1)
        kl = float((first.exp() * (first - second)).sum(-1).mean())
        assert value == pytest.approx(kl * math.exp((3 - one.number) / 3), rel=1e-3)


def test_blocks_go_one_by_one_by_perplexity() -> None:
    program, calibration = tiny(layers=3), text()
    removals = draft_of(program, "attention_blocks").removals
    tokens = calibration.tokens[: removal.GREEDY_ROWS]
    gone, first = removal.greedy(program, removals, 2, calibration, [])
    twice = Calibration(tokens.repeat(1, 2), calibration.positions[: removal.GREEDY_ROWS].repeat(1, 2), "twice")
    assert removal.greedy(program, removals, 1, twice, [])[1] == pytest.approx(first, rel=1e-5), (
        "a text of its own each"
    )
    assert first == pytest.approx([nll(without(program, one), tokens) for one in removals], rel=1e-5)
    best = min(range(3), key=first.__getitem__)
    rest = [index for index in range(3) if index != best]
    second = min(rest, key=lambda index: nll(without(program, removals[best], removals[index]), tokens))
    assert gone == sorted([best, second])


@pytest.mark.parametrize(
    ("unit", "part", "kind"),
    [
        ("attention_blocks", "attention.o", "attention"),
        ("ffn_blocks", "mlp.down", "feed_forward"),
    ],
)
@pytest.mark.parametrize("score", ["auto", "position"])
def test_blocks_that_add_nothing_go(score: str, unit: str, part: str, kind: str) -> None:
    program, tokens = quiet(f"model.layers.2.{part}.weight"), tokens_of(2, 9)
    result, report = prune(program, text(), unit=unit, score=score, amount=0.1)
    assert [(site.layer, site.kind) for site in report.sites] == [(2, kind)]
    assert report.details["2"][kind] == "removed"
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=0.05, rtol=0)
    assert len(result.states) == len(program.states) - (3 if kind == "attention" else 0)
    removed = program.parameter_count - result.parameter_count
    assert removed >= report.details["total"]["removed_parameters"] > 0, "the norm before the block goes too"


def test_layers_that_turn_the_stream_least_go() -> None:
    program = quiet("model.layers.2.attention.o.weight", "model.layers.2.mlp.down.weight")
    result, report = prune(program, text(), unit="layers", amount=0.25)
    assert {site.layer for site in report.sites} == {2} and report.details["2"]["layer"] == "removed"
    influence = {layer: report.details[layer]["layer_influence"] for layer in "0123"}
    assert min(influence, key=influence.__getitem__) == "2"
    tokens = tokens_of(2, 9)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=0.05, rtol=0)
    assert len(result.states) == len(program.states) - 3


@pytest.mark.parametrize("refit", [True, False])
def test_both_stages_of_2ssp(refit: bool) -> None:
    program = tiny(layers=4, hidden=100)
    result, report = prune(program, text(64), score="2ssp", amount=0.4, refit=refit)
    blocks = [site for site in report.sites if site.kind == "attention"]
    channels, attention = 3 * 100 * 24, 2 * (40 + 20) * 24
    assert len(blocks) == round(4 * 0.4 ** (channels / attention / 1.5)) == 1
    total, values_of = report.details["total"], [report.details[layer]["attention_2ssp"] for layer in "0123"]
    assert total["removed_share"] == pytest.approx(0.4, abs=0.01) and len({*values_of}) == 4
    assert blocks[0].layer == values_of.index(min(values_of)), "perplexity is that of the model without its channels"
    kept = [int(report.details[layer]["ffn_channels"].split()[-1]) for layer in "0123"]
    assert max(kept) - min(kept) <= 4
    require_well_formed(result)


def test_2ssp_takes_no_more_attention_than_is_asked_for() -> None:
    draft = draft_of(tiny(layers=4), "auto", 0.16, score="2ssp", round=4)
    gone = sum(task.cost for task in draft.tasks) + draft.count * draft.removals[0].cost
    assert draft.count == 1 < round(4 * 0.16 ** (2016 / 2880 / 1.5))
    assert gone / draft.parameters == pytest.approx(0.16, abs=0.02)


@pytest.mark.parametrize("unit", ["attention_blocks", "ffn_blocks"])
@pytest.mark.parametrize("name", every(DECODERS))
def test_blocks_of_every_decoder_go_or_are_refused_by_name(name: str, unit: str) -> None:
    program = family(name)
    if name in ("mixtral", "qwen3_moe") and unit == "ffn_blocks":
        with pytest.raises(MemcError, match=r"E307.*moe: a mixture of experts"):
            prune(program, on(program), unit=unit, amount=0.3)
        return
    removals = draft_of(program, unit, amount=0).removals
    amount = removals[0].cost / draft_of(program, unit, amount=0).parameters
    result, report = prune(program, on(program), unit=unit, amount=amount)
    require_well_formed(result)
    assert len(report.sites) == 1 and torch.isfinite(result.run(on(program).tokens)).all()
    gone = 3 * isinstance(removals[0].blocks[0], AttentionBlock)
    assert len(result.states) == len(program.states) - gone


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:unit=layers,score=wanda", "score=wanda says nothing of unit=layers"),
        ("prune:unit=attention_blocks,score=obs", "score=obs says nothing of unit=attention_blocks"),
        ("prune:score=influence", "score=influence says nothing of unit=auto"),
        ("prune:unit=ffn_blocks,score=similarity", "score=similarity is of whole layers in a row"),
        ("prune:unit=heads,score=2ssp", "score=2ssp is of channels and of blocks, not of heads"),
    ],
)
def test_scores_that_say_nothing_of_a_unit_are_refused(spec: str, message: str) -> None:
    with pytest.raises(MemcError, match="E203") as caught:
        parse_spec(spec)
    assert message in caught.value.message and caught.value.next


def test_a_run_that_is_not_there_is_refused() -> None:
    pass_ = Prune(amount=0.5, unit="layers", score="similarity", protect="[1]")
    with pytest.raises(MemcError, match="E203 no 2 layers that can go lie next to one another"):
        pass_.plan(tiny(layers=3), TARGET)

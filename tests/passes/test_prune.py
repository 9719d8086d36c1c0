"""The prune pass: how much goes, what is reported, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from memc.conversion.pipeline import plan_pass
from memc.errors import MemcError
from memc.passes.linearize import Linearize
from memc.passes.prune import Prune
from memc.passes.window import Window
from memc.pipeline import parse_spec
from memc.program import get_tensor, set_tensor
from memc.raising import block_parameters, find_blocks, raise_program
from memc.relation import Bounded, Exact
from memc.verify import require_well_formed
from tests.core.test_families import DECODERS, every
from tests.families import VOCAB, raw_program
from tests.passes.pruning import (
    SMALL,
    fake,
    prune,
    shapes,
    text,
)
from tests.passes.tiny_program import TARGET, tiny, tokens_of


@pytest.mark.parametrize("unit", ["ffn", "heads", "key_channels", "layers", "auto"])
def test_nothing_removed_is_the_same_to_the_bit(unit: str) -> None:
    program, tokens = tiny(), tokens_of(2, 9)
    pass_ = Prune(amount=0, unit=unit, protect="none")
    plan = plan_pass(pass_, program, TARGET)
    assert plan.relations == (Exact(),) and plan.sites and pass_.calibrates() is None
    result, report = pass_.apply(program, plan)
    assert torch.equal(result.run(tokens), program.run(tokens))
    assert report.details["total"]["removed_parameters"] == 0


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.6])
def test_the_share_that_goes_is_counted_exactly(amount: float) -> None:
    program = tiny()
    result, report = prune(program, amount=amount, refit=False, score="magnitude")
    total = report.details["total"]
    assert program.parameter_count - result.parameter_count == total["removed_parameters"]
    assert total["removed_share"] == pytest.approx(amount, abs=0.04)
    assert total["removed_share"] == total["removed_parameters"] / total["block_parameters"]
    assert all(int(shape[0]) % 4 == 0 for name, shape in shapes(result).items() if "up.weight" in name)
    assert ("kv_groups" in report.details["0"]) == (amount > 1 / 3), "auto takes heads too from a third on"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amount": 0.5},
        {"unit": "heads", "amount": 0.1},
        {"score": "flap", "refit": False},
        {"unit": "layers", "amount": 0.5},
    ],
)
def test_a_plan_without_weights_has_the_shapes_of_the_result(options: dict[str, Any]) -> None:
    program = tiny()
    planned, _ = prune(fake(program), **options)
    result, report = prune(program, text(), **options)
    require_well_formed(result)
    if options.get("unit") != "layers":
        assert shapes(planned) == shapes(result)
    assert planned.parameter_count == result.parameter_count
    assert [spec.shape for spec in planned.states] == [spec.shape for spec in result.states]
    again, second = prune(program, text(), **options)
    assert second.details == report.details and "random tokens" in report.details["total"]["calibration"]
    for name, value in result.module.named_parameters():
        assert torch.equal(value, get_tensor(again.module, name))


@pytest.mark.parametrize("name", every(DECODERS))
def test_every_decoder_is_pruned_or_refused_by_name(name: str) -> None:
    program = raise_program(raw_program(name)[0]).program
    calibration = text(48, 16, vocabulary=VOCAB)
    if name in ("mixtral", "qwen3_moe"):
        with pytest.raises(MemcError, match=r"E307.*moe: a mixture of experts"):
            prune(program, calibration, unit="ffn")
        return
    result, report = prune(program, calibration, amount=0.25)
    require_well_formed(result)
    assert report.details["total"]["removed_share"] == pytest.approx(0.25, abs=0.03)
    assert torch.isfinite(result.run(calibration.tokens)).all()


def test_layers_can_each_have_an_amount_of_their_own() -> None:
    """``of=layers`` counts the layers that are not protected; two such passes give two amounts."""
    program = tiny()
    sizes = []
    for amount, protect in ((0.1, "[1]"), (0.3, "[0]")):
        pass_ = Prune(amount=amount, unit="ffn", of="layers", alike=True, round=1, protect=protect)
        program, report = pass_.apply(program, plan_pass(pass_, program, TARGET))
        (site,) = report.sites
        assert str(site.layer) not in protect
        sizes.append(report.details["total"]["removed_parameters"])
    whole = block_parameters(tiny(), find_blocks(tiny()))
    unit = (
        block_parameters(tiny(), tuple(b for b in find_blocks(tiny()) if b.kind == "feed_forward" and b.layer == 0))
        / 28
    )
    assert [size / (whole / 2) for size in sizes] == pytest.approx([0.1, 0.3], abs=unit / whole)


def test_encoders_are_left_alone() -> None:
    program = tiny()
    encoder = replace(program, model=replace(program.model, decoder=False))
    plan = Prune(**SMALL).plan(encoder, TARGET)
    assert {rejection.code for rejection in plan.rejections} == {"encoder"} and not plan.sites


def test_first_and_last_layer_are_protected_and_reported() -> None:
    program = tiny(layers=4)
    pass_ = Prune(amount=0.1, round=4)
    plan = pass_.plan(program, TARGET)
    assert [site.layer for site in plan.sites] == [1, 2]
    assert [(r.layer, r.code) for r in plan.rejections] == [(0, "protected"), (3, "protected")]
    named = replace(pass_, protect="[1]").plan(program, TARGET)
    assert [site.layer for site in named.sites] == [0, 2, 3]
    assert plan.relations == (Bounded("perplexity_ratio", None),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:amount=0.9,unit=ffn,round=4,protect=none", "leaves no legal shape: at most 0.353"),
        ("prune:amount=0.25,protect=none", "leaves no legal shape: at most 0.000"),
        ("prune:amount=0.9,unit=heads,protect=none", "leaves no legal shape: at most"),
        ("prune:amount=0.01,round=14,protect=none", "less than half of a step"),
        ("prune:amount=0.1,unit=layers,protect=none", "of 2 layers that can go"),
        ("prune:amount=0.25,protect=[7]", "names layer 7"),
    ],
)
def test_an_amount_that_cannot_be_is_refused(spec: str, message: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_spec(spec).plan(tiny(), TARGET)
    assert caught.value.code == "E203" and message in caught.value.message and caught.value.next


def test_a_model_pruned_layer_by_layer_is_pruned_again_but_not_alike() -> None:
    once, _ = prune(tiny(), unit="ffn", amount=0.1, protect="[0]", refit=False, score="magnitude")
    again = {"unit": "ffn", "amount": 0.2, "refit": False, "score": "magnitude"}
    twice, report = prune(once, **again)
    assert once.parameter_count - twice.parameter_count == report.details["total"]["removed_parameters"]
    assert [report.details[layer]["ffn_channels"] for layer in "01"] == ["28 -> 12", "16 -> 8"]
    with pytest.raises(MemcError, match="E203 alike=true, and layers that differ already are left with 8 and 12 ffn"):
        prune(once, **again, alike=True)


def test_a_share_can_be_written_in_percent() -> None:
    assert parse_spec("prune:amount=12.5%") == Prune(amount=0.125)


@pytest.mark.parametrize(
    "spec",
    [
        "prune:protect=first",
        "prune:amount=1.5",
        "prune:amount=150%",
        "prune:amount=x%",
        "prune:unit=neurons",
        "prune:score=luck",
    ],
)
def test_bad_options_are_refused(spec: str) -> None:
    with pytest.raises(MemcError, match="E203"):
        parse_spec(spec)


def test_text_that_says_nothing_is_refused() -> None:
    program = tiny()
    same = text()
    with pytest.raises(MemcError, match="E207 calibration text is one token over and over"):
        prune(program, replace(same, tokens=torch.full_like(same.tokens, 5)))
    with pytest.raises(MemcError, match="E207 calibration text has 16 tokens, fewer than the 160 that 40 channels"):
        prune(program, text(1), amount=0.5)
    with pytest.raises(MemcError, match=r"E207 .* fewer than the 160 .* or refit=false"):
        prune(program, text(4), amount=0.5)
    prune(program, text(4), amount=0.5, refit=False)


@pytest.mark.parametrize("options", [{}, {"unit": "layers", "amount": 0.5}])
def test_activations_that_are_not_finite_name_the_layer(options: dict[str, Any]) -> None:
    program = tiny().copy()
    broken = program.module.get_parameter("model.layers.1.mlp.up.weight").detach().clone()
    broken[3] = 1e38
    set_tensor(program.module, "model.layers.1.mlp.up.weight", broken)
    with pytest.raises(MemcError, match=r"E403 activations on calibration text are not finite \[layer 1") as caught:
        prune(program, text(), **options)
    assert caught.value.exit_code == 4


def test_query_heads_go_where_there_is_one_key_value_head() -> None:
    program = tiny(kv_heads=1)
    result, report = prune(program, text(), unit="heads", amount=0.11)
    assert report.details["0"]["query_heads"] == "4 -> 3"
    assert result.states[0].shape == program.states[0].shape


@pytest.mark.parametrize("other", [Window(window=5, sinks=2), Linearize(window=5, feature_size=12, keep="none")])
def test_what_was_pruned_is_rewritten_by_other_passes(other: Any) -> None:
    program = tiny()
    pruned, _ = prune(program, text(), amount=0.5)
    result, report = other.apply(pruned, plan_pass(other, pruned, TARGET))
    require_well_formed(result)
    assert len(report.sites) == 2
    tokens = tokens_of(2, 5)
    torch.testing.assert_close(result.run(tokens), pruned.run(tokens), atol=1e-5, rtol=0)
    again, _ = prune(pruned, text(), amount=0.2)
    require_well_formed(again)
    assert again.parameter_count < pruned.parameter_count

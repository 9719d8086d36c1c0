"""Heads that look up earlier tokens stay when others are pruned: found, reported, and left out of every choice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from memc.analysis.heads import head_roles
from memc.errors import MemcError
from memc.passes.prune import Prune
from memc.passes.prune.choice import Task, evenly, legal, lowest
from memc.passes.prune.eliminate import eliminate
from memc.passes.prune.measure import exit_weight
from memc.passes.prune.moments import Moments
from memc.pipeline import parse_spec
from memc.program import set_tensor
from tests.core.test_heads import planted
from tests.passes.pruning import entries, heads, prune, text
from tests.passes.tiny_program import TARGET, tiny


def pass_of(**options: Any) -> Prune:
    return Prune(
        **{"round": 4, "protect": "none", "unit": "heads", "amount": 0.2, "protect_heads": "heads:8%", **options}
    )


def test_heads_that_look_up_are_named_and_reported() -> None:
    program = planted()
    best = max((score, (one.layer, g)) for one in head_roles(program).layers for g, score in enumerate(one.of_groups))[
        1
    ]
    resolved, found = pass_of(protect_heads="heads:20%").resolve(program, TARGET)
    assert resolved.protect_heads == f"heads:[{best[0]}.{best[1]}]"
    assert found["heads"]["layers"][best[0]]["kept"] == [best[1]] and parse_spec(resolved.spec) == resolved
    assert resolved.resolve(program, TARGET) == (resolved, {})


@pytest.mark.parametrize("options", [{}, {"score": "wanda"}, {"score": "magnitude", "refit": False}])
def test_a_protected_head_stays_where_it_would_go_first(options: dict[str, Any]) -> None:
    program = tiny(kv_heads=4).copy()
    name = "model.layers.0.attention.o.weight"
    weight = program.module.get_parameter(name).detach().clone()
    weight[:, 20:30] *= 1e-3  # head 2 adds next to nothing
    set_tensor(program.module, name, weight)
    calibration = text(32)

    def gone(protect_heads: str) -> list[int]:
        given = {"unit": "heads", "amount": 0.15, "protect_heads": protect_heads, **options}
        _, report = prune(program, calibration, **given)
        if protect_heads != "none":
            assert report.details["0"]["protected_heads"] == [2] and "protected_heads" not in report.details["1"]
        return list(report.details["0"]["kv_groups_removed"])

    before = gone("none")
    if options.get("score") != "magnitude":
        assert before == [2]
    assert len(gone("heads:[0.2]")) == len(before) and 2 not in gone("heads:[0.2]")


def test_no_choice_takes_a_fixed_unit() -> None:
    program, calibration = tiny(kv_heads=4), text(32)
    group = replace(heads(program), fixed=(0, 3))
    assert legal(group, 1) == [0, 1, 2] and legal(replace(group, fixed=()), 1) == [0, 1, 2, 3]
    moments = Moments(len(group.columns), gram=True, where="")
    moments.update(entries(program, group, calibration).flatten(0, 1).float())
    for count in (1, 2):
        task = Task(group, count)
        chosen = [
            evenly(task),
            lowest(task, torch.tensor([0.0, 3.0, 2.0, 1.0])),
            eliminate(task, exit_weight(program, group.exit)[0], moments),
        ]
        assert all(len(units) == count and not {0, 3} & {*units} for units in chosen)
    assert lowest(Task(replace(group, fixed=()), 2), torch.tensor([0.0, 3.0, 2.0, 1.0])) == (0, 3)


@pytest.mark.parametrize("unit", ["attention_blocks", "layers"])
def test_blocks_with_protected_heads_stay_whole(unit: str) -> None:
    program = tiny(layers=4)
    plan = pass_of(unit=unit, amount=0.25, protect_heads="heads:[1.0,2.1]").plan(program, TARGET)
    assert {site.layer for site in plan.sites} <= {0, 3} and plan.sites
    assert {(r.layer, r.code) for r in plan.rejections} == {(1, "protected"), (2, "protected")}


def test_a_block_of_protected_heads_alone_stays_whole() -> None:
    plan = pass_of(amount=0.1, protect_heads="heads:[0.0,0.1]").plan(tiny(layers=3), TARGET)
    assert [(r.layer, r.code) for r in plan.rejections] == [(0, "protected")]
    assert {site.layer for site in plan.sites} <= {1, 2}


def test_a_plan_with_an_open_share_removes_as_much() -> None:
    program = tiny(layers=3, kv_heads=4)
    (planned, first), (found, second) = (
        prune(program, unit="heads", amount=0.2, protect_heads=heads) for heads in ("heads:8%", "heads:[0.2]")
    )
    assert planned.parameter_count == found.parameter_count < program.parameter_count
    assert first.details["1"]["protected_heads"] == [2], "evenly spread, until weights say which"
    assert second.details["0"]["protected_heads"] == [2] and 2 not in second.details["0"]["kv_groups_removed"]


@pytest.mark.parametrize("options", [{"unit": "ffn"}, {"unit": "auto"}, {"amount": 0.0}, {"protect_heads": "none"}])
def test_nothing_is_looked_for_where_no_head_can_go(options: dict[str, Any]) -> None:
    pass_ = pass_of(**options)
    assert pass_.resolve(planted(), TARGET) == (pass_, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:protect_heads=5%", "'protect_heads' is none, heads:P% or a list"),
        ("prune:protect_heads=heads:200%", "'protect_heads' names heads as heads:P%"),
        ("prune:unit=heads,round=4,protect_heads=heads:[9.0]", "'protect_heads' names key-value head 9.0"),
    ],
)
def test_heads_that_are_not_there_are_refused(spec: str, message: str) -> None:
    with pytest.raises(MemcError, match="E203") as caught:
        parse_spec(spec).plan(tiny(), TARGET)
    assert message in caught.value.message and caught.value.next

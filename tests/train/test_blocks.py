"""Blocks cut out of a rewritten program, and the original run as their teacher."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.program import get_tensor, set_tensor
from memc.train.blocks import Teacher, cut_out, logits_node
from tests.passes.test_linearize import shake
from tests.passes.tiny_program import tiny
from tests.train.tiny_training import TEACHERS, linearized, packed, values_of


@pytest.mark.parametrize("options", [{}, {"form": "lizard", "sinks": 4}, {"update": "gated_delta"}], ids=str)
@pytest.mark.parametrize("teacher", TEACHERS, ids=str)
def test_a_block_gives_what_it_gives_in_the_program(teacher: dict[str, Any], options: dict[str, Any]) -> None:
    if "sink_logits" in teacher and "form" in options:
        pytest.skip("the lizard form refuses sink logits")
    before = tiny(**teacher)
    after, report = linearized(before, **options)
    shake(after)
    tokens, positions = packed(3, seed=1)
    given = values_of(before, tokens, positions)
    for index, objective in enumerate(report.objectives):
        block = cut_out(before, after, objective)
        # In a program in which it alone is rewritten, a block is given what the original gives.
        alone, its_report = linearized(before, **options, keep=f"[{1 - index}]")
        (its,) = its_report.objectives
        for name in objective.parameters.values():
            set_tensor(alone.module, name, get_tensor(after.module, name).detach())
            assert block.parameters[name.rsplit(".", 1)[1]] is get_tensor(after.module, name)
        assert set(block.parameters) == set(objective.parameters)
        expected = values_of(alone, tokens, positions)
        for result, name in zip(block(given), its.results, strict=True):
            assert torch.equal(result, expected[name])
        assert not torch.allclose(block(given)[0], given[objective.target], atol=1e-2)


def test_the_teacher_streams_what_the_program_computes() -> None:
    program = tiny(softcap=2.0)
    names = [node.name for node in program.module.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    wanted = [tuple(names[index::3]) for index in range(3)]
    tokens, positions = packed(3, seed=2)
    expected, found = values_of(program, tokens, positions), dict[str, Tensor]()
    Teacher(program, wanted).run(tokens, positions, lambda _, values: found.update(values))
    assert set(found) == set(names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_the_teacher_clears_its_state_where_a_document_starts() -> None:
    program = tiny()
    name = logits_node(program).name
    tokens, positions = packed(2, seed=3)
    found: dict[str, Tensor] = {}
    Teacher(program, [(name,)]).run(tokens, positions, lambda _, values: found.update(values))
    torch.testing.assert_close(found[name][1:, 9:], program.run(tokens[1:, 9:]), atol=1e-5, rtol=0)
    assert (found[name][1:, 9:] - program.run(tokens[1:])[:, 9:]).abs().max() > 1e-2


def test_the_teacher_lets_go_of_what_nobody_needs_and_runs_no_further() -> None:
    program = tiny()
    _, report = linearized(program)
    targets = [objective.target for objective in report.objectives]
    kept: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def learn(index: int, values: dict[str, Tensor]) -> None:
        if index == 1:
            gc.collect()
            alive.extend(ref() is not None for ref in kept)
        kept.append(weakref.ref(values[targets[index]]))
        assert torch.is_grad_enabled()

    def never(*_: Any) -> None:
        raise AssertionError("run though nobody wants it")

    logits_node(program).target = never
    Teacher(program, [(name,) for name in targets]).run(*packed(2, seed=4), learn)
    assert alive == [False] and len(kept) == 2


def test_products_in_bfloat16_stay_near() -> None:
    program = tiny()
    name = logits_node(program).name
    tokens, positions = packed(2, seed=5)
    found: dict[str, Tensor] = {}
    Teacher(program, [(name,)], torch.bfloat16).run(tokens, positions, lambda _, values: found.update(values))
    expected = values_of(program, tokens, positions)[name]
    error = (found[name] - expected).norm() / expected.norm()
    assert found[name].dtype == torch.float32 and 1e-4 < error < 3e-2


def test_products_keep_their_keywords_and_their_type() -> None:
    program = tiny(layers=1)
    aten, node = torch.ops.aten, logits_node(program)
    flat = program.module.graph
    with flat.inserting_before(node):
        rows = flat.call_function(aten.flatten.using_ints, (node.args[0], 0, 1))
        weight = flat.call_function(aten.t.default, (node.args[1],))
        bias = flat.call_function(aten.select.int, (weight, 0, 0))
    node.target, node.args, node.kwargs = aten.addmm.default, (bias, rows, weight), {"beta": 0.0, "alpha": 3.0}
    program.module.recompile()
    tokens, positions = packed(2, seed=6)
    expected, found = values_of(program, tokens, positions)[node.name], dict[str, Tensor]()
    node.meta["val"] = expected.bfloat16()
    Teacher(program, [(node.name,)], torch.bfloat16).run(tokens, positions, lambda _, values: found.update(values))
    assert found[node.name].dtype == torch.bfloat16
    torch.testing.assert_close(found[node.name].float(), expected, atol=0.3, rtol=0.05)

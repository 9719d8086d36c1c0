"""Every check passes on what is right and fails on a fault planted for it."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import Node

from memc.conversion.text import verification_text
from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program import Program, StateSpec
from memc.recipe import Recipe
from memc.relation import Bounded, Close, Exact
from memc.verify import (
    VerificationText,
    check_relation,
    check_text,
    finite,
    first_bad_site,
    noise_floor,
    perplexity,
    require_well_formed,
    sample_text,
    split_invariance,
    take,
    well_formed,
)
from memc.verify.execute import run, whole_all
from tests.core.tiny import TinyConfig, tiny_program
from tests.core.toy import TARGET, Toy

load_kernels()
TEXT = VerificationText(torch.arange(120).reshape(4, 30) * 7 % 37, "test")


def find(program: Program, name: str) -> Node:
    return next(node for node in program.module.graph.nodes if node.name == name)


def rewritten(**options: object) -> tuple[Program, Program]:
    program, toy = tiny_program(), Toy(**options)  # type: ignore[arg-type]
    return program, toy.apply(program, toy.plan(program, TARGET))[0]


def test_the_tiny_program_is_well_formed() -> None:
    assert well_formed(tiny_program()) == []
    require_well_formed(tiny_program(TinyConfig(tied=False)))


def state_shape(program: Program) -> Program:
    wrong = dataclasses.replace(program.states[0], shape=("B", 2, "S", 11))
    return program.with_states((wrong, *program.states[1:]))


def fixed_state(program: Program) -> Program:
    return program.with_states((dataclasses.replace(program.states[0], grows=None), *program.states[1:]))


def swapped_states(program: Program) -> Program:
    output = program.module.graph.output_node()
    logits, first, second, third, *rest = output.args[0]  # type: ignore[misc,union-attr]
    output.args = ((logits, first, third, second, *rest),)
    return program


def lost_output(program: Program) -> Program:
    output = program.module.graph.output_node()
    output.args = (output.args[0][:-1],)  # type: ignore[index]
    return program


def renamed_input(program: Program) -> Program:
    inputs = (dataclasses.replace(program.inputs[0], name="ids"), program.inputs[1])
    return dataclasses.replace(program, inputs=inputs)


def output_dtype(program: Program) -> Program:
    return dataclasses.replace(program, outputs=(dataclasses.replace(program.outputs[0], dtype=torch.float16),))


def missing_parameter(program: Program) -> Program:
    del program.module.get_submodule("model.layers.0.mlp.up").weight
    return program


def wrong_parameter(program: Program) -> Program:
    program.module.get_submodule("model.layers.0.mlp.up").weight = torch.nn.Parameter(torch.zeros(28, 25))
    return program


def recorded_shape(program: Program) -> Program:
    find(program, "silu_default").meta["val"] = find(program, "tokens").meta["val"]
    return program


def recorded_shape_of_a_later_layer(program: Program) -> Program:
    later = find(program, "silu_default_1")
    later.meta["val"] = later.meta["val"].transpose(0, 1)
    return program


def exchanged_axes(program: Program) -> Program:
    find(program, "silu_default").meta["val"] = find(program, "silu_default").meta["val"].transpose(0, 1)
    return program


def specialised_length(program: Program) -> Program:
    view = find(program, "view_default")
    view.args = (view.args[0], [find(program, "sym_size_int"), 7, 4, 10])
    return program


def used_before_made(program: Program) -> Program:
    view = find(program, "silu_default")
    view.args = (find(program, "mul_tensor_1"),)
    return program


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (state_shape, "layer0_key"),
        (fixed_state, "layer0_key"),
        (swapped_states, "layer0_value|layer0_positions"),
        (lost_output, "output"),
        (renamed_input, "tokens"),
        (output_dtype, "logits"),
        (missing_parameter, "mlp_up"),
        (wrong_parameter, "linear_default_5"),
        (recorded_shape, "silu_default"),
        (recorded_shape_of_a_later_layer, "silu_default_1"),
        (exchanged_axes, "silu_default"),
        (specialised_length, "view_default|graph"),
        (used_before_made, "graph"),
    ],
)
def test_an_ill_formed_program_is_named(fault: Callable[[Program], Program], where: str) -> None:
    program = fault(tiny_program())
    problems = well_formed(program)
    assert problems
    names = where.split("|")
    assert any(name in problem.node or name in problem.reason for problem in problems for name in names), problems
    with pytest.raises(MemcError, match=r"E401.*after toy"):
        require_well_formed(program, "after toy")


def test_an_identical_program_is_exact() -> None:
    program, result = rewritten()
    check = check_relation(program, result, Exact(), TEXT, floor=1e-6)
    assert check.passed and check.value == 0.0 and check.noise_floor == 1e-6


@pytest.mark.parametrize(
    ("options", "relation", "passed"),
    [
        ({"op": "shift", "by": 1e-3}, Exact(), False),
        ({"op": "shift", "by": 1e-3}, Close(2e-3), True),
        ({"op": "shift", "by": 1e-3}, Close(0.5e-3), False),
        ({"op": "nan"}, Close(1.0), False),
        ({"op": "clone"}, Bounded("kl_mean", 1e-6), True),
        ({"op": "scale", "by": 0.5}, Bounded("kl_mean", 1e-6), False),
        ({"op": "scale", "by": 0.5}, Bounded("kl_mean", None), True),
        ({"op": "nan"}, Bounded("kl_mean", None), False),
        ({"op": "clone"}, Bounded("perplexity_ratio", 1.0), True),
        ({"op": "scale", "by": -1.0}, Bounded("perplexity_ratio", 1.01), False),
        ({"op": "nan"}, Bounded("perplexity_ratio", None), False),
    ],
)
def test_relations_pass_and_fail(options: dict[str, object], relation: Close | Bounded, passed: bool) -> None:
    program, result = rewritten(**options)
    text = sample_text(program, 0, sequences=2, length=24)
    assert check_relation(program, result, relation, text).passed is passed


def test_a_ratio_to_a_baseline_needs_and_uses_it() -> None:
    program, result = rewritten(op="scale", by=0.5)
    relation = Bounded("perplexity_ratio_to_window", 1.0)
    assert check_relation(program, result, relation, TEXT, baseline=lambda: result).passed
    with pytest.raises(ValueError, match="cannot be measured"):
        check_relation(program, result, relation, TEXT)


def test_close_up_to_a_length_ignores_what_is_longer() -> None:
    program, result = tiny_program(), tiny_program()
    window = torch.ops.memc.attention.default
    for node in result.module.graph.find_nodes(op="call_function", target=window):
        node.kwargs = {**node.kwargs, "window": 9}
    result.module.recompile()
    assert check_relation(program, result, Close(1e-5, tokens=9), TEXT).passed
    check = check_relation(program, result, Close(1e-5, tokens=10), TEXT)
    assert not check.passed and "10 tokens" in check.detail


def test_a_long_limit_is_run_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memc.verify.execute.PIECE", 8)
    program, result = rewritten(op="shift", by=1e-3)
    assert math.isclose(check_relation(program, result, Close(1e-2, tokens=45), TEXT).value, 1e-3, rel_tol=0.05)


def test_what_may_be_rounding_is_measured_in_float64() -> None:
    original = tiny_program()
    folded, shifted = tiny_program(), tiny_program()
    with torch.no_grad():
        for program, by in ((folded, 1.0), (shifted, 1.0 + 1e-6)):
            program.module.get_parameter("model.layers.0.mlp.up.weight").mul_(3.0 * by)
            weight = program.module.get_parameter("model.layers.0.mlp.down.weight")
            weight.copy_((weight.double() / 3.0).float())
    close = Close(1e-9)
    assert not check_relation(original, folded, close, TEXT).passed
    check = check_relation(original, shifted, close, TEXT, floor=1e-5)
    assert not check.passed and "float64" in check.detail
    check = check_relation(original, folded, Close(1e-6), TEXT, floor=1e-5)
    assert check.passed and "float64" in check.detail and check.value > 0.0


def test_the_first_bad_site_is_found() -> None:
    original, faulty = tiny_program(), tiny_program()
    assert first_bad_site(original, faulty, TEXT.tokens[:1, :9]) is None
    weight = faulty.module.get_parameter("model.layers.1.mlp.gate.weight")
    with torch.no_grad():
        weight[3, 4] += 0.1
    site = first_bad_site(original, faulty, TEXT.tokens[:1, :9])
    assert site is not None and site.layer == 1 and site.path == "model.layers.1.mlp"
    check = check_relation(original, faulty, Close(1e-4), TEXT)
    assert not check.passed and "layer 1" in check.detail


def test_the_noise_floor_is_small_and_not_zero() -> None:
    assert 0.0 < noise_floor(tiny_program(), TEXT.tokens[:, :9]) < 1e-4


def test_a_half_precision_program_is_measured_in_float32() -> None:
    program = tiny_program()
    expected = program.run(TEXT.tokens[:1, :9]).detach()
    rounded = tiny_program()
    for name, value in list(rounded.module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        rounded.module.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(value.bfloat16()))
    check = check_relation(program, rounded, Close(1.0), TEXT)
    assert check.passed and 0.0 < check.value < 0.2 * float(expected.abs().max())


def test_any_split_gives_the_same_and_a_fault_in_the_state_is_found() -> None:
    assert split_invariance(tiny_program(), TEXT.tokens[:3, :11]).passed
    faulty = tiny_program()
    output = faulty.module.graph.output_node()
    with faulty.module.graph.inserting_before(output):
        results = list(output.args[0])  # type: ignore[arg-type]
        results[1] = faulty.module.graph.call_function(torch.ops.aten.mul.Tensor, (results[1], 1.01))
    output.args = (tuple(results),)
    faulty.module.recompile()
    check = split_invariance(faulty, TEXT.tokens[:3, :11])
    assert not check.passed and "one token at a time" in check.detail


def test_padding_that_is_read_is_found() -> None:
    faulty = tiny_program()
    node = find(faulty, "attention_default")
    positions = find(faulty, "positions")
    with faulty.module.graph.inserting_before(node):
        shown = faulty.module.graph.call_function(torch.ops.aten.clamp.default, (positions, 0))
    node.replace_input_with(positions, shown)
    faulty.module.recompile()
    check = split_invariance(faulty, TEXT.tokens[:3, :11])
    assert not check.passed and "mixed lengths" in check.detail


def test_values_that_are_not_finite_are_found() -> None:
    program = tiny_program()
    finite(program)
    with torch.no_grad():
        program.module.get_parameter("model.layers.1.mlp.gate.weight")[3, 4] = math.inf
    with pytest.raises(MemcError, match=r"E403.*model\.layers\.1\.mlp\.gate\.weight"):
        finite(program)


def test_sampled_text_is_reproducible_and_likely() -> None:
    program = tiny_program(TinyConfig(scale=0.6))
    first, again, other = (sample_text(program, seed, sequences=3, length=20) for seed in (0, 0, 1))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)
    drawn = torch.randint(37, (3, 20))
    assert perplexity(program, first.tokens) < 0.5 * perplexity(program, drawn)


def test_the_text_goes_hundreds_of_tokens_past_a_window_and_keeps_the_limit_of_positions(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    program = tiny_program()
    text = verification_text(Recipe(recipe=1, seed=0), program, tmp_path)
    assert sum(max(row.shape[0] - 1 - 256, 0) for row in text.tokens) > 300
    assert torch.equal(verification_text(Recipe(recipe=1, seed=1), program, tmp_path).tokens, text.tokens)  # kept
    (tmp_path / "report" / "text.json").unlink()
    model = dataclasses.replace(program.model, absolute_positions=True, max_positions=30)
    limited = verification_text(Recipe(recipe=1, seed=0), dataclasses.replace(program, model=model), tmp_path)
    assert limited.tokens.shape == (16, 30)


def test_the_text_is_checked_in_one_run_as_in_several() -> None:
    program, result = rewritten(op="scale", by=0.9)
    text = sample_text(program, 0, sequences=3, length=20)
    ratio, kl = check_text(program, result, text, {"kl_mean": 1e-9})
    assert abs(ratio.value - 1) > 0.001 and ratio.passed and kl.value > 0.001 and not kl.passed
    for found, relation in ((ratio, Bounded("perplexity_ratio", None)), (kl, Bounded("kl_mean", 1e-9))):
        single = check_relation(program, result, relation, text)
        assert found == dataclasses.replace(single, value=pytest.approx(single.value, rel=1e-5))


def test_the_text_starts_over_at_its_end() -> None:
    taken = take(VerificationText(torch.arange(6).reshape(2, 3), ""), 2, 5)
    assert taken.tolist() == [[0, 1, 2, 3, 4], [5, 0, 1, 2, 3]]


@torch.no_grad()
def test_a_run_that_converts_parameters_holds_the_states_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are made where they are used, and next ones dropped: side by side they could outweigh the model."""
    half = tiny_program()
    half = dataclasses.replace(half, module=copy.deepcopy(half.module).to(torch.bfloat16))
    texts = [torch.zeros(1, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)]
    inputs = [(text, torch.arange(text.shape[1]).expand_as(text)) for text in texts]
    expected = [run(half, given, half.new_state(len(given[0])))[0] for given in inputs]
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    empty = StateSpec.empty

    def watched(spec: StateSpec, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in made))
        state = empty(spec, batch, device)
        made.append(weakref.ref(state))
        return state

    monkeypatch.setattr(StateSpec, "empty", watched)
    found = whole_all(half, texts)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    layers = len(half.states) // 3
    assert layers > 1 and len(made) == len(texts) * len(half.states)
    assert max(alive) < len(made) // layers, "the states of more than one layer at a time"

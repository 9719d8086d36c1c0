"""Key channels: which go together, which go first, the tables that rotate what is left, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memc.blocks import AttentionBlock, Rotary
from memc.conversion.pipeline import plan_pass
from memc.dialect import arguments
from memc.errors import MemcError
from memc.infer import infer
from memc.passes.linearize import Linearize
from memc.passes.prune import Prune
from memc.passes.prune.choice import Task, legal
from memc.passes.prune.groups import Group, Groups, key_units
from memc.passes.prune.moments import Moments
from memc.passes.prune.refit import refit
from memc.passes.prune.rewrite import Cut, Pruner
from memc.passes.prune.scores import head_energies
from memc.passes.prune.walk import BlockedError, Labels, Walk
from memc.passes.sparsify import Sparsify
from memc.passes.window import Window
from memc.pipeline import parse_spec
from memc.program import Program, get_tensor, set_tensor
from memc.raising.feed_forward import linear_input
from memc.sites import attention_blocks
from memc.verify import require_well_formed
from tests.passes.pruning import exit_weight, fake, fit_of, prune, shapes, text, values
from tests.passes.test_prune_groups import forward, masked
from tests.passes.tiny_program import TARGET, run_pieces, tiny, tokens_of

ROTARY = torch.ops.memc.rotary.default


def block_of(program: Program, layer: int = 0) -> AttentionBlock:
    return next(block for block in attention_blocks(program) if block.layer == layer)


def keys(program: Program, layer: int = 0) -> Group:
    groups = Groups(program)
    return groups.of(next(b for b in groups.blocks if b.kind == "attention" and b.layer == layer), "key_channels")


def rotating(size: int) -> Program:
    """Return the decoder with ``size`` of the ten channels of a head rotated, the others passed through."""
    program = tiny().copy()
    set_tensor(program.module, "model.inv_freq", get_tensor(program.module, "model.inv_freq")[: size // 2])
    infer(program)
    return program


@pytest.mark.parametrize(
    ("size", "rotary", "expected"),
    [
        (5, None, [0, 1, 2, 3, 4]),
        (6, Rotary(6, False, 1.0), [0, 1, 2, 0, 1, 2]),
        (6, Rotary(6, True, 1.0), [0, 0, 1, 1, 2, 2]),
        (9, Rotary(4, False, 1.0), [0, 1, 0, 1, 2, 2, 3, 3, -1]),
    ],
)
def test_channels_that_are_rotated_together_are_one_unit(size: int, rotary: Rotary | None, expected: list[int]) -> None:
    block = replace(block_of(tiny()), head_dim=size, rotary=rotary)
    assert key_units(block).tolist() == expected


@pytest.mark.parametrize("removed", [(0,), (1, 3), (0, 1), (0, 1, 2, 3)])
def test_what_passes_through_goes_in_pairs_too(removed: tuple[int, ...]) -> None:
    """Where none of the rotated pairs is left nothing is rotated."""
    program = rotating(4)
    cut = Cut(keys(program), removed)
    pruned = Pruner(program).run([cut])
    require_well_formed(pruned)
    torch.testing.assert_close(forward(pruned, 2, 7), masked(program, [cut], [], 2, 7), atol=1e-5, rtol=0)
    left = block_of(pruned)
    assert left.head_dim == 10 - 2 * len(removed) and left.value_dim == 10 and left.scale == block_of(program).scale
    assert (left.rotary.size if left.rotary else 0) == 4 - 2 * len({0, 1} & {*removed})


def test_each_layer_is_rotated_by_the_frequencies_of_its_own_pairs() -> None:
    program = tiny(layers=3)
    cuts = [Cut(keys(program, layer), removed) for layer, removed in enumerate([(1,), (0, 3), (1,)])]
    pruned = Pruner(program).run(cuts)
    names = [
        str(arguments(node)["inv_freq"].target)
        for node in pruned.module.graph.find_nodes(op="call_function", target=ROTARY)
    ]
    assert names[0] == names[1] == names[4] != names[2], "one table for queries and keys, and for layers that are alike"
    before = get_tensor(program.module, "model.inv_freq")
    assert torch.equal(get_tensor(pruned.module, names[0]), before[[0, 2, 3, 4]])
    assert torch.equal(get_tensor(pruned.module, names[2]), before[[1, 2, 4]])
    assert len([name for name, _ in pruned.module.named_buffers()]) == 2, "the whole table is read by nobody"
    expected = masked(program, cuts, [], 2, 7)
    torch.testing.assert_close(forward(pruned, 2, 7), expected, atol=1e-5, rtol=0)
    set_tensor(pruned.module, names[2], before[[0, 1, 2]])  # a planted fault: frequencies of other pairs
    assert (forward(pruned, 2, 7) - expected).abs().max() > 1e-3


def test_one_alone_of_a_rotated_pair_is_never_cut() -> None:
    program = tiny()
    block = block_of(program)
    walk = Walk(program.module, block.attention, Groups(program)._readers)
    with pytest.raises(BlockedError) as caught:
        walk.run({block.query: Labels(3, torch.arange(10))})
    assert caught.value.code == "mixed"


@given(seed=st.integers(0, 1000), rotated=st.booleans(), groups=st.sampled_from([1, 2, 4]))
def test_the_score_is_the_norm_of_what_a_unit_adds_to_the_scores(seed: int, rotated: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group = keys(tiny())
    query, key = (torch.randn(1, heads, 7, 10, generator=generator, dtype=torch.float64) for heads in (4, groups))
    found = head_energies(group, query, key)
    assert found.shape == (4, 5)
    for head in range(4):
        for unit in range(5):
            q, k = query[0, head][:, group.keys == unit], key[0, head // (4 // groups)][:, group.keys == unit]
            expected = (q.norm() * k.norm()).float()
            torch.testing.assert_close(found[head, unit].float(), expected, rtol=1e-5, atol=1e-6)
    alone = (query[0, 0, :, :1] @ key[0, 0, :, :1].T).norm()  # of one channel that is ||Q_j K_j^T||_F
    torch.testing.assert_close(alone, query[0, 0, :, 0].norm() * key[0, 0, :, 0].norm())
    if rotated:
        at, table = torch.arange(7)[None], torch.rand(5, generator=generator)
        turned = (ROTARY(x.float(), at, table) for x in (query, key))
        torch.testing.assert_close(head_energies(group, *turned), found, rtol=1e-4, atol=1e-5)


def test_what_no_query_asks_for_goes_first_whatever_its_weights_are() -> None:
    program = tiny().copy()
    for name, factor in (("q", 1e-4), ("k", 100.0)):
        weight = get_tensor(program.module, f"model.layers.0.attention.{name}.weight").detach().clone()
        weight.view(-1, 10, 24)[:, [2, 7]] *= factor
        set_tensor(program.module, f"model.layers.0.attention.{name}.weight", weight)
    _, by_query = prune(program, text(24), unit="key_channels", amount=0.2, refit=False)
    assert by_query.details["0"]["key_channels_removed"] == [2, 7]
    _, by_weight = prune(program, None, unit="key_channels", amount=0.2, refit=False, score="magnitude")
    assert by_weight.details["0"]["key_channels_removed"] != [2, 7]


def test_the_lowest_score_goes() -> None:
    program, calibration = tiny(), text(24)
    group, block = keys(program), block_of(program)
    query, key = (values_of(program, node, calibration) for node in (block.query, block.key))
    each = [head_energies(group, query[i : i + 1], key[i : i + 1]).sum(0) for i in range(len(query))]
    lowest = torch.stack(each).sum(0).argsort()[:2]
    _, report = prune(program, calibration, unit="key_channels", amount=0.4, round=2, refit=False)
    expected = torch.nonzero(torch.isin(group.keys, lowest))[:, 0].tolist()
    assert report.details["0"]["key_channels_removed"] == expected


def values_of(program: Program, node: Any, calibration: Any) -> torch.Tensor:
    count, length = calibration.tokens.shape
    return values(program, node, calibration).reshape(count, -1, length, 10)


def test_the_output_projection_is_fitted_to_the_attention_that_is_left() -> None:
    program, calibration = tiny(), text(24)
    result, report = prune(program, calibration, unit="key_channels", amount=0.4, round=2)
    group = keys(program)
    removed = tuple(sorted({int(group.keys[channel]) for channel in report.details["0"]["key_channels_removed"]}))
    narrow = Pruner(program).run([Cut(group, removed)])
    entry = linear_input(next(node for node in narrow.module.graph.nodes if node.name == group.exit.name))
    moments = Moments(40, gram=True, where="", targets=24)
    moments.update(values(narrow, entry, calibration), values(program, group.exit, calibration))
    expected = refit(exit_weight(program, group), moments, torch.ones(40, dtype=torch.bool))
    found = fit_of(result, group)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-3, atol=1e-4)
    assert report.details["total"]["new_bias_parameters"] == 2 * 24


@pytest.mark.parametrize("options", [{}, {"score": "taylor"}, {"score": "magnitude", "refit": False}, {"round": 8}])
def test_a_plan_has_the_shapes_and_the_state_of_the_result(options: dict[str, Any]) -> None:
    program = tiny(head_dim=16)
    planned, _ = prune(fake(program), unit="key_channels", amount=0.5, **options)
    result, report = prune(program, text(24), unit="key_channels", amount=0.5, **options)
    require_well_formed(result)
    assert shapes(planned) == shapes(result) and planned.state_bytes(100) == result.state_bytes(100)
    assert program.state_bytes(100) - result.state_bytes(100) == 2 * 2 * 100 * 8 * 4, "layers, heads, tokens, channels"
    assert report.details["0"]["key_channels"] == "16 -> 8"
    removed = report.details["total"]["removed_parameters"]
    assert removed == 2 * 8 * (4 + 2) * 24, "layers, channels, heads of queries and of keys, width"
    biases = report.details["total"]["new_bias_parameters"]
    assert program.parameter_count - result.parameter_count == removed - biases


def test_decoding_goes_on_from_a_narrower_state() -> None:
    result, _ = prune(tiny(), text(24), unit="key_channels", amount=0.4, round=2)
    tokens, positions = tokens_of(3, 9), torch.arange(9).expand(3, 9).contiguous()
    whole = run_pieces(result, tokens, positions, [])
    for cuts in ([1, 2, 3, 4, 5, 6, 7, 8], [4], [1, 6]):
        torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), whole, atol=1e-5, rtol=0)
    late = torch.where(torch.arange(9) < 3, -1, torch.arange(9) - 3).expand(3, 9).contiguous()
    padded = run_pieces(result, tokens, late, [5])[:, 3:]
    torch.testing.assert_close(padded, run_pieces(result, tokens[:, 3:], late[:, 3:], []), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "other",
    [
        Window(window=5, sinks=2),
        Linearize(window=5, feature_size=12, keep="none"),
        Sparsify(budget=64, page=4, window=5),
        Prune(unit="ffn", amount=0.2, round=4, protect="none", refit=False, score="magnitude"),
        Prune(unit="heads", amount=0.25, protect="none", protect_heads="none", refit=False, score="magnitude"),
        Prune(unit="key_channels", amount=0.3, round=2, protect="none", protect_heads="none"),
    ],
)
def test_other_passes_follow(other: Any) -> None:
    narrow, _ = prune(tiny(), text(24), unit="key_channels", amount=0.4, round=2)
    result, report = other.apply(narrow, plan_pass(other, narrow, TARGET))
    require_well_formed(result)
    assert len(report.sites) == 2
    tokens = tokens_of(2, 5)
    if isinstance(other, Prune):
        assert result.parameter_count < narrow.parameter_count and torch.isfinite(result.run(tokens)).all()
    else:
        torch.testing.assert_close(result.run(tokens), narrow.run(tokens), atol=1e-5, rtol=0)


def test_sizes_are_multiples_of_eight_channels_at_most() -> None:
    group = keys(tiny(head_dim=20))
    assert group.units == 10 and legal(group, 64) == legal(group, 8) == [0, 2, 6]
    assert legal(group, 4) == [0, 2, 4, 6, 8] and legal(group, 1) == list(range(10))
    assert Task(group, 2).cost == 2 * 2 * (4 + 2) * 24


def test_layers_can_be_cut_one_by_one() -> None:
    program = tiny()
    pass_ = Prune(unit="key_channels", amount=0.4, round=2, protect="none", protect_heads="none")
    plan = replace(plan_pass(pass_, program, TARGET), calibration=text(24))
    narrow = dict(pass_.one_by_one(program, plan))
    assert [[spec.shape[3] for spec in one.states if "key" in spec.name] for one in narrow.values()] == [
        [6, 10],
        [10, 6],
    ]


def test_a_block_with_a_protected_head_stays_as_it_is() -> None:
    plan = Prune(unit="key_channels", round=2, protect="none", protect_heads="heads:[1.0]").plan(tiny(), TARGET)
    assert [site.layer for site in plan.sites] == [0]
    assert [(rejection.layer, rejection.code) for rejection in plan.rejections] == [(1, "protected")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:unit=key_channels,score=obs", "score=obs says nothing of unit=key_channels"),
        ("prune:unit=key_channels,score=wanda", "score=wanda says nothing of unit=key_channels"),
        ("prune:unit=key_channels,score=influence", "score=influence says nothing of unit=key_channels"),
        ("prune:unit=ffn,score=think", "score=think says nothing of unit=ffn"),
        ("prune:unit=layers,score=think", "score=think says nothing of unit=layers"),
        ("prune:unit=key_channels,allocate=search", "and unit=key_channels"),
        ("prune:unit=ffn,of=units", "of=units counts key channels, not unit=ffn"),
        ("prune:unit=key_channels,protect=none,round=2,amount=0.9", "at most 0.800 of key channels can go"),
        ("prune:unit=key_channels,protect=none,round=2,of=model", "of block parameters can go"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_spec(spec).plan(tiny(), TARGET)
    assert caught.value.code == "E203" and message in caught.value.message and caught.value.next


def test_queries_that_are_not_finite_name_the_layer() -> None:
    program = tiny().copy()
    weight = get_tensor(program.module, "model.layers.1.attention.q.weight").detach().clone()
    weight[3] = torch.inf
    set_tensor(program.module, "model.layers.1.attention.q.weight", weight)
    with pytest.raises(MemcError, match=r"E403 activations on calibration text are not finite \[layer 1"):
        prune(program, text(24), unit="key_channels", amount=0.4, round=2)

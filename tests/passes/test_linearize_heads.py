"""Layers of which some heads stay softmax: equations, identity, state law, lowering, training, and what is chosen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memc import sites
from memc.analysis.layers import restored
from memc.blocks import AttentionBlock
from memc.conversion.pipeline import Pipeline, plan_all
from memc.errors import MemcError
from memc.head_split import HeadSplit
from memc.objective import relative_error
from memc.passes.linearize import Linearize
from memc.passes.linearize.objective import SharedObjective
from memc.pipeline import parse_spec
from memc.program import Program
from memc.progress import Silent
from memc.recipe import Train
from memc.report.files import HeadFacts
from memc.train import Trainer
from memc.train.blocks import Teacher
from memc.train.guard import Guard
from memc.train.transfer import Transfer
from memc.verify import VerificationText
from tests.backends.onnx_support import SCENARIOS, build, compare
from tests.core.test_heads import VOCAB, planted
from tests.passes.oracle import lizard_attention, shared_attention
from tests.passes.test_linearize import SMALL, rewrite, shake
from tests.passes.tiny_program import (
    TARGET,
    Attention,
    masked_softmax,
    naive_run,
    run_pieces,
    tiny,
    tokens_of,
)

FOREVER = 10**6
MIXED = "heads:[0.1,1.0]"


def mixed(linear: Attention, kept: list[tuple[int, int]]) -> Attention:
    """Full softmax in the kept heads, the linear layer in the others, picked by index."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        out = masked_softmax(FOREVER, 0)(a, block, hidden)
        groups = [g for g in range(block.num_kv_heads) if (block.layer, g) not in kept]
        if not groups:
            return out
        size = block.num_heads // block.num_kv_heads
        heads = [g * size + i for g in groups for i in range(size)]
        part = dict(a)
        for name in ("query", "query_pre_rotary"):
            part[name] = a[name][:, heads]
        for name in ("key", "key_pre_rotary", "value"):
            part[name] = a[name][:, groups]
        if a["sink_logits"] is not None:
            part["sink_logits"] = a["sink_logits"][heads]
        out[:, heads] = linear(part, replace(block, num_heads=len(heads), num_kv_heads=len(groups)), hidden)
        return out

    return attention


@pytest.mark.parametrize(
    ("model", "choice", "kept"),
    [
        ({}, {}, [(0, 1), (1, 0)]),
        ({}, {}, [(0, 0), (0, 1), (1, 1)]),
        ({"heads": 4, "kv_heads": 4, "head_dim": 14}, {}, [(0, 0), (0, 2), (1, 1), (1, 2)]),
        ({"heads": 6, "kv_heads": 3}, {"gate": "channel"}, [(0, 1), (1, 0), (1, 2)]),
        ({"softcap": 2.0, "sink_logits": (0.5, -1.0, 2.0, 0.0)}, {}, [(0, 1), (1, 0)]),
        ({}, {"update": "gated_delta", "gate": "head"}, [(0, 1)]),
        ({}, {"form": "lizard"}, [(0, 1), (1, 0)]),
    ],
    ids=str,
)
def test_a_mixed_layer_equals_its_equations(
    model: dict[str, Any], choice: dict[str, Any], kept: list[tuple[int, int]]
) -> None:
    program = tiny(**model)
    sizes = {"window": 5, "feature_size": 12} if choice.get("form") == "lizard" else SMALL
    options = Linearize(**{**sizes, **choice}, keep=sites.listed_groups(kept))
    result = shake(rewrite(program, options)[0])
    tokens = tokens_of(2, 17)
    oracle = lizard_attention if options.form == "lizard" else shared_attention
    expected = naive_run(program, mixed(oracle(result, options), kept), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=5e-5, rtol=0)


def test_the_oracle_sees_other_heads_kept() -> None:
    program, tokens = tiny(layers=1), tokens_of(2, 17)
    options = Linearize(**SMALL, keep="heads:[0.1]")
    result = shake(rewrite(program, options)[0])
    wrong = naive_run(program, mixed(shared_attention(result, options), [(0, 0)]), tokens)
    assert (result.run(tokens) - wrong).abs().max() > 1e-2


@settings(max_examples=8, deadline=None)
@given(data=st.data(), groups=st.integers(2, 4), size=st.integers(1, 2), window=st.integers(1, 8))
def test_any_choice_of_heads_keeps_identity_and_state_law(
    data: st.DataObject, groups: int, size: int, window: int
) -> None:
    program = tiny(layers=1, heads=groups * size, kv_heads=groups, head_dim=6)
    kept = data.draw(st.sets(st.integers(0, groups - 1), max_size=groups - 1))
    options = Linearize(window=window, sinks=2, feature_size=8, keep=sites.listed_groups((0, group) for group in kept))
    result = shake(rewrite(program, options)[0], mass=10.0)
    short = tokens_of(2, window, seed=window)
    torch.testing.assert_close(result.run(short), program.run(short), atol=1e-5, rtol=0)
    cuts = data.draw(st.lists(st.integers(1, 19), max_size=4))
    tokens = tokens_of(2, 20)
    positions = torch.arange(20).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=5e-5, rtol=0)


def test_kept_heads_keep_the_models_own_window() -> None:
    """With the memory off, heads kept in a layer of a window of 9 are those of the original, and no longer ones."""
    program = tiny(layers=1, window=9)
    options = Linearize(**SMALL, keep="heads:[0.0]")
    result, report = rewrite(program, options)
    (objective,) = report.objectives
    taken: dict[str, Tensor] = {}
    tokens = tokens_of(1, 30)
    positions = torch.arange(30)[None]
    Teacher(result, [(objective.whole,)]).run(tokens, positions, lambda _, values: taken.update(values))
    Teacher(program, [(objective.target,)]).run(tokens, positions, lambda _, values: taken.update(values))
    torch.testing.assert_close(taken[objective.whole][:, :2], taken[objective.target][:, :2], atol=1e-6, rtol=0)
    assert (taken[objective.whole][:, 2:] - taken[objective.target][:, 2:]).abs().max() > 1e-2


def test_a_padded_batch_equals_one_sequence_at_a_time() -> None:
    result = shake(rewrite(tiny(), Linearize(**SMALL, keep=MIXED))[0])
    lengths, width = [3, 14, 20], 20
    tokens, positions = tokens_of(3, width), torch.full((3, width), -1)
    for row, length in enumerate(lengths):
        positions[row, width - length :] = torch.arange(length)
    together = run_pieces(result, tokens, positions, [4, 13])
    for row, length in enumerate(lengths):
        alone = result.run(tokens[row : row + 1, width - length :])
        torch.testing.assert_close(together[row, width - length :], alone[0], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "model", [{}, {"softcap": 2.0, "sink_logits": (0.5, -1.0, 2.0, 0.0)}, {"heads": 6, "kv_heads": 3}], ids=str
)
def test_a_mixed_layer_runs_in_onnx(model: dict[str, Any], tmp_path: Path) -> None:
    keep = "heads:[0.0,0.2,1.1]" if model.get("kv_heads") == 3 else MIXED
    result = shake(rewrite(tiny(**model), Linearize(**SMALL, keep=keep))[0])
    runner = build(result, tmp_path)
    for name, calls in SCENARIOS.items():
        assert compare(result, runner, calls) < 1e-4, name


def test_states_parameters_and_report() -> None:
    program = tiny()
    result, report = rewrite(program, Linearize(**SMALL, keep="heads:[0.0,0.1,1.1]"))
    names = [f"layer{layer}_{name}" for layer in (0, 1) for name in ("key", "value", "positions")]
    names += ["layer1_key_window", "layer1_value_window", "layer1_positions_window", "layer1_memory"]
    assert [spec.name for spec in result.states] == names
    shapes = {spec.name: spec.shape for spec in result.states}
    assert shapes["layer0_key"] == ("B", 2, "S", 10) and shapes["layer1_key"] == ("B", 1, "S", 10)
    assert shapes["layer1_key_window"] == ("B", 1, 7, 10) and shapes["layer1_memory"] == ("B", 1, 12, 11)
    new = {n.rpartition(".")[2]: p.shape for n, p in result.module.named_parameters() if n.startswith("memc.")}
    assert (new["query_map"], new["key_map"], new["mass_bias"]) == ((2, 10, 12), (1, 10, 12), (2,))
    assert [(site.layer, site.path) for site in report.sites] == [(1, "model.layers.1.attention")]
    assert [(r.layer, r.code) for r in report.rejections] == [(0, "kept")]
    assert report.details["1"]["kept_heads"] == [1]
    assert report.details["1"]["state_bytes"] == 7 * (20 * 4 + 8) + 12 * 11 * 4
    assert report.details["1"]["state_bytes_per_token"] == 20 * 4 + 8
    assert {block.num_kv_heads for block in sites.attention_blocks(result)} == {2, 1}


def test_another_pass_takes_what_stayed() -> None:
    result = rewrite(tiny(), Linearize(**SMALL, keep=MIXED))[0]
    window = parse_spec("window:window=6")
    again, _ = window.apply(result, window.plan(result, TARGET))
    assert all(spec.grows is None for spec in again.states)
    short = tokens_of(2, 5)
    torch.testing.assert_close(again.run(short), result.run(short), atol=1e-5, rtol=0)


def test_all_heads_of_all_layers_is_a_plan_with_reasons() -> None:
    plan = Linearize(keep="heads:[0.0,0.1,1.0,1.1]").plan(tiny(), TARGET)
    assert (plan.sites, [r.code for r in plan.rejections]) == ((), ["kept", "kept"])


def test_no_head_makes_every_head_linear() -> None:
    program, tokens = tiny(), tokens_of(2, 20)
    none = shake(rewrite(program, Linearize(**SMALL, keep="heads:[]"))[0])
    every = shake(rewrite(program, Linearize(**SMALL, keep="none"))[0])
    assert [spec.name for spec in none.states] == [spec.name for spec in every.states]
    assert torch.equal(none.run(tokens), every.run(tokens))


@pytest.mark.parametrize("update", ["gated", "gated_delta"])
def test_gradients_reach_every_new_parameter(update: str) -> None:
    result = shake(rewrite(tiny(), Linearize(**SMALL, update=update, keep=MIXED))[0])
    result.run(tokens_of(2, 20)).square().sum().backward()
    for name, p in result.module.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


def trained_on(program: Program, options: Linearize) -> tuple[Program, Transfer, list[SharedObjective]]:
    result, report = rewrite(program, options)
    objectives = [o for o in report.objectives if isinstance(o, SharedObjective)]
    return result, Transfer(program, result, report.objectives), objectives


def test_training_sees_the_linear_heads_alone() -> None:
    program = tiny(sink_logits=(0.5, -1.0, 2.0, 0.0))
    _, transfer, objectives = trained_on(program, Linearize(**SMALL, keep=MIXED))
    _, all_of_it, wholes = trained_on(program, Linearize(**SMALL, keep="none"))
    assert [objective.heads for objective in objectives] == [(0, 1), (2, 3)]
    tokens, rows = tokens_of(2, 30), torch.tensor([9, 20, 29])
    positions = torch.arange(30).expand_as(tokens)
    seen: list[dict[str, Tensor]] = []
    all_of_it.teacher.run(tokens, positions, lambda _, values: seen.append(values))
    for values, some, whole, heads in zip(seen, objectives, wholes, ([0, 1], [2, 3]), strict=True):
        far = whole.far_attention(values, rows)
        assert far.sum() > 0.1
        torch.testing.assert_close(some.far_attention(values, rows), far[:, heads])
        assert torch.equal(some.wanted(values), values[some.target][:, heads])
    for layer, (block, heads) in enumerate(zip(transfer.blocks, ([0, 1], [2, 3]), strict=True)):
        assert not any(spec.grows is not None for spec in block.states)  # the kept heads are not run again
        assert block(seen[layer])[0].shape == (2, 2, 30, 10)
        error = relative_error(block(seen[layer])[0], seen[layer][objectives[layer].target][:, heads], 5)
        assert transfer.errors(tokens, positions)[layer] == pytest.approx(error.item())


@pytest.mark.parametrize("form", ["shared", "lizard"])
def test_training_brings_the_linear_heads_nearer(form: str) -> None:
    program = tiny(layers=1, heads=4, kv_heads=4)
    options = Linearize(form=form, window=5, feature_size=12, keep="heads:[0.1,0.3]")
    result, report = rewrite(program, options)
    transfer = Transfer(program, result, report.objectives)
    tokens = tokens_of(4, 40)
    positions = torch.arange(40).expand_as(tokens)
    transfer.initialise(tokens, positions)
    errors = [transfer.errors(tokens, positions)[0]]
    (block,) = transfer.blocks
    optimiser = torch.optim.Adam(block.parameters.values(), lr=2e-2)
    for step in range(25):

        def learn(_: int, values: dict[str, Tensor], step: int = step) -> None:
            losses = block.objective.losses(block(values), values, 1.0, torch.Generator().manual_seed(step))
            optimiser.zero_grad()
            torch.stack(list(losses.values())).sum().backward()
            optimiser.step()

        transfer.teacher.run(tokens, positions, learn)
    errors.append(transfer.errors(tokens, positions)[0])
    assert errors[1] < 0.8 * errors[0]


def test_a_mixed_layer_is_trained_by_every_stage(tmp_path: Path) -> None:
    def batches(step: int) -> tuple[Tensor, Tensor]:
        return tokens_of(1, 40, seed=step), torch.arange(40)[None]

    held_out = tokens_of(2, 40, seed=999)
    guard = Guard.of(held_out, torch.arange(40).expand_as(held_out))
    trainer = Trainer(Train(length=40), 40 * 40, batches, guard, 0, {"model": "tiny"}, None, Silent())
    passes = [Linearize(window=6, sinks=1, feature_size=12, keep=MIXED)]
    pipeline = Pipeline(passes, TARGET, VerificationText(held_out, "random"), folder=tmp_path, trainer=trainer)
    _, (run,) = pipeline.run(tiny())
    training = run.report.training
    assert training is not None and training.choice is None and training.recovery is not None
    for layer in (0, 1):
        errors = [training.transfer.errors[when][layer] for when in ("untrained", "initial", "trained")]
        assert errors[0] > 1.5 * errors[1] > 1.5 * errors[2]
    ratio = next(facts for facts in run.report.relations if facts.metric == "kl_ratio_to_window")
    assert ratio.passed and ratio.value is not None and ratio.value < 0.8


def test_restoring_a_mixed_layer_gives_the_original() -> None:
    program = tiny()
    result, report = rewrite(program, Linearize(**SMALL, keep=MIXED))
    module, states = restored(program, result, report.objectives, [0, 1])
    tokens = tokens_of(1, 20)
    logits = module(tokens, torch.arange(20)[None], *(spec.empty(1) for spec in states))
    torch.testing.assert_close(logits, program.run(tokens), atol=1e-6, rtol=0)


# Which heads


def test_a_share_plans_as_many_heads_evenly_spread() -> None:
    program = tiny(layers=4)
    options = Linearize(**SMALL, keep="heads:25%")
    _, (report,) = plan_all([options], program, TARGET)
    assert report.spec == "linearize:window=5,sinks=2,feature_size=12,keep=heads:25%"
    kept = {layer: facts.get("kept_heads") for layer, facts in report.details.items()}
    assert kept == {"0": None, "1": [0], "2": None, "3": [0]}


def test_the_share_is_settled_by_the_weights_and_reported() -> None:
    program = planted()
    options = Linearize(window=4, sinks=1, feature_size=8, keep="heads:50%")
    resolved, details = options.resolve(program, TARGET)
    assert resolved.keep == "heads:[1.1]"
    assert parse_spec(resolved.spec) == resolved
    assert resolved.resolve(program, TARGET) == (resolved, {})
    facts = HeadFacts.model_validate(details["heads"])
    assert [(layer.layer, layer.kv_heads, layer.kept) for layer in facts.layers] == [(0, 1, []), (1, 2, [1])]
    assert facts.layers[1].induction[3] > 0.9 and len(facts.layers[1].echo) == 4


def test_the_pipeline_settles_the_share_and_reports_the_scores(tmp_path: Path) -> None:
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    passes = [parse_spec("linearize:window=4,sinks=1,feature_size=8,keep=heads:50%")]
    text = VerificationText(tokens, "random")
    result, (run,) = Pipeline(passes, TARGET, text, folder=tmp_path).run(planted())
    assert run.report.spec == "linearize:window=4,sinks=1,feature_size=8,keep=heads:[1.1]"
    assert run.report.details["heads"]["layers"][1]["kept"] == [1]
    assert run.report.details["1"]["kept_heads"] == run.report.sites[0].kept == [1]
    # Untrained it is the window in the other heads, and the window pass is compared with in those alone.
    assert run.report.relations[1].value == pytest.approx(1.0, abs=1e-4)
    shapes = {spec.name: spec.shape for spec in result.states}
    assert shapes["layer1_key"] == ("B", 1, "S", VOCAB) and shapes["layer1_key_window"] == ("B", 1, 5, VOCAB)


@pytest.mark.parametrize("keep", ["heads:[2.0]", "heads:[0.0,1.2]"])
def test_a_head_that_is_not_there_is_refused(keep: str) -> None:
    named = keep[-4:-1]
    with pytest.raises(MemcError, match=rf"E203.*key-value head {named}.*layers 0 to 1, heads 0 to 1"):
        Linearize(keep=keep).plan(tiny(), TARGET)


@given(groups=st.integers(1, 5), size=st.integers(1, 3), kept=st.sets(st.integers(0, 4)), data=st.data())
def test_what_is_taken_apart_is_put_together(groups: int, size: int, kept: set[int], data: st.DataObject) -> None:
    split = HeadSplit(groups, size, tuple(sorted(group for group in kept if group < groups)))
    x = torch.arange(groups * size)[None, :, None, None]
    if 0 < len(split.kept) < groups:
        parts = split.take(x, split.kept), split.take(x, split.others)
        assert parts[0].flatten().tolist() == list(split.heads(split.kept))
        assert torch.equal(split.join(*parts), x)
    assert sorted(split.heads(split.kept) + split.heads(split.others)) == list(range(groups * size))

"""Branches left out and shares of the mass, against the window pass, float64 sums and planted faults."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.analysis.branches import measure_branches, silenced
from memc.blocks import AttentionBlock
from memc.conversion.pipeline import window_baseline
from memc.objective import BlockObjective
from memc.passes.linearize import Linearize
from memc.pipeline import PassReport
from memc.program import Program, get_tensor, named_tensors, set_tensor
from memc.progress import Silent
from memc.report.files import BranchFacts
from tests.passes.oracle import features, gate, layer_parameters, lizard_attention, shared_attention
from tests.passes.test_linearize import shake
from tests.passes.test_linearize_heads import mixed
from tests.passes.tiny_program import TARGET, Attention, masked_softmax, naive_run, scores, tiny, tokens_of
from tests.train.tiny_training import SMALL, TEACHERS, changed, linearized, packed, tensors_of, transfer

TOKENS, POSITIONS = packed(3, seed=5)
FOREVER = 10**6
LIZARD: dict[str, Any] = {"form": "lizard", "sinks": 4}
HEADS = "heads:[0.1,1.0]"
FORMS: list[dict[str, Any]] = [{}, {"update": "gated_delta"}, {"gate": "channel", "feature": "hedgehog"}]


def shaken(before: Program, **options: Any) -> tuple[Program, PassReport]:
    after, report = linearized(before, **options)
    return shake(after), report


def measured(before: Program, after: Program, report: PassReport) -> BranchFacts:
    facts = measure_branches(before, after, report.objectives, TOKENS, POSITIONS, Silent())
    assert facts is not None
    return facts


def add(program: Program, report: PassReport, name: str, value: float) -> Program:
    """Add a number to one parameter of every block."""
    with torch.no_grad():
        for objective in report.objectives:
            get_tensor(program.module, objective.parameters[name]).add_(value)
    return program


@pytest.mark.parametrize("options", [*FORMS, {"keep": "[1]"}, {"keep": HEADS}], ids=str)
@pytest.mark.parametrize("teacher", TEACHERS, ids=str)
def test_without_the_memory_a_model_is_the_window_pass(teacher: dict[str, Any], options: dict[str, Any]) -> None:
    if options.get("keep") == HEADS and "kv_heads" in teacher:
        pytest.skip("one key-value head cannot be kept in part")
    before = tiny(**teacher)
    after, report = shaken(before, **options)
    pass_ = Linearize(**{**SMALL, **options})
    window = window_baseline(pass_, pass_.plan(before, TARGET), before, TARGET)
    found = silenced(after, report.objectives, "memory").run(TOKENS, POSITIONS)
    assert torch.equal(found, window.run(TOKENS, POSITIONS))
    assert not torch.allclose(found, after.run(TOKENS, POSITIONS), atol=1e-2)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("teacher", [*TEACHERS[:2], TEACHERS[3]], ids=str)
def test_without_the_window_a_model_reads_its_memory_alone(teacher: dict[str, Any], options: dict[str, Any]) -> None:
    before = tiny(**teacher)
    after, report = shaken(before, **options)
    found = silenced(after, report.objectives, "window").run(TOKENS[:1])
    loud = add(after, report, "mass_bias", 60.0)  # so that in float64 the oracle's window weighs nothing
    expected = naive_run(before, shared_attention(loud, Linearize(**{**SMALL, **options})), TOKENS[:1])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


def test_without_the_window_kept_heads_still_read_everything() -> None:
    before = tiny()
    after, report = shaken(before, keep=HEADS)
    found = silenced(after, report.objectives, "window").run(TOKENS[:1])
    loud = add(after, report, "mass_bias", 60.0)
    linear = shared_attention(loud, Linearize(**SMALL))
    expected = naive_run(before, mixed(linear, [(0, 1), (1, 0)]), TOKENS[:1])
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("branch", ["memory", "window"])
def test_a_branch_of_the_lizard_form_leaves_the_other_term_of_its_sum(branch: str) -> None:
    before = tiny()
    after, report = shaken(before, **LIZARD)
    deaf = after.copy()
    for objective in report.objectives:
        set_tensor(deaf.module, objective.parameters["alpha"], torch.zeros(()))
    options = Linearize(form="lizard", window=SMALL["window"], feature_size=SMALL["feature_size"])
    whole, gated = (lizard_attention(program, options) for program in (after, deaf))

    def left(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        memory = gated(a, block, hidden)
        return memory if branch == "window" else whole(a, block, hidden) - memory

    found = silenced(after, report.objectives, branch).run(TOKENS[:1])
    torch.testing.assert_close(found, naive_run(before, left, TOKENS[:1]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, LIZARD, {"keep": HEADS}], ids=str)
def test_leaving_out_changes_and_copies_nothing_of_the_model(options: dict[str, Any]) -> None:
    after, report = shaken(tiny(), **options)
    logits, tensors = after.run(TOKENS), tensors_of(after)
    for branch in ("memory", "window"):
        made = silenced(after, report.objectives, branch)
        own = {id(value) for _, value in named_tensors(after.module)}
        assert {id(value) for _, value in named_tensors(made.module)} <= own
    assert torch.equal(after.run(TOKENS), logits) and not changed(tensors, tensors_of(after))


def test_every_block_is_silenced_not_some() -> None:
    after, report = shaken(tiny())
    some, every = (silenced(after, objectives, "memory").run(TOKENS) for objectives in
                   (report.objectives[:1], report.objectives))  # fmt: skip
    assert not torch.allclose(some, every, atol=1e-3)


def distance(original: Tensor, found: Tensor, positions: Tensor, exact: int) -> tuple[float, float]:
    """Perplexity ratio and mean KL, token by token, in float64."""
    given, made = original.double().log_softmax(-1), found.double().log_softmax(-1)
    kl, nll = list[float](), list[float]()
    for row, at in enumerate(positions.tolist()):
        for t, place in enumerate(at):
            if place >= exact:
                kl.append(float((given[row, t].exp() * (given[row, t] - made[row, t])).sum()))
                if t + 1 < len(at) and at[t + 1] == place + 1:
                    after = TOKENS[row, t + 1]
                    nll.append(float(given[row, t, after] - made[row, t, after]))
    return math.exp(sum(nll) / len(nll)), sum(kl) / len(kl)


@pytest.mark.parametrize("options", [{}, LIZARD], ids=str)
def test_distances_are_of_the_tokens_past_what_is_exact(options: dict[str, Any]) -> None:
    before = tiny()
    after, report = shaken(before, **options)
    positions = POSITIONS.clone()
    positions[2, :3], positions[2, 3:] = -1, torch.arange(positions.shape[1] - 3)
    facts = measure_branches(before, after, report.objectives, TOKENS, positions, Silent())
    assert facts is not None and facts.ablation is not None
    exact = report.objectives[0].exact
    assert facts.ablation.tokens == int((positions >= exact).sum()) and exact == (0 if options else 4)
    sides = {"memory": silenced(after, report.objectives, "memory"),
             "window": silenced(after, report.objectives, "window")}  # fmt: skip
    assert list(facts.ablation.without) == list(sides) == facts.branches
    for found, program in ((facts.ablation.as_it_is, after), *((facts.ablation.without[n], sides[n]) for n in sides)):
        with torch.no_grad():
            logits = [side.run(TOKENS, positions) for side in (before, program)]
        ratio, kl = distance(*logits, positions, exact)
        assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
        assert found.kl_mean == pytest.approx(kl, rel=1e-4)


def explicit_shares(after: Program, options: Linearize, found: dict[str, Tensor]) -> Attention:
    """Full attention that also sums up, in float64, what layer 0's memory and the original's far tokens weigh."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        p, s = layer_parameters(after, block.layer), scores(a)
        size = block.num_heads // block.num_kv_heads
        carried, due = torch.zeros(s.shape[:3]).double(), torch.zeros(s.shape[:3]).double()
        for row, head, t in itertools.product(*map(range, s.shape[:3])):
            group = head // size
            far = [j for j in range(t + 1) if t - j >= options.window and j >= options.sinks]
            near = [j for j in range(t + 1) if j not in far]
            sink = 0.0 if a["sink_logits"] is None else a["sink_logits"][head].exp()
            weights = s[row, head, t].exp()
            due[row, head, t] = weights[far].sum() / (weights[: t + 1].sum() + sink)
            q = features(options.feature_map, a["query"][row, head, t] @ p["query_map"][head])
            memory = torch.zeros(()).double()
            for j in far:
                key, value = a["key"][row, group, j], a["value"][row, group, j]
                k = features(options.feature_map, key @ p["key_map"][group])
                k = k * torch.exp(key @ p["gain_key"][group] + value @ p["gain_value"][group])
                for i in range(j + options.window + 1, t + 1):  # it is written where it leaves the window
                    k = k * gate(p, options.gate, hidden[row, i], group, options.feature_size)
                memory += q @ k
            memory *= (hidden[row, t] @ p["mass_weight"] + p["mass_bias"])[head].exp()
            carried[row, head, t] = memory / (memory + weights[near].sum() + sink)
        first = options.window + options.sinks
        found["carried"], found["due"] = (share[:, :, first:].mean((0, 2)) for share in (carried, due))
        return masked_softmax(FOREVER, 0)(a, block, hidden)

    return attention


@pytest.mark.parametrize("gate", ["token", "channel"])
@pytest.mark.parametrize("teacher", [TEACHERS[0], TEACHERS[1], TEACHERS[3]], ids=str)
def test_shares_are_those_of_explicit_sums(teacher: dict[str, Any], gate: str) -> None:
    before, found = tiny(layers=1, **teacher), dict[str, Tensor]()
    after, report = shaken(before, gate=gate)
    tokens = tokens_of(2, 20)
    naive_run(before, explicit_shares(after, Linearize(**SMALL, gate=gate), found), tokens)
    positions = torch.arange(20).repeat(2, 1)
    for wrong in (False, True):
        facts = measure_branches(before, after, report.objectives, tokens, positions, Silent())
        assert facts is not None and not facts.notes
        (share,) = facts.shares
        assert (share.layer, share.tokens) == (0, 2 * (20 - 6))
        torch.testing.assert_close(torch.tensor(share.due).double(), found["due"], atol=1e-5, rtol=0)
        off = (torch.tensor(share.carried).double() - found["carried"]).abs().max()
        assert off > 0.02 if wrong else off < 1e-5
        add(after, report, "mass_bias", 0.5)


def test_shares_of_some_heads_are_at_their_places() -> None:
    before = tiny()
    after, report = shaken(before, keep=HEADS)
    first, second = measured(before, after, report).shares
    assert [share is None for share in first.carried] == [False, False, True, True]
    assert [share is None for share in second.carried] == [True, True, False, False]
    whole, its = shaken(before)
    due = [share.due for share in measured(before, whole, its).shares]
    assert first.due == [*due[0][:2], None, None] and second.due == [None, None, *due[1][2:]]


def test_a_memory_that_is_of_no_use_shows_as_no_difference() -> None:
    before = tiny()
    after, report = linearized(before)
    transfer(before, after, report, steps=30)
    used = measured(before, after, report)
    assert used.ablation is not None
    whole, without = used.ablation.as_it_is.kl_mean, used.ablation.without["memory"].kl_mean
    assert whole is not None and without is not None and without > 1.1 * whole
    assert all(min(map(float, share.carried)) > 0.05 for share in used.shares)  # type: ignore[arg-type]
    add(after, report, "mass_bias", -200.0)
    idle = measured(before, after, report)
    assert idle.ablation is not None and idle.ablation.as_it_is == idle.ablation.without["memory"]
    assert idle.ablation.as_it_is.kl_mean == pytest.approx(without, rel=1e-6)
    assert all(share.carried == [0.0] * 4 for share in idle.shares)
    assert [share.due for share in idle.shares] == [share.due for share in used.shares]


def test_what_cannot_be_told_is_left_out_with_its_reason() -> None:
    before = tiny()
    after, report = shaken(before, **LIZARD)
    facts = measured(before, after, report)
    assert facts.ablation is not None and not facts.shares and "no mass is shared" in facts.notes[0]
    after, report = shaken(before)
    short = POSITIONS[:, :4].contiguous()
    short_facts = measure_branches(before, after, report.objectives, TOKENS[:, :4], short, Silent())
    assert (
        short_facts is not None and short_facts.ablation is None and "longer than the 4 tokens" in short_facts.notes[0]
    )
    assert measure_branches(before, after, [Plain.of(report.objectives[0])], TOKENS, POSITIONS, Silent()) is None


class Plain(BlockObjective):
    """A block of one piece, as passes write them that say nothing of branches."""

    @classmethod
    def of(cls, other: BlockObjective) -> Plain:
        return cls(other.layer, other.path, other.parameters, other.target, (), other.results, other.exact)

    def losses(self, *_: Any) -> dict[str, Tensor]:
        return {}


def test_asking_a_block_of_one_piece_is_an_error() -> None:
    plain = Plain(3, "model.layers.3", {}, "target", (), (), 0)
    for ask in (lambda: plain.without("memory", []), lambda: plain.carried([]), lambda: plain.due({})):
        with pytest.raises(ValueError, match=r"layer 3 model\.layers\.3 has no"):
            ask()

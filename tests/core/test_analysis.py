"""Analyses: planted bigram channels, copy and memory heads are found; what is planted wrongly is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from memc.analysis.bigram import Mask, bigram_table, learn_mask, measure_mask, split_rows
from memc.analysis.gated import gated_logits
from memc.analysis.mediation import FILLER, Mediation, Prompts, make_prompts, mediation
from memc.analysis.methods import parse_analysis
from memc.analysis.units import BlockUnits, refusals, units_of
from memc.errors import MemcError
from memc.passes.prune.groups import Groups
from memc.program import InputSpec, Program, get_tensor, set_tensor
from memc.progress import Silent
from memc.verify.inputs import positions_of
from tests.core.test_families import DECODERS, raised
from tests.core.test_heads import VOCAB, planted
from tests.families import HEADS
from tests.passes.tiny_program import tiny, tokens_of

WORDS = 12
PLANTED = "model.layers.0.mlp"


def permuted(count: int, seed: int = 5) -> Tensor:
    """A permutation of ``count`` tokens."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@cache
def bigram_model() -> Program:
    """A decoder whose first feed-forward network maps each token to its successor, a channel for each token.

    Everything else, the other channels of that network included, is small random noise.
    """
    program = tiny(vocab=WORDS, tied=False, scale=0.05).copy()
    weights = {name: get_tensor(program.module, name).detach().clone() for name in _NAMES}
    one = torch.eye(WORDS)
    weights["model.embed.weight"] = torch.cat([one, torch.zeros(WORDS, WORDS)], 1)
    weights["lm_head.weight"] = 4 * torch.cat([torch.zeros(WORDS, WORDS), one], 1)
    for name in ("gate", "up"):
        weights[f"{PLANTED}.{name}.weight"][:WORDS] = 2 * torch.cat([one, torch.zeros(WORDS, WORDS)], 1)
    weights[f"{PLANTED}.down.weight"][:, :WORDS] = torch.cat([torch.zeros(WORDS, WORDS), one[permuted(WORDS)].T]) / 4
    for name, value in weights.items():
        set_tensor(program.module, name, value)
    return program


_NAMES = ("model.embed.weight", "lm_head.weight", *(f"{PLANTED}.{name}.weight" for name in ("gate", "up", "down")))


def learned(program: Program, tokens: Tensor, table: Tensor, rows: Tensor, **options: Any) -> Mask:
    given = {"penalty": 0.5, "steps": 30, "batch": 4, "progress": Silent(), **options}
    return learn_mask(program, units_of(program), tokens, table, rows, **given)


@cache
def targets() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ``[12,10]``, the bigram of each, and where it is."""
    tokens = torch.randint(WORDS, (12, 10), generator=torch.Generator().manual_seed(0))
    return tokens, *bigram_table(bigram_model(), tokens)


def test_planted_bigram_channels_are_the_subnetwork() -> None:
    program, (tokens, table, rows) = bigram_model(), targets()
    assert (table.argmax(-1) == permuted(WORDS)).all()
    learned_on, held = split_rows(tokens)
    mask = learned(program, tokens[learned_on], table, rows[learned_on])
    kept = {(one.block.layer, one.block.kind): part for one, part in zip(mask.units, mask.kept, strict=True)}
    assert kept[0, "feed_forward"][:WORDS].all() and not kept[0, "feed_forward"][WORDS:].any()
    assert not kept[1, "feed_forward"].any() and not kept[0, "attention"].any() and not kept[1, "attention"].any()
    fit = measure_mask(program, mask, tokens[held], table, rows[held])
    assert fit.kept < 0.01 * fit.none and fit.kept < 0.01 * fit.random and fit.correlation > 0.99
    assert fit.without > 1.5 * fit.without_random and fit.tokens == 30
    assert mask.share == pytest.approx(WORDS * 72 / 9792)


def test_a_mask_for_another_bigram_is_told_from_the_right_one() -> None:
    program, (tokens, table, rows) = bigram_model(), targets()
    wrong = table[permuted(WORDS, 6)]  # as if the model followed each token by another than it does
    mask = learned(program, tokens, wrong, rows)
    fit = measure_mask(program, mask, tokens, table, rows)
    assert fit.kept > 0.5 * fit.none and fit.correlation < 0.9


def test_a_high_penalty_leaves_nothing() -> None:
    mask = learned(bigram_model(), *targets(), penalty=50.0, steps=20)
    assert mask.share == 0.0 and not any(part.any() for part in mask.kept)


def test_a_unit_costs_what_pruning_says() -> None:
    program = tiny()
    for one in units_of(program):
        group = Groups(program).of(one.block, "query_heads" if one.kv_heads else "ffn_channels")
        shared = 2 * 2 * 10 * 24 / 4 if one.kv_heads else 0  # keys and values stay when a query head goes
        assert one.cost == int(group.cost[0]) + shared


def test_gates_compute_what_zeros_in_the_weights_do() -> None:
    program, tokens = tiny(), tokens_of(2, 7)
    for one in units_of(program):
        gates = torch.ones(one.count)
        gates[1] = 0.0
        found = gated_logits(program, tokens, positions_of(tokens), {one.node: one.shaped(gates)})
        changed, linear = program.copy(), one.exit if one.kv_heads else one.block.down  # type: ignore[union-attr]
        name = str(linear.args[1].target)
        weight = get_tensor(program.module, name).detach().clone()
        weight[:, weight.shape[1] // one.count : 2 * weight.shape[1] // one.count] = 0.0
        set_tensor(changed.module, name, weight)
        assert torch.allclose(found, changed.run(tokens), atol=1e-6)


def two_sided() -> Program:
    """The planted induction model with a memory too: head 0 attends to the token itself and names its successor."""
    program = planted().copy()
    one = torch.eye(VOCAB)
    values = {name: get_tensor(program.module, name).detach().clone() for name in ("q1", "k1", "head")}
    values["q1"][:VOCAB, :VOCAB] = 30 * one
    values["k1"][:VOCAB, :VOCAB] = one
    values["head"] = torch.cat([12 * one[permuted(VOCAB)].T, 0.1 * one, 0.1 * one, 20 * one], 1)
    for name, value in values.items():
        set_tensor(program.module, name, value)
    return program


def passages(count: int) -> Tensor:
    """Passages of tokens that are all different."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(VOCAB, generator=generator)[:6] for _ in range(count)])


def patched(program: Program, prompts: Prompts) -> Mediation:
    return mediation(program, units_of(program, kinds=("attention",)), prompts, Silent())


def test_a_copy_head_carries_the_context_and_another_memory() -> None:
    program = two_sided()
    prompts = make_prompts(program, 16, passages(16))
    assert (prompts.memory == permuted(VOCAB)[prompts.tokens[:, -1]]).all()
    found = patched(program, prompts)
    (layer,) = found.layers
    assert layer.context.argmax() == 3 and layer.memory.argmax() == 0
    assert found.answered_context > 0.9 > 0.1 > found.answered_memory
    assert layer.context[3] > 5 * layer.context[:3].abs().max()
    assert layer.memory[0] > 5 * layer.memory[1:].abs().max()
    assert [part.nonzero()[:, 0].tolist() for part in found.best("context", 0.25)] == [[3]]
    assert [part.nonzero()[:, 0].tolist() for part in found.best("memory", 0.25)] == [[0]]
    assert found.best("context", 0.0)[0].sum() == 0


def test_corruptions_that_change_nothing_show_nothing() -> None:
    program = two_sided()
    prompts = make_prompts(program, 8, passages(8))
    twin = replace(prompts, other_context=prompts.tokens, other_memory=prompts.tokens)
    (layer,) = patched(program, twin).layers
    assert layer.context.abs().max() < 1e-6 and layer.memory.abs().max() < 1e-6
    assert not any(part.any() for part in patched(program, twin).best("context", 1.0))


def test_prompts_contradict_memory_and_differ_where_they_should() -> None:
    prompts = make_prompts(tiny(), 12)
    passage = (prompts.tokens.shape[1] - 1 - FILLER) // 2
    assert (prompts.context != prompts.memory).all()
    differs = prompts.tokens != prompts.other_context
    assert differs[:, passage].all() and differs.sum() == 12
    assert (prompts.tokens[:, passage] == prompts.context).all()
    assert (prompts.tokens[:, :passage] == prompts.tokens[:, -passage:]).all()
    assert (prompts.other_memory[:, :passage] == prompts.other_memory[:, -passage:]).all()
    given = make_prompts(tiny(), 3, torch.arange(20).reshape(5, 4))
    assert len(given.tokens) == 3 and given.tokens.shape[1] == 9 + FILLER


def test_a_patched_path_is_a_run_with_every_other_attention_frozen() -> None:
    program = tiny(layers=3)
    _check_path(program, make_prompts(program, 4))


QUICK = ("llama", "gpt2")
"""Families that are not left to the conformance suite."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.conformance) for name in DECODERS]
)
def test_every_decoder_is_analysed_or_refused_by_name(name: str) -> None:
    program = raised(name)[0].program
    bigram = parse_analysis("bigram:steps=2,sequences=4,length=5,batch=2")
    if name in ("mixtral", "qwen3_moe"):
        assert {one.code for one in refusals(program)} == {"moe"}
    else:
        assert not refusals(program)
    document = bigram.run(program, None, Silent())
    assert [len(one.scores) for one in document.units if one.kind == "attention"] == [HEADS, HEADS]
    assert document.bigram is not None and 0 <= document.bigram.share <= 1
    heads = parse_analysis("heads:prompts=3,share=0.5").run(program, None, Silent())
    assert len(heads.units) == 2 and all(len(one.context) == HEADS for one in heads.units)
    prompts = make_prompts(program, 3)
    _check_path(program, prompts)


def _check_path(program: Program, prompts: Prompts) -> None:
    """Compare one patched path with a whole run in which every other attention is as it was."""
    units = units_of(program, kinds=("attention",))
    found = mediation(program, units, prompts, Silent())
    seen = [_attentions(program, units, tokens) for tokens in (prompts.tokens, prompts.other_context)]
    head = seen[0][0].clone()
    head[:, 2] = seen[1][0][:, 2]
    before = {one.node: value for one, value in zip(units, seen[0], strict=True)}
    after = {**before, units[0].node: head}
    logits = [_run_with(program, prompts.tokens, given)[:, -1].log_softmax(-1) for given in (before, after)]
    effect = (logits[0] - logits[1]).gather(1, prompts.context[:, None]).mean()
    assert found.layers[0].context[2] == pytest.approx(float(effect), abs=1e-4)


class _Given(Interpreter):
    """Runs a program with some values given, and keeps those of some nodes."""

    def __init__(self, program: Program, given: dict[Node, Tensor], watch: Sequence[Node] = ()) -> None:
        super().__init__(program.module)
        self.given, self.watch, self.seen = given, watch, dict[Node, Tensor]()

    def run_node(self, n: Node) -> Any:
        value = self.given[n] if n in self.given else super().run_node(n)
        if n in self.watch:
            self.seen[n] = value
        return value


@torch.no_grad()
def _run_with(program: Program, tokens: Tensor, given: dict[Node, Tensor]) -> Tensor:
    run = _Given(program, given)
    logits: Tensor = run.run(tokens, positions_of(tokens), *program.new_state(len(tokens)))[0]
    return logits


@torch.no_grad()
def _attentions(program: Program, units: Sequence[BlockUnits], tokens: Tensor) -> list[Tensor]:
    run = _Given(program, {}, [one.node for one in units])
    run.run(tokens, positions_of(tokens), *program.new_state(len(tokens)))
    return [run.seen[one.node] for one in units]


@pytest.mark.parametrize("spec", ["bigram", "heads"])
def test_what_is_no_decoder_is_refused(spec: str) -> None:
    program = tiny()
    encoder = replace(program, model=replace(program.model, decoder=False))
    with pytest.raises(MemcError, match="E208"):
        parse_analysis(spec).run(encoder, None, Silent())
    fetching = program.copy()
    fetching.inputs = (*program.inputs, InputSpec("extra", "fetched", torch.float32, ("B", 4)))
    with pytest.raises(MemcError, match="E208"):
        parse_analysis(spec).run(fetching, None, Silent())


@pytest.mark.parametrize(
    ("spec", "code"), [("trigram", "E202"), ("heads:favour=nobody", "E203"), ("bigram:steps=0", "E203")]
)
def test_wrong_methods_are_refused(spec: str, code: str) -> None:
    with pytest.raises(MemcError, match=code):
        parse_analysis(spec)


def test_one_sequence_or_passage_is_too_little() -> None:
    one = torch.arange(8)[None]
    for spec in ("bigram", "heads"):
        with pytest.raises(MemcError, match="E207"):
            parse_analysis(spec).run(tiny(), one, Silent())


def test_values_that_are_not_finite_are_refused() -> None:
    program = tiny().copy()
    set_tensor(program.module, "model.norm.weight", torch.full((24,), torch.inf))
    with pytest.raises(MemcError, match="E403"):
        parse_analysis("bigram:steps=2,sequences=4,length=5").run(program, tokens_of(4, 5), Silent())

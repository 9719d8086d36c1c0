"""Analyses: planted bigram channels, copy and memory heads are found; what is planted wrongly is not."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.analysis.bigram import Mask, bigram_table, learn_mask, measure_mask, split_rows
from memc.analysis.gated import gated_logits
from memc.analysis.mediation import FILLER, Mediation, Prompts, make_prompts, mediation
from memc.analysis.methods import parse_analysis
from memc.analysis.units import refusals, units_of
from memc.errors import MemcError
from memc.passes.prune.groups import Groups
from memc.program import InputSpec, Program, get_tensor, set_tensor
from memc.progress import Silent
from memc.verify.inputs import positions_of
from tests.core.test_heads import VOCAB, planted
from tests.core.tiny import TinyConfig
from tests.families import FAMILIES
from tests.passes.tiny_program import tiny, tokens_of

WORDS = 12
PLANTED = "model.layers.0.mlp"


def permuted(count: int, seed: int = 5) -> Tensor:
    """A permutation of ``count`` tokens."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@cache
def bigram_model() -> Program:
    """A decoder whose first feed-forward network maps each token to its successor, a channel for each token.

    Everything else, the other channels of that network included, is small random noise but for a head of layer 1.
    """
    program = tiny(vocab=WORDS, tied=False, scale=0.15).copy()
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
    given = {"penalty": 0.5, "steps": 60, "batch": 4, "progress": Silent(), **options}
    return learn_mask(program, units_of(program), tokens, table, rows, **given)


def test_planted_bigram_channels_are_the_subnetwork() -> None:
    program, tokens = bigram_model(), torch.randint(WORDS, (12, 10), generator=torch.Generator().manual_seed(0))
    table, rows = bigram_table(program, tokens)
    assert (table.argmax(-1) == permuted(WORDS)).all()
    learned_on, held = split_rows(tokens)
    mask = learned(program, tokens[learned_on], table, rows[learned_on])
    kept = {(one.block.layer, one.block.kind): part for one, part in zip(mask.units, mask.kept, strict=True)}
    assert kept[0, "feed_forward"][:WORDS].all() and not kept[0, "feed_forward"][WORDS:].any()
    assert not kept[1, "feed_forward"].any() and not kept[0, "attention"].any()
    fit = measure_mask(program, mask, tokens[held], table, rows[held])
    assert fit.kept < 0.1 * fit.none and fit.kept < 0.1 * fit.random and fit.correlation > 0.99
    assert fit.without > 3 * fit.without_random
    assert fit.tokens == 30 and 0 < mask.share < 0.4


def test_a_mask_for_another_bigram_is_told_from_the_right_one() -> None:
    program, tokens = bigram_model(), torch.randint(WORDS, (12, 10), generator=torch.Generator().manual_seed(0))
    table, rows = bigram_table(program, tokens)
    wrong = table[permuted(WORDS, 6)]  # as if the model followed each token by another than it does
    mask = learned(program, tokens, wrong, rows)
    fit = measure_mask(program, mask, tokens, table, rows)
    right = measure_mask(program, learned(program, tokens, table, rows), tokens, table, rows)
    assert fit.kept > 10 * right.kept and fit.correlation < 0.9


def test_a_penalty_leaves_less_and_a_gate_is_what_removal_is() -> None:
    program, tokens = bigram_model(), tokens_of(4, 8) % WORDS
    table, rows = bigram_table(program, tokens)
    shares = [learned(program, tokens, table, rows, penalty=penalty).share for penalty in (0.0, 0.5, 50.0)]
    assert shares[0] > shares[1] > shares[2] == 0.0
    one = units_of(program)[1]
    group = Groups(program).of(one.block, "ffn_channels")
    assert int(one.cost) == int(group.cost[0])


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
    values["head"][:, :VOCAB] = one[permuted(VOCAB)].T
    for name, scale in (("q1", 1.0), ("k1", 1.0), ("head", 6.0)):
        set_tensor(program.module, name, scale * values[name])
    return program


def patched(program: Program, prompts: Prompts) -> Mediation:
    return mediation(program, units_of(program, kinds=("attention",)), prompts, Silent())


def test_a_copy_head_carries_the_context_and_another_memory() -> None:
    program = two_sided()
    prompts = make_prompts(program, 16)
    assert (prompts.memory == permuted(VOCAB)[prompts.tokens[:, -1]]).all()
    found = patched(program, prompts)
    (layer,) = found.layers
    assert layer.context.argmax() == 3 and layer.memory.argmax() == 0
    assert layer.context[3] > 5 * layer.context[:3].abs().max()
    assert layer.memory[0] > 5 * layer.memory[1:].abs().max()
    assert [part.nonzero()[:, 0].tolist() for part in found.best("context", 0.25)] == [[3]]
    assert [part.nonzero()[:, 0].tolist() for part in found.best("memory", 0.25)] == [[0]]
    assert found.best("context", 0.0)[0].sum() == 0


def test_corruptions_that_change_nothing_show_nothing() -> None:
    program = two_sided()
    prompts = make_prompts(program, 8)
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
    prompts = make_prompts(program, 4)
    units = units_of(program, kinds=("attention",))
    found = mediation(program, units, prompts, Silent())
    seen = [_attentions(program, units, tokens) for tokens in (prompts.tokens, prompts.other_context)]
    head = seen[0][1].clone()
    head[:, 2] = seen[1][1][:, 2]
    replaced = {units[0].node: seen[0][0], units[1].node: head, units[2].node: seen[0][2]}
    logits = {
        key: _run_with(program, prompts.tokens, {**replaced, units[1].node: value})[:, -1].log_softmax(-1)
        for key, value in (("clean", seen[0][1]), ("patched", head))
    }
    effect = (logits["clean"] - logits["patched"]).gather(1, prompts.context[:, None]).mean()
    assert found.layers[1].context[2] == pytest.approx(float(effect), abs=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_analysed_or_refused(family: str) -> None:
    pass

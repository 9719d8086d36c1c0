"""Low-rank adapters: the same function when they are put in, folded exactly, in every layout of weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from memc.program import Program, get_tensor, set_tensor
from memc.raising import raise_program
from memc.train.adapters import Adapter, add_adapters, attention_projections, fold_adapters
from memc.verify import require_well_formed
from tests.families import raw_program
from tests.passes.tiny_program import tiny, tokens_of
from tests.train.tiny_training import changed, linearized, tensors_of

TOKENS = tokens_of(2, 9)
LAYOUTS = {"llama": 8, "gpt2": 4, "phi3": 4}
"""Families, and the projections of two layers: apart, one product of [in, out] weights, one fused product."""


@cache
def program_of(family: str) -> Program:
    return raise_program(raw_program(family)[0]).program


def adapted_of(program: Program) -> tuple[Program, list[Adapter]]:
    adapted, adapters = add_adapters(program, attention_projections(program), 3, 2.0, 0)
    require_well_formed(adapted, "with adapters")
    return adapted, adapters


def learn(adapted: Program, adapters: list[Adapter]) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for adapter in adapters:
            up = get_tensor(adapted.module, adapter.up)
            up.copy_(0.1 * torch.randn(up.shape, generator=generator))


@torch.no_grad()
def logits(program: Program) -> Tensor:
    return program.run(TOKENS)


@pytest.mark.parametrize("family", LAYOUTS)
def test_adapters_are_the_identity_until_trained_and_fold_exactly(family: str) -> None:
    program = program_of(family)
    first, expected = tensors_of(program), logits(program)
    adapted, adapters = adapted_of(program)
    assert len(adapters) == LAYOUTS[family] and torch.equal(logits(adapted), expected)
    learn(adapted, adapters)
    changed_logits = logits(adapted)
    assert (changed_logits - expected).abs().max() > 1e-2
    folded = fold_adapters(program, adapted, adapters)
    torch.testing.assert_close(logits(folded), changed_logits, atol=1e-5, rtol=1e-5)
    assert changed(first, tensors_of(folded)) == {adapter.weight for adapter in adapters}
    assert not changed(first, tensors_of(program)) and torch.equal(logits(program), expected)
    for adapter in adapters:
        source = folded.provenance[adapter.weight]
        assert source.transform == "adapted" and not source.invertible
        assert source.source == program.provenance[adapter.weight].source
    untouched = set(program.provenance) - {adapter.weight for adapter in adapters}
    assert all(folded.provenance[name] == program.provenance[name] for name in untouched)


@pytest.mark.parametrize("family", LAYOUTS)
def test_gradients_reach_every_adapter(family: str) -> None:
    adapted, adapters = adapted_of(program_of(family))
    learn(adapted, adapters)
    names = [name for adapter in adapters for name in (adapter.down, adapter.up)]
    tensors = [get_tensor(adapted.module, name) for name in names]
    found = torch.autograd.grad(adapted.run(TOKENS).square().sum(), tensors)
    assert all(value.dtype == torch.float32 for value in tensors)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_adapters_go_into_a_program_whose_attention_is_rewritten() -> None:
    before = tiny()
    after, _ = linearized(before)
    adapted, adapters = add_adapters(after, attention_projections(before), 2, 2.0, 0)
    assert len(adapters) == 8 and torch.equal(logits(adapted), logits(after))
    learn(adapted, adapters)
    torch.testing.assert_close(logits(fold_adapters(after, adapted, adapters)), logits(adapted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["one name", "two names"])
def test_a_weight_that_is_read_twice_is_left_out(tied: bool) -> None:
    program = tiny()
    first, second = (f"model.layers.{layer}.attention.q.weight" for layer in range(2))
    if tied:
        owner = program.module.get_submodule(second.rpartition(".")[0])
        owner.register_parameter("weight", program.module.get_parameter(first))
    else:
        (node,) = (n for n in program.module.graph.find_nodes(op="get_attr") if n.target == second)
        node.target = first
        program.module.recompile()
    found = {weight for weight, _ in attention_projections(program).values()}
    assert len(found) == 6 and not found & {first, second}


def test_a_half_precision_weight_keeps_its_type() -> None:
    program = tiny(layers=1)
    name = "model.layers.0.attention.q.weight"
    adapted, adapters = adapted_of(program)
    learn(adapted, adapters)
    half = program.copy()
    set_tensor(half.module, name, get_tensor(program.module, name).detach().bfloat16())
    assert get_tensor(fold_adapters(half, adapted, adapters).module, name).dtype == torch.bfloat16

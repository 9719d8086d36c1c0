"""Blocks of a bank made part of a program give what they give when they are fetched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memc.bank.fuse import fuse
from memc.program import Program
from memc.verify import well_formed
from tests.core.test_families import raised
from tests.passes.test_memory_bank import bank, blocks_of, run
from tests.passes.tiny_program import tiny, tokens_of

WIDER = {"llama": True, "gemma2": True, "phi3": False, "gpt2": False, "opt": False, "minimal_gpt": False}
"""Families, and whether their networks are made wider; else gate and up are one matrix, or there is no gate."""


def near(program: Program, blocks: tuple[Tensor, ...], **expected: Any) -> None:
    names = [spec.name for spec in program.fetched]
    fused = fuse(program, dict(zip(names, expected.get("given", blocks), strict=True)))
    tokens = tokens_of(3, 9)
    each = tuple(block.expand(3, -1, -1, -1) for block in blocks)
    before, plain = run(program, tokens, each), run(program, tokens)
    after = run(fused.program, tokens)
    assert not fused.program.fetched and not well_formed(fused.program)
    graph = fused.program.module.graph
    assert not graph.find_nodes(op="call_function", target=torch.ops.memc.bank_ffn.default)
    scale = float(before.abs().max())
    assert float((before - plain).abs().max()) > 1e-3 * scale  # the blocks do something
    torch.testing.assert_close(after, before, rtol=0, atol=expected["atol"] * scale)
    layers = tuple(int(name.rpartition("_")[2]) for name in names)
    assert (fused.wider, fused.beside) == ((layers, ()) if expected["wider"] else ((), layers))


SLOW = [name if name == "minimal_gpt" else pytest.param(name, marks=pytest.mark.conformance) for name in WIDER]


@pytest.mark.parametrize("name", SLOW)
def test_fused_is_near_fetched(name: str) -> None:
    program = bank(raised(name)[0].program)
    near(program, blocks_of(program, 1), wider=WIDER[name], atol=2e-6)


def test_gated_networks_get_wider() -> None:
    program = bank(tiny())
    near(program, blocks_of(program, 1), wider=True, atol=2e-6)
    assert program.fetched  # what it was made from is as it was


def test_a_wrong_block_is_told() -> None:
    program = bank(tiny())
    (first, *others) = blocks_of(program, 1)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        near(program, (first, *others), wider=True, atol=2e-6, given=(first.flip(1), *others))

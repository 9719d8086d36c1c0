"""The pass ``memory_bank``: bit-equal with nothing fetched, each sequence its own block, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.analysis.layers import rank_blocks
from memc.blocks import FeedForwardBlock
from memc.dialect import arguments
from memc.errors import MemcError
from memc.frontend import huggingface
from memc.frontend.huggingface import model_info, trace_model
from memc.infer import infer
from memc.passes.linearize import Linearize
from memc.passes.memory_bank import MemoryBank, site
from memc.pipeline import parse_spec
from memc.plugins import load_kernels
from memc.program import Program, set_tensor
from memc.progress import Silent
from memc.raising import find_blocks, raise_program
from memc.raising.feed_forward import ACTIVATIONS
from memc.relation import Exact
from memc.target import get_target
from memc.verify import split_invariance, well_formed
from tests import families
from tests.core.test_families import DECODERS, EXPECTED, raised
from tests.families import HIDDEN
from tests.passes.tiny_program import TARGET, tiny, tokens_of
from tests.train.tiny_training import packed, transfer

load_kernels()

FAMILIES = ("llama", "gemma2", "gpt2", "opt", "minimal_gpt", "torch_mha")
"""Gated; with a norm behind the block; plain; on flattened tokens; two that are quick to capture."""

EVERY = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.conformance) for name in DECODERS]
DENSE = [given for name, given in zip(DECODERS, EVERY, strict=True) if not EXPECTED[name].moe]


OTHERS = ("window:window=4,sinks=2", "linearize:window=4,feature_size=12", "prune:round=4,protect=none")


def bank(program: Program, **options: Any) -> Program:
    pass_ = MemoryBank(**{"ranks": "4:2", **options})
    return pass_.apply(program, pass_.plan(program, TARGET))[0]


def blocks_of(program: Program, batch: int, seed: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(0.3 * torch.randn(batch, *spec.shape[1:], generator=generator) for spec in program.fetched)


def run(program: Program, tokens: Tensor, fetched: tuple[Tensor, ...] | None = None) -> Tensor:
    batch = len(tokens)
    given = program.nothing_fetched(batch) if fetched is None else fetched
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return program(tokens, positions, *given, *program.new_state(batch))[0]


def recast(program: Program, dtype: torch.dtype) -> Program:
    """The same program in another type: parameters, states and outputs; what it computes in float32 by itself stays."""
    result = program.copy()
    for name, value in program.module.named_parameters(remove_duplicate=False):
        set_tensor(result.module, name, value.detach().to(dtype))

    def narrow(spec: Any) -> Any:
        return replace(spec, dtype=dtype) if spec.dtype == torch.float32 else spec

    result.states, result.outputs = tuple(map(narrow, result.states)), tuple(map(narrow, result.outputs))
    infer(result)
    return result


def check_equal(program: Program) -> None:
    banked = bank(program)
    assert len(banked.fetched) == 2 and not well_formed(banked)
    for batch, length in ((1, 1), (3, 7)):
        tokens = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))
        before = run(program, tokens)
        assert torch.equal(run(banked, tokens), before)
        gates = tuple(block * torch.tensor([1.0, 1.0, 0.0])[:, None, None] for block in blocks_of(banked, batch))
        assert torch.equal(run(banked, tokens, gates), before)
        assert not torch.equal(run(banked, tokens, blocks_of(banked, batch)), before)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_fetched_leaves_every_bit(name: str) -> None:
    program = raised(name)[0].program
    if EXPECTED[name].moe:
        plan = MemoryBank().plan(program, TARGET)
        assert not plan.sites
        assert [r.code for r in plan.rejections] == ["moe", "moe"]
        return
    check_equal(program)
    narrow = recast(program, torch.bfloat16)
    assert run(narrow, tokens_of(1, 3)).dtype == torch.bfloat16
    check_equal(narrow)


def test_a_block_may_take_tokens_by_sequence_and_give_them_in_one_row() -> None:
    config = families.FAMILIES["opt"]()
    config.do_layer_norm_before = False
    module = huggingface.build(config, "opt", dtype=torch.float32)
    families.randomize(module)
    check_equal(raise_program(trace_model(module, model_info(config, "opt", ""))).program)


@pytest.mark.parametrize("name", DENSE)
def test_what_is_added_is_the_formula(name: str) -> None:
    """A hook on the original module adds the network to what its feed-forward blocks return."""
    program = raised(name)[0].program
    # In float64, which tells a wrong formula from another order of sums on any machine.
    banked, program = recast(bank(program), torch.float64), recast(program, torch.float64)
    tokens, fetched = torch.arange(4, 16).view(2, 6), tuple(block.double() for block in blocks_of(banked, 2))
    blocks = [block for block in find_blocks(program) if isinstance(block, FeedForwardBlock)]
    expected = Added(program, dict(zip([b.output for b in blocks], zip(blocks, fetched, strict=True), strict=True)))
    positions = torch.arange(6).expand(2, 6)
    with torch.no_grad():
        wanted = expected.run(tokens, positions, *program.new_state(2))[0]
    torch.testing.assert_close(run(banked, tokens, fetched), wanted, rtol=0, atol=1e-5)


class Added(torch.fx.Interpreter):
    """Runs a program and adds each block's network, written out, to its output."""

    def __init__(self, program: Program, blocks: dict[torch.fx.Node, tuple[FeedForwardBlock, Tensor]]) -> None:
        super().__init__(program.module, garbage_collect_values=False)
        self.blocks = blocks

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n not in self.blocks:
            return result
        block, fetched = self.blocks[n]
        activation = ACTIVATIONS[block.activation if block.gate is not None else "silu"]
        x = self.env[block.input].view(2, -1, block.width)
        made = []
        for row, (gate, up, down) in zip(x, fetched, strict=True):
            made.append((activation(row @ gate.T) * (row @ up.T)) @ down)
        return result + torch.stack(made).view(result.shape)


@pytest.mark.parametrize("before", OTHERS)
def test_it_follows_the_other_passes(before: str) -> None:
    first = parse_spec(before)
    changed = first.apply(tiny(), first.plan(tiny(), TARGET))[0]
    banked = bank(changed)
    tokens = tokens_of(2, 11)
    assert len(banked.fetched) == 2 and not well_formed(banked)
    assert torch.equal(run(banked, tokens), run(changed, tokens))
    assert split_invariance(banked, tokens).passed


def test_another_pass_may_follow_it() -> None:
    second = parse_spec(OTHERS[0])
    banked = bank(tiny())
    result, report = second.apply(banked, second.plan(banked, TARGET))
    plain = second.apply(tiny(), second.plan(tiny(), TARGET))[0]
    tokens = tokens_of(2, 11)
    assert report.sites and not well_formed(result)
    torch.testing.assert_close(run(result, tokens), run(plain, tokens), rtol=0, atol=1e-5)
    assert not torch.equal(run(result, tokens, blocks_of(result, 2)), run(result, tokens))


def test_pruning_does_not_follow_it() -> None:
    for unit in ("ffn", "layers"):
        plan = parse_spec(f"prune:unit={unit},protect=none,round=4").plan(bank(tiny()), TARGET)
        assert not plan.sites
        assert {rejection.code for rejection in plan.rejections} == {"fetched"}


def test_sequences_have_blocks_of_their_own() -> None:
    program = bank(tiny())
    tokens, fetched = tokens_of(3, 9), blocks_of(program, 3)
    together = run(program, tokens, fetched)
    for row in range(3):
        alone = run(program, tokens[row : row + 1], tuple(block[row : row + 1] for block in fetched))
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
    swapped = run(program, tokens, tuple(block.flip(0) for block in fetched))
    assert not torch.allclose(swapped[0], together[0], atol=1e-3), "another block must show"


def test_pieces_and_padding_give_the_same_with_blocks_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    program = bank(tiny())
    assert split_invariance(program, tokens_of(3, 8)).passed
    shifted = {"bank_ffn": lambda x, block, activation: x * torch.arange(x.shape[1])[:, None] * block.sum()}
    for node in program.module.graph.find_nodes(op="call_function", target=torch.ops.memc.bank_ffn.default):
        node.target = shifted["bank_ffn"]
    program.module.recompile()
    assert not split_invariance(program, tokens_of(3, 8)).passed, "a block that depends on the split must show"


def test_the_plan_is_what_is_done() -> None:
    program, pass_ = tiny(), MemoryBank(ranks="4:0:2", layers="[1]")
    plan = pass_.plan(program, TARGET)
    assert [s.layer for s in plan.sites] == [1] and [(r.layer, r.code) for r in plan.rejections] == [(0, "kept")]
    assert plan.relations == (Exact(),) and plan == pass_.plan(program, TARGET)
    result, report = pass_.apply(program, plan)
    (spec,) = result.fetched
    assert (spec.name, spec.shape, spec.dtype) == ("bank_1", ("B", 3, 6, 24), torch.float32)
    size = 3 * 6 * 24 * 4
    assert result.fetched_bytes == size and program.fetched_bytes == 0
    facts = {"input": "bank_1", "units": 6, "activation": "silu", "activation_of": "the block's gate"}
    facts["fetched_bytes"] = size
    assert report.details == {"1": facts, "total": {"levels": [4, 0, 2], "fetched_bytes": size}}
    assert report.new_parameters == 0 and not report.untrained
    assert result.parameter_count == program.parameter_count and len(program.inputs) == 2


def test_a_plain_block_gets_silu_and_a_gated_one_its_own() -> None:
    for name, wanted, said in (("gpt2", "silu", "the bank, since"), ("gemma2", "gelu_tanh", "the block's gate")):
        source, pass_ = raised(name)[0].program, MemoryBank(ranks="4:2")
        program, report = pass_.apply(source, pass_.plan(source, TARGET))
        assert report.details["0"]["activation_of"].startswith(said)
        ops = [n for n in program.module.graph.nodes if n.target is torch.ops.memc.bank_ffn.default]
        assert [arguments(n)["activation"] for n in ops] == [wanted, wanted]
        assert all(arguments(n)["block"].meta["val"].shape[1:] == (3, 6, HIDDEN) for n in ops)


def codes(program: Program, **options: Any) -> list[str]:
    plan = MemoryBank(**options).plan(program, TARGET)
    assert all(rejection.reason for rejection in plan.rejections)
    return [rejection.code for rejection in plan.rejections]


def test_what_it_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny()
    assert codes(bank(program)) == ["banked", "banked"]
    assert codes(replace(program, model=replace(program.model, decoder=False))) == ["encoder", "encoder"]
    blocks = [block for block in find_blocks(program) if isinstance(block, FeedForwardBlock)]

    def found(*changed: FeedForwardBlock) -> None:
        monkeypatch.setattr(site, "find_blocks", lambda _: changed)

    found(replace(blocks[0], layer=1), blocks[1])
    assert codes(program) == ["several", "several"]
    found(replace(blocks[0], kind="moe"), blocks[1])
    assert codes(program) == ["moe"]
    found(replace(blocks[0], width=7), blocks[1])
    assert codes(program) == ["shape"]
    found(replace(blocks[0], input=blocks[0].up), blocks[1])
    assert codes(program) == ["shape"]


@pytest.mark.parametrize(
    "spec",
    [
        "ranks=",
        "ranks=0:0",
        "ranks=4;2",
        "ranks=-1",
        "ranks=99999999999999999999:0",
        "layers=[]",
        "layers=some",
        "kind=table",
        "rank=4",
    ],
)
def test_options_that_are_refused(spec: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_spec(f"memory_bank:{spec}")
    assert caught.value.code == "E203"


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(MemcError, match="layer 7") as caught:
        MemoryBank(layers="[0,7]").plan(tiny(), get_target("cpu"))
    assert caught.value.code == "E203" and "0 to 1" in caught.value.next


def test_the_spec_string_round_trips() -> None:
    for spec in ("memory_bank", "memory_bank:ranks=16,layers=[0,1]", "memory_bank:ranks=8:4:2"):
        assert parse_spec(spec).spec == spec


def test_a_pass_that_follows_it_can_be_trained() -> None:
    """Nothing is fetched for the original or the rewritten model then, and all is as without a bank."""
    rewriting, rankings = Linearize(window=4, sinks=2, feature_size=8), []
    for before in (tiny(), bank(tiny())):
        after, report = rewriting.apply(before, rewriting.plan(before, TARGET))
        transfer(before, after, report, 1)
        rankings.append(rank_blocks(before, after, report.objectives, *packed(2, 1), None, Silent()).alone)
    assert rankings[0] == pytest.approx(rankings[1], rel=1e-4)

"""Memories that are part of the program: bit-equal when they come, the formulas, any split, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter

from memc.blocks import FeedForwardBlock
from memc.cost import demands
from memc.dialect import arguments
from memc.errors import MemcError
from memc.passes.memory_bank import MemoryBank
from memc.passes.memory_bank.beside import ROOT, columns
from memc.passes.memory_bank.engram import Engram, recent_tokens
from memc.passes.memory_bank.head import Head
from memc.passes.memory_bank.product_keys import HALF, ProductKeys
from memc.passes.memory_bank.side import routed
from memc.pipeline import PassReport, parse_spec
from memc.plugins import load_kernels
from memc.program import Program, get_tensor, set_tensor
from memc.raising import find_blocks
from memc.raising.feed_forward import linear_input
from memc.relation import Bounded, Exact
from memc.verify import split_invariance, well_formed
from tests.core.test_families import EXPECTED, raised
from tests.passes.test_memory_bank import EVERY, recast, run
from tests.passes.tiny_program import TARGET, tiny, tokens_of

load_kernels()

KINDS: dict[str, dict[str, Any]] = {
    "pkm": {"kind": "pkm", "slots": 16, "heads": 2, "top": 3, "row": 5},
    "engram": {"kind": "engram", "slots": 30, "heads": 2, "ngram": 3, "row": 4},
    "side": {"kind": "side"},
    "head": {"kind": "head", "depth": 2},
}
ONE = ("side", "head")
LEARNING = [kind for kind in KINDS if kind != "side"]


def inserted(program: Program, kind: str, **options: Any) -> tuple[Program, PassReport]:
    pass_ = MemoryBank(**{**KINDS[kind], "layers": "[1]" if kind in ONE else "all", **options})
    return pass_.apply(program, pass_.plan(program, TARGET))


def taught(program: Program, seed: int = 3) -> Program:
    """The program with drawn values for what is zero when a memory comes."""
    random, result = torch.Generator().manual_seed(seed), program.copy()
    for name, value in program.module.named_parameters():
        if name.startswith(ROOT) and not name.endswith("threshold") and not value.any():
            set_tensor(result.module, name, 0.3 * torch.randn(value.shape, generator=random))
    return result


def check_equal(program: Program, kind: str) -> None:
    memory, report = inserted(program, kind)
    assert bool(report.learns) == (kind in LEARNING) and not well_formed(memory)
    loud = taught(memory)
    for batch, length in ((1, 1), (3, 7)):
        tokens = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))
        before = run(program, tokens)
        assert torch.equal(run(memory, tokens), before)
        assert not torch.equal(run(loud, tokens), before), "a memory that was taught must show"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EVERY)
def test_every_bit_stays_when_a_memory_comes(name: str, kind: str) -> None:
    program = raised(name)[0].program
    if EXPECTED[name].moe:
        assert {rejection.code for rejection in MemoryBank(**KINDS[kind]).plan(program, TARGET).rejections} == {"moe"}
        return
    check_equal(program, kind)
    check_equal(recast(program, torch.bfloat16), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_padding_and_rows_alone_give_the_same(kind: str) -> None:
    program = taught(inserted(tiny(), kind)[0])
    assert split_invariance(program, tokens_of(3, 8)).passed


def test_a_memory_that_forgets_the_last_tokens_shows() -> None:
    program = taught(inserted(tiny(), "engram")[0])
    *others, output = program.module.graph.output_node().args[0]
    name = program.states[-1].name
    (past,) = [node for node in program.placeholders() if node.target == name]
    assert output is not past
    program.module.graph.output_node().args = ((*others, past),)
    program.module.recompile()
    assert not split_invariance(program, tokens_of(3, 8)).passed


def test_the_last_tokens_are_those_of_each_sequence() -> None:
    """Rows with padding anywhere, and with a second sequence that begins in the middle, in one call and in two."""
    tokens = torch.tensor([[5, 6, 7, 8, 9, 4], [0, 5, 0, 6, 7, 0], [5, 6, 7, 5, 6, 7]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, 0, -1, 1, 2, -1], [0, 1, 2, 0, 1, 2]])
    wanted = [
        [(5, -1, -1), (6, 5, -1), (7, 6, 5), (8, 7, 6), (9, 8, 7), (4, 9, 8)],
        [None, (5, -1, -1), None, (6, 5, -1), (7, 6, 5), None],
        [(5, -1, -1), (6, 5, -1), (7, 6, 5), (5, -1, -1), (6, 5, -1), (7, 6, 5)],
    ]
    assert columns(positions).tolist() == [[1, 2, 3, 4, 5, 6], [0, 1, 0, 2, 3, 0], [1, 2, 3, 4, 5, 6]]
    for cut in (1, 2, 4, 6):
        past, found = torch.full((3, 2), -1), []
        for part, at in zip(tokens.tensor_split([cut], 1), positions.tensor_split([cut], 1), strict=True):
            if part.shape[1]:
                recent, past = recent_tokens(part, at, past)
                found.append(recent)
        rows = torch.cat(found, 1).tolist()
        for row, expected in zip(rows, wanted, strict=True):
            assert all(want is None or tuple(got) == want for got, want in zip(row, expected, strict=True))
        assert past.tolist() == [[9, 4], [6, 7], [6, 7]]


def test_rows_of_an_ngram_are_hashed_as_written() -> None:
    engram = Engram(slots=30, heads=2, ngram=3, row=4)
    assert engram.moduli(0) == [31, 37, 41, 43] and engram.moduli(1) == [47, 53, 59, 61]
    first, second, third = engram.multipliers(1)
    assert first % 2 == second % 2 == third % 2 == 1 and engram.multipliers(0) != engram.multipliers(1)
    recent = (11, 50_000, -1)
    two = (12 * first) ^ (50_001 * second)
    three = two ^ 0
    wanted = [two % 47, 47 + two % 53, 47 + 53 + three % 59, 47 + 53 + 59 + three % 61]
    assert engram.rows(torch.tensor([[recent]]), 1).tolist() == [[wanted]]
    assert int(engram.rows(torch.full((1, 1, 3), 2**31 - 2), 0).min()) >= 0, "the largest number there is stays whole"


def test_a_sequence_is_routed_from_the_token_on_that_is_about_an_edit() -> None:
    """Rows with padding anywhere, two sequences in a row, and a sequence that goes on, cut at any place."""
    positions = torch.tensor([[0, 1, 2, 3, 4, 5], [-1, 0, -1, 1, 2, -1], [0, 1, 2, 0, 1, 2], [4, 5, 0, 1, -1, 2]])
    over = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]).bool()
    over &= positions >= 0  # of padding nothing is asked
    wanted = [[0, 0, 1, 1, 1, 1], [None, 0, None, 1, 1, None], [0, 1, 1, 0, 0, 1], [1, 1, 0, 1, None, 1]]
    for cut in range(7):
        past, found = torch.tensor([[0], [0], [0], [1]]), []
        for part, at in zip(over.tensor_split([cut], 1), positions.tensor_split([cut], 1), strict=True):
            if part.shape[1]:
                made, past = routed(part, at, past)
                found.append(made)
        for row, expected in zip(torch.cat(found, 1).tolist(), wanted, strict=True):
            assert all(want is None or got == bool(want) for got, want in zip(row, expected, strict=True)), cut
        assert past.tolist() == [[1], [1], [1], [1]]


def test_what_is_not_routed_is_the_original_bit_for_bit() -> None:
    """Of a batch the sequences whose activation difference reaches the threshold are changed, from there on."""
    memory, _ = inserted(tiny(), "side")
    loud, tokens = taught(memory), tokens_of(4, 9)
    plain, positions = tiny(), torch.arange(9).expand(4, 9)
    (block,) = [b for b in find_blocks(plain) if isinstance(b, FeedForwardBlock) and b.layer == 1]
    values = Interpreter(plain.module, garbage_collect_values=False)
    with torch.no_grad():
        values.run(tokens, positions, *plain.new_state(4))
        size = (values.env[linear_input(block.down)] @ get_tensor(loud.module, f"{ROOT}.1.change").T).norm(dim=-1)
    order = size.amax(1).sort().values
    set_tensor(loud.module, f"{ROOT}.1.threshold", (order[1] + order[2]).view(1) / 2)
    over = (size > get_tensor(loud.module, f"{ROOT}.1.threshold")).cummax(1).values
    assert over.any(1).sum() == 2 and not over[:, 0].all()
    before, after = run(plain, tokens), run(loud, tokens)
    same = (before == after).all(-1)
    assert torch.equal(same, ~over)


@pytest.mark.parametrize("width", [6, 11])
def test_product_keys_read_the_best_of_all_rows(width: int) -> None:
    """All n^2 scores in float64, and the softmax of the best of them."""
    memory = ProductKeys(slots=25, heads=3, top=4, row=7)
    random = torch.Generator().manual_seed(width)
    t = {name: torch.randn(new.shape, generator=random) for name, new in memory.parameters(width).items()}
    t |= {"values": torch.randn(25, 7, generator=random), "x": torch.randn(2, 5, width, generator=random)}
    d = {name: value.double() for name, value in t.items()}
    x = d["x"] / d["x"].square().mean(-1, keepdim=True).add(1e-6).sqrt()
    query = (x @ d["query"].T + d["query_bias"]).view(2, 5, 2, 3, HALF)
    first, second = torch.einsum("btshd,shdn->btshn", query, d["keys"].view(2, 3, HALF, 5)).unbind(2)
    scores = (first[..., :, None] + second[..., None, :]).flatten(-2)
    least = scores.topk(4, -1).values[..., -1:]
    weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
    read = torch.einsum("bthn,nr->btr", weights, d["values"])
    gate = x @ d["gate"].T
    wanted = (read * gate * torch.sigmoid(gate)) @ d["down"].T
    torch.testing.assert_close(memory.read(t).double(), wanted, rtol=1e-4, atol=1e-4)


def test_an_engram_is_the_formula() -> None:
    engram, random = Engram(slots=30, heads=2, ngram=3, row=4), torch.Generator().manual_seed(0)
    t = {name: torch.randn(new.shape, generator=random) for name, new in engram.parameters(9, 0).items()}
    t["x"] = torch.randn(2, 5, 9, generator=random)
    t["recent"] = torch.randint(-1, 90, (2, 5, 3), generator=random)
    d = {name: value.double() for name, value in t.items()}

    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    for b in range(2):
        for i in range(5):
            e = torch.cat([d["table"][row] for row in engram.rows(t["recent"], 0)[b, i]])
            s = float(norm(d["key"] @ e) @ norm(d["x"][b, i])) / 3
            gate = torch.sigmoid(torch.tensor(s).sign() * torch.tensor(abs(s)).sqrt()).double()
            wanted = gate * (d["value"] @ e)
            torch.testing.assert_close(engram.read(t, 0)[b, i].double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_mixes_two_distributions() -> None:
    """The softmax of what comes out is (1 - mix) of the model's and mix of the memory's, in float64."""
    head, random = Head(depth=2, mix=0.3), torch.Generator().manual_seed(0)
    t = {name: torch.randn(new.shape, generator=random) * 0.2 for name, new in head.parameters(9, 13).items()}
    t |= {"x": torch.randn(2, 5, 9, generator=random), "logits": 3 * torch.randn(2, 5, 13, generator=random)}
    d = {name: value.double() for name, value in t.items()}

    def norm(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()

    x = norm(d["x"])
    for index in range(2):
        gate, up = (norm(x) @ d[f"{name}{index}"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ d[f"down{index}"].T
    memory = (d["logits"] + norm(x) @ d["vocabulary"].T).softmax(-1)
    wanted = 0.7 * d["logits"].softmax(-1) + 0.3 * memory
    (found,) = head.read(t)
    torch.testing.assert_close(found.double().softmax(-1), wanted, rtol=1e-4, atol=1e-6)
    t["vocabulary"] = t["vocabulary"] * 1e4
    assert torch.isfinite(head.read(t)[0]).all(), "a memory that is sure must not overflow"


def test_the_report_says_what_came_and_what_holds() -> None:
    program, report = inserted(tiny(), "pkm")
    fresh = dict(program.module.named_parameters())
    assert report.new_parameters == sum(fresh[name].numel() for name in report.learns)
    assert report.new_parameters == program.parameter_count - tiny().parameter_count
    assert report.untrained and report.trains and report.relations == (Exact(),)
    assert all(program.provenance[name].transform == "memory_bank" for name in report.learns)
    assert [name for name in report.learns if name.endswith(".values")] == ["memc.memory_bank.values"]
    facts = report.details["1"]
    assert facts["rows_read_per_token"] == 6 and facts["row_bytes_per_token"] == 6 * 5 * 4
    plan = MemoryBank(**KINDS["pkm"]).plan(tiny(), TARGET)
    assert MemoryBank(**KINDS["pkm"]).trained_relations(plan)[1:] == (
        Bounded("perplexity_ratio", None),
        Bounded("kl_mean", None),
    )


@pytest.mark.parametrize("kind", ["pkm", "engram"])
def test_a_larger_table_costs_a_token_no_more_bytes(kind: str) -> None:
    read = {}
    for slots in (16, 64 * 64):
        program, _ = inserted(tiny(), kind, slots=slots, layers="[1]")
        read[slots] = demands(program, [8])[8].weight_bytes
    # Half-keys are compared, all of them: they grow as the root of the rows.
    more = (64 - 4) * 2 * 2 * HALF * 4 if kind == "pkm" else 0
    assert read[64 * 64] - read[16] == pytest.approx(more, abs=1)
    plain = demands(tiny(), [8])[8].weight_bytes
    rows = {"pkm": 2 * 3 * 5 * 4, "engram": 4 * 4 * 4}[kind]
    stays = sum(
        get_tensor(program.module, name).numel() * 4
        for name in inserted(tiny(), kind, slots=64 * 64, layers="[1]")[1].learns
        if not name.endswith(("values", "table"))
    )
    assert read[64 * 64] - plain == pytest.approx(stays + rows, abs=1)


def freed(count: int, **sizes: Any) -> Program:
    """The decoder as one that had ``count`` parameters more."""
    program = tiny(**sizes)
    return replace(program, model=replace(program.model, parameters=program.parameter_count + count))


@settings(deadline=None)
@given(st.sampled_from(["pkm", "engram"]), st.integers(20_000, 10**8), st.integers(1, 3))
def test_a_memory_is_as_large_as_what_was_freed(kind: str, count: int, layers: int) -> None:
    widths = [24] * layers
    sized = MemoryBank(**{**KINDS[kind], "slots": MemoryBank.slots, "freed": True})._sized(freed(count), widths)
    more = (isqrt(sized.slots) + 1) ** 2 if kind == "pkm" else sized.slots + 1
    assert sized._table().count(widths) <= count < replace(sized, slots=more)._table().count(widths)


@pytest.mark.parametrize("kind", ["pkm", "engram"])
def test_the_report_says_what_was_freed_and_spent(kind: str) -> None:
    program = freed(20_000)
    result, report = inserted(program, kind, slots=MemoryBank.slots, freed=True)
    spent = result.parameter_count - program.parameter_count
    assert report.details["total"]["freed_parameters"] == 20_000 >= spent > 19_000
    assert report.details["total"]["spent_parameters"] == spent == report.new_parameters


def test_too_little_for_a_memory_is_refused() -> None:
    pass_ = MemoryBank(kind="engram", freed=True, layers="all")
    for program, said in ((tiny(), "freed 0"), (freed(100), "freed 100"), (freed(-5), "freed 0")):
        with pytest.raises(MemcError, match=rf"E203 earlier passes {said} parameters, and the smallest .* has [0-9]+"):
            pass_.apply(program, pass_.plan(program, TARGET))


def test_a_raised_program_knows_how_many_parameters_it_had() -> None:
    program = raised("llama")[0].program
    assert program.model.parameters == program.parameter_count


def test_layers_that_are_usual_for_a_kind() -> None:
    pass_ = MemoryBank(kind="engram")
    able = list(range(30))
    assert pass_._named(able, able) == {1, 15}
    assert MemoryBank(kind="pkm")._named(able, able) == {5, 15, 25}
    assert MemoryBank(kind="pkm")._named(able, []) == set()
    assert MemoryBank()._named(able, able) == set(able)
    plan = MemoryBank(**KINDS["engram"]).plan(tiny(), TARGET)
    assert [site.layer for site in plan.sites] == [1] and [r.code for r in plan.rejections] == ["kept"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_memory_a_model(kind: str) -> None:
    for other in ({"ranks": "4"}, *KINDS.values()):
        first = MemoryBank(**{**other, "layers": "[0]"})
        program = first.apply(tiny(), first.plan(tiny(), TARGET))[0]
        plan = MemoryBank(**{**KINDS[kind], "layers": "[1]"}).plan(program, TARGET)
        # What a memory adds may have blocks of its own, which are refused as those of the model are.
        assert {rejection.code for rejection in plan.rejections} == {"banked"}
        assert {0, 1} <= {item.layer for item in (*plan.rejections, *plan.sites)}
        assert [site.layer for site in plan.sites] == ([1] if "ranks" in other else [])


@pytest.mark.parametrize(
    "spec",
    [
        "kind=pkm,slots=17,top=3",
        "kind=pkm,slots=16,top=5",
        "kind=pkm,ngram=2",
        "kind=pkm,ranks=4",
        "kind=engram,top=4",
        "kind=engram,ngram=1",
        "slots=64",
        "kind=side,slots=64",
        "kind=side,layers=all",
        "kind=side,layers=[0,1]",
        "kind=head,layers=all",
        "kind=head,mix=1.0",
        "kind=other",
        "kind=side,freed=true",
        "freed=true",
        "kind=pkm,freed=true,slots=64",
    ],
)
def test_options_that_do_not_go_together(spec: str) -> None:
    with pytest.raises(MemcError) as caught:
        parse_spec(f"memory_bank:{spec}")
    assert caught.value.code == "E203" and "\n" not in str(caught.value)


def test_the_activation_of_a_bank_is_still_its_own() -> None:
    pass_ = MemoryBank(ranks="4")
    program = pass_.apply(tiny(), pass_.plan(tiny(), TARGET))[0]
    ops = [node for node in program.module.graph.nodes if node.target is torch.ops.memc.bank_ffn.default]
    assert [arguments(node)["activation"] for node in ops] == ["silu", "silu"]

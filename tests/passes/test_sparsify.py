"""The sparsify pass: identity, an attention with the oracle's choices, state law, states, cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.cost import predict
from memc.dialect.quantised_attention import BITS
from memc.dialect.sparse_attention import METHODS
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.relation import Bounded, Close
from memc.verify import well_formed
from tests.kernels.oracles import Token, sparse_attention, sparse_choice
from tests.passes.tiny_program import TARGET, Attention, naive_run, run_pieces, scores, tiny, tokens_of

CHOICES: list[dict[str, Any]] = [
    {"method": "bounds"},
    {"method": "moments", "rerank": 2, "dense_below": 17},
    {"method": "lowbit", "rerank": 2, "channels": 2},
    {"method": "bounds", "refresh": 3},
    {"method": "hip", "refresh": 2},
    {"method": "bounds", "levels": 2, "beam": 1, "page": 1},
    {"method": "bounds", "mass": 0.8},
]
SMALL: dict[str, Any] = {"budget": 12, "page": 3, "sinks": 1, "window": 4, "rerank": 1, "dense_below": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sink_logits": {"sink_logits": (0.5, -1.0, 2.0, 0.0)},
}


def rewrite(program: Program, **options: Any) -> Program:
    sparsify = Sparsify(**options)
    return sparsify.apply(program, sparsify.plan(program, TARGET))[0]


def chosen_softmax(**options: Any) -> Attention:
    """Attention under an explicit mask of what the oracle chooses."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        s = scores(a)
        per_group = block.num_heads // block.num_kv_heads
        seen = torch.zeros(s.shape, dtype=torch.bool)
        for row in range(s.shape[0]):
            own = [Token(t, a["key"][row, :, t], a["value"][row, :, t]) for t in range(s.shape[2])]
            listed: list[list[int]] = [[] for _ in range(block.num_kv_heads)]
            for t in range(s.shape[2]):
                for group in range(block.num_kv_heads):
                    heads = slice(group * per_group, (group + 1) * per_group)
                    query, o = a["query"][row, heads, t].detach(), {"scale": a["scale"], **options}
                    o["method"] = "bounds2" if o.pop("levels", 1) == 2 else o["method"]
                    kept = listed[group] if "refresh" in options else None
                    seen[row, heads, t, sparse_choice(query, own, t, group, o, kept)] = True
        weight = s.masked_fill(~seen, -torch.inf).exp()
        total = weight.sum(-1, keepdim=True)
        if a["sink_logits"] is not None:
            total = total + a["sink_logits"].exp()[:, None, None]
        out: Tensor = (weight / total) @ a["value"].repeat_interleave(per_group, 1)
        return out

    return attention


def oracle_softmax(**options: Any) -> Attention:
    """Attention as the oracle of few bits computes it."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        qkv = [a[name].detach() for name in ("query", "key", "value")]
        positions = torch.arange(qkv[0].shape[2]).expand(qkv[0].shape[0], -1)
        score = {name: a[name] for name in ("scale", "softcap", "sink_logits")}
        return sparse_attention(*qkv, positions, **score, **options).out

    return attention


@settings(max_examples=6, deadline=None)
@given(pages=st.integers(3, 6), dense_below=st.sampled_from([0, 20]), rerank=st.integers(1, 3), batch=st.integers(1, 3))
def test_short_prompts_give_the_original_logits(pages: int, dense_below: int, rerank: int, batch: int) -> None:
    program = tiny(layers=1)
    options = {**SMALL, "budget": 4 * pages, "page": 4, "dense_below": dense_below, "rerank": rerank}
    sparsify = Sparsify(**options)
    tokens = tokens_of(batch, sparsify.exact_to, seed=pages)
    assert sparsify.exact_to == max(4 * pages, dense_below)
    result = rewrite(program, **options)
    torch.testing.assert_close(result.run(tokens), program.run(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("choice", CHOICES)
def test_long_prompts_equal_a_softmax_over_what_the_oracle_chooses(variant: str, choice: dict[str, Any]) -> None:
    program = tiny(**VARIANTS[variant])
    tokens, options = tokens_of(2, 54 if "levels" in choice else 30), {**SMALL, **choice}
    result = rewrite(program, **options).run(tokens)
    torch.testing.assert_close(result, naive_run(program, chosen_softmax(**options), tokens), atol=1e-5, rtol=0)
    other = {**options, "budget": 15}
    assert (result - naive_run(program, chosen_softmax(**other), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(("variant", "bits"), [("plain", 8), ("softcap", 4), ("sink_logits", 4)])
def test_few_bits_equal_a_softmax_over_what_the_oracle_rounds_and_chooses(variant: str, bits: int) -> None:
    program, tokens = tiny(**VARIANTS[variant]), tokens_of(2, 30)
    options = {**SMALL, "method": "bounds", "bits": bits, "rerank": 2}
    result = rewrite(program, **options).run(tokens)
    torch.testing.assert_close(result, naive_run(program, oracle_softmax(**options), tokens), atol=2e-5, rtol=0)
    options.pop("bits")
    assert (result - naive_run(program, oracle_softmax(**options), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_landmarks_equal_a_softmax_by_groups(variant: str) -> None:
    program, tokens = tiny(**VARIANTS[variant]), tokens_of(2, 30)
    options = {**SMALL, "method": "landmark", "mass": 0.9}
    result = rewrite(program, **options).run(tokens)
    torch.testing.assert_close(result, naive_run(program, oracle_softmax(**options), tokens), atol=1e-5, rtol=0)
    options["method"] = "hcam"
    assert (result - naive_run(program, oracle_softmax(**options), tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(("options", "exact"), [({}, 9), ({"dense_below": 20}, 20), ({"sinks": 0, "window": 1}, 3)])
def test_landmarks_are_exact_up_to_the_first_page_behind_one(options: dict[str, Any], exact: int) -> None:
    sparsify = Sparsify(**{**SMALL, "method": "landmark", "budget": 60, **options})
    plan = sparsify.plan(program := tiny(layers=1), TARGET)
    assert plan.relations[0] == Close(1e-4, tokens=exact), "whatever the budget"
    result, report = sparsify.apply(program, plan)
    assert report.untrained and report.trains and report.new_parameters == 0 and not sparsify.offers()
    streams = replace(sparsify, retrieve="heads:[]")
    assert not streams.apply(program, streams.plan(program, TARGET))[1].untrained, "no head reads through landmarks"
    tokens = tokens_of(2, 30)
    away = (result.run(tokens) - program.run(tokens)).abs().amax((0, 2))
    assert away[:exact].max() < 1e-5 < 1e-4 < away[exact]


@pytest.mark.parametrize("bits", BITS)
def test_few_bits_are_exact_within_a_page(bits: int) -> None:
    sparsify = Sparsify(method="bounds", bits=bits, budget=60, page=20, window=4)
    assert sparsify.exact_to == 20
    plan = sparsify.plan(program := tiny(), TARGET)
    assert plan.relations[0] == Close(1e-4, tokens=20)
    result, tokens = sparsify.apply(program, plan)[0], tokens_of(2, 21)
    away = (result.run(tokens) - program.run(tokens)).abs().amax((0, 2))
    assert away[:20].max() < 1e-5 < 1e-4 < away[20]


@pytest.mark.parametrize("retrieve", ["all", "heads:[0.1]"])
def test_states_of_few_bits_are_small_and_survive_the_disk(retrieve: str, tmp_path: Path) -> None:
    program = tiny(head_dim=32)
    options = {"page": 64, "budget": 128, "window": 1, "method": "bounds", "retrieve": retrieve}
    result = rewrite(program, **options, bits=4)
    assert well_formed(result) == []
    held = {spec.name: (spec.shape, spec.dtype) for spec in result.states}
    groups = 2 if retrieve == "all" else 1
    assert held["layer0_key"] == (("B", groups, "S/64", 64, 16), torch.uint8)
    assert held["layer0_value"] == (("B", groups, "S", 16), torch.uint8)
    assert held["layer0_key_tail"] == (("B", groups, 64, 32), torch.float32)
    per_token = 16 + 4 + 16 + 8  # codes and ranges of a key, then of a value
    layers = 2 if retrieve == "all" else 1
    assert result.state_bytes(64_000) - result.state_bytes(0) == 64_000 * layers * (groups * per_token + 8)
    gain = program.state_bytes(64_000) / result.state_bytes(64_000)
    assert gain > (5 if retrieve == "all" else 16)
    assert result.state_bytes(64_000) < rewrite(program, **options, bits=8).state_bytes(64_000)
    save_program(result, tmp_path)
    loaded, tokens = load_program(tmp_path), tokens_of(2, 70)
    assert loaded.states == result.states
    assert torch.equal(loaded.run(tokens), result.run(tokens))


@pytest.mark.parametrize(("options", "reason"), [({"bits": 4}, "method=bounds"), ({"bits": 5}, "0 or one of 8, 4")])
def test_bits_that_do_not_fit_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        Sparsify(**options)


@settings(max_examples=6, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 29), max_size=4),
    method=st.sampled_from([*METHODS, "few bits"]).filter(lambda method: method != "bounds2"),
    levels=st.sampled_from([1, 2]),
    refresh=st.integers(1, 4),
)
def test_any_split_equals_one_run(cuts: list[int], method: str, refresh: int, levels: int) -> None:
    chosen_by: dict[str, Any] = {"method": method, "refresh": refresh}
    if method == "bounds":
        chosen_by |= {"levels": levels, "page": 1}
    if method == "few bits":
        chosen_by = {"method": "bounds", "bits": 4}
    result = rewrite(tiny(layers=1), **{**SMALL, **chosen_by})
    tokens = tokens_of(2, 30)
    positions = torch.arange(30).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=2e-5, rtol=0)


def test_a_new_sequence_forgets_the_old_one() -> None:
    result = rewrite(tiny(layers=1), **SMALL)
    first, second = tokens_of(1, 19, 1), tokens_of(1, 21, 2)
    positions = torch.cat([torch.arange(19), torch.arange(21)])[None]
    both = run_pieces(result, torch.cat([first, second], 1), positions, [17, 19, 22])
    torch.testing.assert_close(both[:, 19:], result.run(second), atol=2e-5, rtol=0)


def test_states_grow_with_the_pages_and_survive_the_disk(tmp_path: Path) -> None:
    program = tiny()
    result = rewrite(program, **SMALL, method="bounds", keep="[1]")
    assert well_formed(result) == []
    names = [spec.name for spec in program.states]
    assert [spec.name for spec in result.states] == [*names[:3], "layer0_pages", *names[3:]]
    pages = result.states[3]
    assert (pages.shape, pages.grows, pages.init) == (("B", 2, "S/3", 20), 2, 0)
    assert [pages.bytes(n) for n in (0, 1, 3, 4, 30)] == [n * 2 * 20 * 4 for n in (0, 1, 1, 2, 10)]
    assert result.state_bytes(30) == program.state_bytes(30) + pages.bytes(30)
    held = result(tokens_of(2, 7), torch.arange(7).expand(2, 7), *result.new_state(2))[1:]
    assert [tuple(h.shape) for h in held[:4]] == [(2, 2, 7, 10), (2, 2, 7, 10), (2, 7), (2, 2, 3, 20)]
    save_program(result, tmp_path)
    loaded, tokens = load_program(tmp_path), tokens_of(2, 40)
    assert loaded.states == result.states
    assert torch.equal(loaded.run(tokens), result.run(tokens))


def test_two_levels_are_one_state_of_super_pages() -> None:
    program, sizes = tiny(), {**SMALL, "method": "bounds", "keep": "[1]"}
    flat, result = rewrite(program, **sizes), rewrite(program, **sizes, levels=2)
    assert well_formed(result) == []
    pages = next(spec for spec in result.states if spec.name == "layer0_pages")
    assert (pages.shape, pages.grows, pages.init) == (("B", 2, "S/48", 17, 20), 2, 0)
    assert result.state_bytes(480) == flat.state_bytes(480) + 10 * 2 * 20 * 4, "a sixteenth more"
    tokens = tokens_of(2, 60)
    wide = rewrite(program, **sizes, levels=2, beam=9)
    torch.testing.assert_close(wide.run(tokens), flat.run(tokens), atol=2e-5, rtol=0)
    assert (
        rewrite(program, **{**sizes, "page": 1}, levels=2, beam=1).run(tokens) - flat.run(tokens)
    ).abs().max() > 1e-4


def test_a_shared_choice_is_state_and_survives_the_disk(tmp_path: Path) -> None:
    program, tokens = tiny(), tokens_of(2, 40)
    once = rewrite(program, **SMALL, method="bounds", keep="[1]")
    result = rewrite(program, **SMALL, method="bounds", keep="[1]", refresh=4)
    assert well_formed(result) == []
    choice = next(spec for spec in result.states if spec.name == "layer0_choice")
    assert (choice.shape, choice.dtype, choice.init, choice.grows) == (("B", 2, 4), torch.int64, -1, None)
    assert result.state_bytes(30) == once.state_bytes(30) + 2 * 4 * 8
    save_program(result, tmp_path)
    loaded = load_program(tmp_path)
    assert loaded.states == result.states
    assert torch.equal(loaded.run(tokens), result.run(tokens))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"refresh": 5}, "shares? a choice misses what is newer: the window holds 4.*write sparsify:refresh=4"),
        ({"refresh": 2, "method": "bounds", "bits": 4}, "chosen for each token"),
        ({"refresh": 2, "method": "longheads", "rerank": 0}, "rotates all that it reads"),
        ({"refresh": 0}, "at least 1"),
        ({"mass": 0.0}, "above 0"),
        ({"mass": 1.5}, "between 0 and 1"),
        ({"mass": 0.5, "method": "hip"}, "too few pages"),
        ({"mass": 0.5, "method": "infllm", "rerank": 0}, "count what it reads"),
        ({"mass": 0.5, "method": "bounds", "bits": 4}, "as many are taken as the budget"),
        ({"mass": 0.5, "method": "bounds", "levels": 2}, "choice in two levels scores too few pages"),
        (
            {"levels": 2, "method": "moments"},
            "moments holds of pages bounds nothing.*write sparsify:method=bounds,levels=2",
        ),
        ({"levels": 2, "method": "bounds", "bits": 4}, "ranked in one level"),
        ({"levels": 3, "method": "bounds"}, "between 1 and 2"),
        ({"beam": 2, "method": "bounds"}, "only two levels have a beam"),
        ({"method": "landmark", "rerank": 2}, "whole pages.*leave 'rerank' out"),
        ({"method": "landmark", "page": 1}, "a page of 1 has none"),
        ({"method": "landmark", "bits": 4}, "bits go with method=bounds"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        Sparsify(**{**SMALL, **options})


def test_a_state_of_the_wrong_page_is_not_well_formed() -> None:
    result = rewrite(tiny(layers=1), **SMALL)
    wrong = tuple(replace(s, shape=("B", 2, "S/4", 20)) if s.name == "layer0_pages" else s for s in result.states)
    assert well_formed(result.with_states(wrong))


def test_what_is_promised() -> None:
    plan = Sparsify(budget=64, window=8, dense_below=100).plan(tiny(), TARGET)
    assert plan.relations == (Close(1e-4, tokens=100), Bounded("perplexity_ratio", None))
    assert Sparsify(budget=64, window=8, dense_below=0).plan(tiny(), TARGET).relations[0] == Close(1e-4, tokens=64)


def test_the_sizes_of_lowbit_follow_from_the_heads() -> None:
    def channels(result: Program) -> int:
        nodes = [n for n in result.module.graph.nodes if n.target is torch.ops.memc.sparse_attention.default]
        return int(nodes[0].kwargs["channels"])

    result = rewrite(tiny(), budget=192, window=8, dense_below=0)
    assert result.states[3].shape == ("B", 2, "S/64", 10, 64)
    assert rewrite(tiny(), budget=96, window=8, dense_below=0).states[3].shape == ("B", 2, "S/32", 10, 32)
    assert rewrite(tiny(), budget=64, window=8, dense_below=0).states[3].shape == ("B", 2, "S/16", 10, 16)
    assert channels(result) == 1, "an eighth of 10"
    assert channels(rewrite(tiny(), budget=128, window=8, channels=99, dense_below=0)) == 10, "no more than there are"


@pytest.mark.parametrize(
    ("choice", "keys", "scanned"),
    [
        ({"method": "bounds", "rerank": 1, "refresh": 4}, 64, 2 * 4096 / 16 / 4),
        # One page is still to be taken of the 253 between sinks and window: 8 rounds of 2 keys.
        ({"method": "hip", "rerank": 1}, 64, 16),
        # 16 super-pages, and the pages of the 1 that is entered and of the one that the window reaches into.
        ({"method": "bounds", "rerank": 1, "levels": 2}, 64, 2 * (16 + 32)),
        ({"method": "bounds", "rerank": 4, "levels": 2, "beam": 8}, 256, 2 * (16 + 9 * 16)),
        # At the most: what a share of the attention takes is not known before.
        ({"method": "bounds", "rerank": 1, "mass": 0.5}, 64, 2 * 4096 / 16),
        ({"method": "bounds", "rerank": 1}, 64, 2 * 4096 / 16),
        ({"method": "moments", "rerank": 4}, 256, 2 * 4096 / 16),
        ({"method": "lowbit", "rerank": 2, "channels": 3}, 128, 4096 * 3 / 10),
        ({"method": "lowbit", "rerank": 2, "channels": 3, "refresh": 8}, 128, 4096 * 3 / 10 / 8),
    ],
)
def test_bytes_read_are_those_of_descriptions_keys_and_values(
    choice: dict[str, Any], keys: int, scanned: float
) -> None:
    program = tiny()
    result = rewrite(program, budget=64, page=16, window=8, dense_below=128, **choice)
    contexts = (100, 128, 4096)
    before, after = (predict(p, TARGET, contexts).bytes_read_per_token for p in (program, result))
    weights = before[100] - 2 * 2 * 2 * 10 * 4 * 100
    channels = {100: 2 * 100, 128: 2 * 128, 4096: scanned + keys + 64}
    for context in contexts:
        assert after[context] == pytest.approx(weights + 2 * 2 * 10 * 4 * channels[context])

"""Heads that stream and read the mean of what they dropped: a naive softmax, the state law, gradients, backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memc.blocks import AttentionBlock
from memc.compensation import compensated_window
from memc.errors import MemcError
from memc.passes.sparsify import Sparsify
from memc.program import Program
from memc.relation import Close
from memc.verify import well_formed
from tests.passes.tiny_program import TARGET, Attention, naive_run, run_pieces, scores, tiny, tokens_of

WINDOW, SINKS = 5, 2
SMALL: dict[str, Any] = {"budget": 64, "page": 4, "sinks": SINKS, "window": 4, "stream_window": WINDOW}
ALL: dict[str, Any] = {**SMALL, "retrieve": "heads:[]", "compensation": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sink_logits": {"sink_logits": (0.5, -1.0, 2.0, 0.0)},
    "one_group_each": {"kv_heads": 4},
}


def rewrite(program: Program, **options: Any) -> Program:
    sparsify = Sparsify(**options)
    return sparsify.apply(program, sparsify.plan(program, TARGET))[0]


def compensated_softmax(*, counted: bool = True, streaming: tuple[int, ...] = (0, 1, 2, 3)) -> Attention:
    """Attention token by token; ``streaming`` query heads have the mean of what they dropped as one more."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        per_group = block.num_heads // block.num_kv_heads
        key, value = (a[name].repeat_interleave(per_group, 1) for name in ("key", "value"))
        s, out = scores(a), torch.zeros(*a["query"].shape[:3], value.shape[3], dtype=torch.float64)
        for head in range(block.num_heads):
            for t in range(s.shape[2]):
                dropped = [j for j in range(SINKS, t - WINDOW + 1) if head in streaming]
                read = [j for j in range(t + 1) if j not in dropped]
                logits, values = s[:, head, t, read], value[:, head, read]
                if dropped:
                    mean = key[:, head, dropped].mean(1)
                    one = a["scale"] * (a["query"][:, head, t] * mean).sum(-1, keepdim=True)
                    one = a["softcap"] * torch.tanh(one / a["softcap"]) if a["softcap"] else one
                    many = torch.tensor(float(len(dropped) if counted else 1), dtype=torch.float64)
                    logits = torch.cat([logits, one + many.log()], -1)
                    values = torch.cat([values, value[:, head, dropped].mean(1, keepdim=True)], 1)
                if a["sink_logits"] is not None:
                    logits = torch.cat([logits, a["sink_logits"][head].expand(len(logits), 1)], -1)
                    values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
                out[:, head, t] = (logits.softmax(-1).unsqueeze(-1) * values).sum(1)
        return out

    return attention


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_dropped_is_read_as_its_mean(variant: str) -> None:
    program, tokens = tiny(**VARIANTS[variant]), tokens_of(2, 23)
    result = rewrite(program, **ALL)
    assert well_formed(result) == []
    found = result.run(tokens)
    torch.testing.assert_close(found, naive_run(program, compensated_softmax(), tokens), atol=1e-5, rtol=0)
    uncounted = naive_run(program, compensated_softmax(counted=False), tokens)
    assert (found - uncounted).abs().max() > 1e-3, "the mean weighs as much as what it stands for"
    assert (found - rewrite(program, **{**ALL, "compensation": False}).run(tokens)).abs().max() > 1e-3


def test_heads_that_retrieve_read_no_mean() -> None:
    program, tokens = tiny(), tokens_of(3, 19)
    result = rewrite(program, **{**ALL, "retrieve": "heads:[0.1,1.1]"})
    expected = naive_run(program, compensated_softmax(streaming=(0, 1)), tokens)
    torch.testing.assert_close(result.run(tokens), expected, atol=1e-5, rtol=0)


def test_nothing_changes_before_two_tokens_are_dropped() -> None:
    sparsify, program = Sparsify(**ALL), tiny()
    plan = sparsify.plan(program, TARGET)
    assert plan.relations[0] == Close(1e-4, tokens=WINDOW)
    result, tokens = sparsify.apply(program, plan)[0], tokens_of(2, 12)
    away = (result.run(tokens) - program.run(tokens)).abs().amax((0, 2))
    exact = WINDOW + SINKS + 1  # the mean of one token is that token
    assert away[:exact].max() < 1e-5 < 1e-4 < away[exact]


@settings(max_examples=8, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 22), max_size=4),
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=3),
    restart=st.integers(0, 22),
)
def test_any_split_of_padded_and_packed_rows_gives_the_same(cuts: list[int], lengths: list[int], restart: int) -> None:
    result = rewrite(tiny(), **ALL)
    tokens, places = tokens_of(len(lengths), 23), torch.arange(23)
    starts = torch.where(places >= restart, places - restart, places)  # a second sequence behind the first
    positions = torch.stack([torch.where(places < length, starts, -1) for length in lengths])
    whole = run_pieces(result, tokens, positions, [])
    apart = run_pieces(result, tokens, positions, cuts)
    real = positions >= 0
    torch.testing.assert_close(apart[real], whole[real], atol=1e-5, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    query, key, value = drawn(1, 4, 9, 3), drawn(1, 2, 9, 3), drawn(1, 2, 9, 2)
    held = {
        "positions": torch.arange(9)[None],
        "past_key": torch.zeros(1, 2, 4, 3, dtype=torch.float64),
        "past_value": torch.zeros(1, 2, 4, 2, dtype=torch.float64),
        "past_positions": torch.full((1, 4), -1),
        "dropped": torch.zeros(1, 2, 1, 5, dtype=torch.float64),
    }

    def output(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        t = {**held, "query": query, "key": key, "value": value}
        return compensated_window(t, scale=0.5, window=3, sinks=1, softcap=3.0)[0]

    assert torch.autograd.gradcheck(output, (query, key, value))


def test_what_nobody_would_read_is_refused() -> None:
    with pytest.raises(MemcError, match="no head streams") as caught:
        Sparsify(compensation=True)
    assert caught.value.code == "E203"

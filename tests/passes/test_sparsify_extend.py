"""The methods of sparsify that read beyond the trained length: identity, oracle, states, refusals, and a passkey."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import memc
from memc.blocks import AttentionBlock
from memc.cost import predict
from memc.dialect import arguments
from memc.dialect.selectors import SELECTORS, methods
from memc.errors import MemcError
from memc.kernels.compact_attention import choose
from memc.kernels.sparse_attention.choose import Rule
from memc.passes.sparsify import Sparsify, extend
from memc.program import Program, get_tensor
from memc.program_io import load_program, save_program
from memc.raising import raise_program
from memc.relation import Bounded, Close
from memc.sites import attention_blocks
from memc.verify import well_formed
from tests.kernels.compact_oracle import compact_attention
from tests.passes.test_sparsify import VARIANTS, rewrite
from tests.passes.tiny_program import TARGET, Attention, naive_run, run_pieces, tiny, tokens_of

METHODS = methods(extending=True)
SMALL: dict[str, Any] = {"budget": 12, "page": 3, "sinks": 1, "window": 4, "dense_below": 0}


def oracle_softmax(program: Program, **options: Any) -> Attention:
    """Attention as the oracle computes it, from queries and keys before rotation."""

    def attention(a: dict[str, Any], block: AttentionBlock, hidden: Tensor) -> Tensor:
        turn = arguments(block.key)
        o = {"inv_freq": get_tensor(program.module, str(turn["inv_freq"].target)).double()}
        o |= {name: turn[name] for name in ("interleaved", "scaling")}
        o |= {name: a[name] for name in ("scale", "softcap", "sink_logits")}
        qkv = [a[name].detach() for name in ("query_pre_rotary", "key_pre_rotary", "value")]
        positions = torch.arange(qkv[0].shape[2]).expand(qkv[0].shape[0], -1)
        return compact_attention(*qkv, positions, **o, **options).out

    return attention


@settings(max_examples=3, deadline=None)
@given(pages=st.integers(4, 6), dense_below=st.sampled_from([0, 20]), batch=st.integers(1, 3))
@pytest.mark.parametrize("method", METHODS)
def test_short_prompts_give_the_original_logits(method: str, pages: int, dense_below: int, batch: int) -> None:
    program = tiny(layers=1)
    window = 4 * pages - 8
    sparsify = Sparsify(method=method, budget=4 * pages, page=4, sinks=1, window=window, dense_below=dense_below)
    expected = max(4 * pages, dense_below)
    assert sparsify.exact_to == (expected if method == "longheads" else window + 1)
    plan = sparsify.plan(program, TARGET)
    assert plan.relations == (Close(1e-4, tokens=sparsify.exact_to), Bounded("perplexity_ratio", None))
    result, tokens = sparsify.apply(program, plan)[0], tokens_of(batch, sparsify.exact_to + 1, seed=pages)
    away = (result.run(tokens) - program.run(tokens)).abs().amax((0, 2))
    assert away[:-1].max() < 1e-5 < 1e-4 < away[-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_long_prompts_equal_the_oracle(variant: str, method: str) -> None:
    program, tokens = tiny(layers=1, **VARIANTS[variant]), tokens_of(2, 24)
    result = rewrite(program, **SMALL, method=method).run(tokens)
    options = {**SMALL, "method": method}
    torch.testing.assert_close(
        result, naive_run(program, oracle_softmax(program, **options), tokens), atol=2e-5, rtol=0
    )
    other = naive_run(program, oracle_softmax(program, **{**options, "budget": 15}), tokens)
    assert (result - other).abs().max() > 1e-3


@settings(max_examples=3, deadline=None)
@given(cuts=st.lists(st.integers(1, 29), max_size=4))
@pytest.mark.parametrize("method", METHODS)
def test_any_split_equals_one_run(method: str, cuts: list[int]) -> None:
    result, tokens = rewrite(tiny(layers=1), **SMALL, method=method), tokens_of(2, 30)
    positions = torch.arange(30).expand_as(tokens)
    torch.testing.assert_close(run_pieces(result, tokens, positions, cuts), result.run(tokens), atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_keys_are_held_before_rotation_and_states_survive_the_disk(method: str, tmp_path: Path) -> None:
    program = tiny()
    result = rewrite(program, **SMALL, method=method)
    assert well_formed(result) == []
    pages = result.states[3]
    assert (pages.name, pages.shape, pages.dtype) == ("layer0_pages", ("B", 2, "S/3", 20), torch.float32)
    tokens, shifted = tokens_of(1, 7), torch.arange(7)[None]
    (state, other) = (result(tokens, at, *result.new_state(1))[1] for at in (shifted, shifted.flip(1)))
    torch.testing.assert_close(state, other), "a key is the same wherever it stands"
    save_program(result, tmp_path)
    loaded, tokens = load_program(tmp_path), tokens_of(2, 40)
    assert loaded.states == result.states
    assert torch.equal(loaded.run(tokens), result.run(tokens))


def test_bytes_read_are_those_of_what_is_held() -> None:
    program = tiny()
    contexts = (100, 4096)
    before = predict(program, TARGET, contexts).bytes_read_per_token
    weights = before[100] - 2 * 2 * 2 * 10 * 4 * 100
    for method, own in (("longheads", 16), ("infllm", 0)):
        result = rewrite(program, method=method, budget=64, page=16, window=16, dense_below=128)
        after = predict(result, TARGET, contexts).bytes_read_per_token
        for context, read, described in ((100, 100, 0), (4096, 64, 4096 // 16)):
            assert after[context] == weights + 2 * 2 * 10 * 4 * (2 * (read + own) + described + 2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("method=longheads,rerank=2", "reads pages whole"),
        ("method=infllm,retrieve=heads:50%", "at their true distance"),
        ("method=infllm,page=64", "within the window of 48.* Next: write sparsify:method=infllm,page=64,window=64"),
        ("method=longheads,bits=4", "bits go with method=bounds"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: str, reason: str) -> None:
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        memc.pipeline.parse_spec(f"sparsify:{options}")


def test_the_page_fits_the_window() -> None:
    assert Sparsify(method="longheads").page_size == 64
    assert Sparsify(method="infllm").page_size == 32
    assert Sparsify(method="infllm", window=96).page_size == 64


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"method": "longheads", "budget": 128, "window": 8}, "up to 1023 positions, the model was trained on 100"),
        ({"method": "longheads", "budget": 128, "window": 8, "dense_below": 0}, "up to 127 positions"),
        ({"method": "infllm", "budget": 256, "window": 100}, "up to 100 positions.*window=99"),
    ],
)
def test_more_positions_than_were_trained_are_refused(options: dict[str, Any], reason: str) -> None:
    program = tiny()
    program.model = replace(program.model, max_positions=100)
    with pytest.raises(MemcError, match=f"E203.*{reason}"):
        Sparsify(**options).plan(program, TARGET)
    assert Sparsify(method="infllm", budget=256, window=99).plan(program, TARGET).sites


def test_layers_that_do_not_rotate_are_refused() -> None:
    program = tiny()
    for block in attention_blocks(program):
        block.key.replace_all_uses_with(block.key_pre_rotary)
    program.module.recompile()
    plan = Sparsify(method="infllm").plan(program, TARGET)
    assert not plan.sites and {r.code for r in plan.rejections} == {"no_rotary"}


def test_values_of_another_size_than_keys_are_refused_where_they_ask() -> None:
    program = tiny()
    block = replace(attention_blocks(program)[0], value_dim=5)
    assert extend.refuse(program, block, "infllm") is None
    code, reason = extend.refuse(program, block, "longheads") or ("", "")
    assert code == "value_size" and "5 and not 10 channels" in reason
    assert all(f"``{code}``" in (Sparsify.__doc__ or "") for code in ("value_size", "no_rotary"))


# ---- a passkey at eight times the trained length

HAY, QUESTION, VOCAB, TRAINED = 8, 8, 32, 32
BASE = 50.0
"""Of the rotary angles: the slowest one goes from 0 to 0.8 radians in training, and round more than once beyond."""


def passkeys(count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids ``[count, length]`` and where the answers are.

    Hay in which one key stands twice in a row, as passkeys are told twice, anywhere; at the end it is asked for.
    """
    random = np.random.default_rng(seed)
    ids, key = random.integers(0, HAY, (count, length)), random.integers(QUESTION + 1, VOCAB, count)
    where = random.integers(0, length - 4, count)
    for place in (where, where + 1):
        ids[np.arange(count), place] = key
    ids[:, -2], ids[:, -1] = QUESTION, key
    answers = np.zeros((count, length), bool)
    answers[:, -1] = True
    return ids, answers


def turn(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate ``[B,H,T,D]`` by its positions ``[B,T]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * BASE ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@pytest.fixture(scope="module")
def trained() -> Program:
    """The decoder of the recall example, trained to find a key in ``TRAINED`` tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples")
        recall = importlib.import_module("recall")
        setting = replace(recall.SHORT, vocab=VOCAB, length=TRAINED, steps=80)
        patch.setattr(recall.Setting, "draw", lambda self, count, seed: passkeys(count, self.length, seed))
        patch.setattr(recall, "turn", turn)
        model = recall.train(setting)
        example = torch.arange(7).expand(2, 7).contiguous()
        return raise_program(memc.capture(model, (example, example), max_positions=TRAINED)).program


@torch.no_grad()
def found(program: Program, length: int) -> float:
    """Return the share of keys found; the question goes through decoding steps, not inside a prompt."""
    ids = torch.from_numpy(passkeys(24, length, seed=0)[0])
    positions = torch.arange(length).expand_as(ids)
    logits = run_pieces(program, ids, positions, [length - 3, length - 2, length - 1])[:, -2]
    return float((logits.argmax(-1) == ids[:, -1]).float().mean())


def at_true_positions(tokens: Tensor, count: Tensor, at: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    return tokens, at[:, None].expand_as(count)


def test_a_passkey_is_found_at_eight_times_the_trained_length(
    trained: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"budget": TRAINED, "page": 4, "sinks": 0, "dense_below": 0}
    sides = {
        "longheads": rewrite(trained, method="longheads", window=8, **options),
        "infllm": rewrite(trained, method="infllm", window=16, **options),
    }
    assert set(sides) == set(METHODS) and all(SELECTORS[name].extends for name in sides)
    assert found(trained, TRAINED) == 1.0
    assert found(trained, 8 * TRAINED) <= 0.5
    for program in sides.values():
        assert found(program, TRAINED) == 1.0
        assert found(program, 8 * TRAINED) >= 0.95
    # The planted fault: what is read is the same, rotated as before.
    monkeypatch.setattr(choose, "_places", at_true_positions)
    for program in sides.values():
        assert found(program, TRAINED) == 1.0
        assert found(program, 8 * TRAINED) <= 0.6

"""Every promised family: all blocks found with the right facts, and the raised program computes the same logits."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from memc.blocks import (
    Alibi,
    AttentionBlock,
    Bidirectional,
    Causal,
    FeedForwardBlock,
    RelativeBias,
    SlidingWindow,
)
from memc.errors import MemcError
from memc.raising import Raised, raise_program
from tests.families import FAMILIES, FFN, HEADS, inputs_of, raw_program

FULL, SLIDING, BOTH = Causal(), SlidingWindow(5), Bidirectional()
QUICK = ("llama", "gemma2", "gpt2", "bloom", "phi3", "t5")
"""The six families that ``make test`` runs; ``make conformance`` runs all."""


@dataclass(frozen=True)
class Expected:
    """What a family's two layers must be found as."""

    kv_heads: int = HEADS
    head_dim: int = 8
    masks: tuple[Any, ...] = (FULL, FULL)
    rotary: tuple[int, bool] | None = None
    activation: str = "silu"
    gated: bool = True
    hidden: int = FFN
    scale: float | None = None
    qk_norm: bool = False
    softcap: float | None = None
    alibi: bool = False
    moe: bool = False


def _rope(width: int = 8, **changes: Any) -> Expected:
    return Expected(**{"kv_heads": 3, "head_dim": width, "rotary": (width, False), **changes})


def _plain(activation: str, **changes: Any) -> Expected:
    return Expected(activation=activation, gated=False, **changes)


EXPECTED = {
    "llama": _rope(10),
    "mistral": _rope(10, masks=(SLIDING, SLIDING)),
    "mixtral": _rope(10, masks=(SLIDING, SLIDING), moe=True),
    "qwen2": _rope(masks=(FULL, SLIDING)),
    "qwen3": _rope(10, qk_norm=True),
    "qwen3_moe": _rope(10, qk_norm=True, moe=True),
    "gemma": _rope(10, activation="gelu_tanh"),
    "gemma2": _rope(10, activation="gelu_tanh", masks=(SLIDING, FULL), scale=12**-0.5, softcap=3.0),
    "gemma3_text": _rope(10, activation="gelu_tanh", masks=(SLIDING, FULL), qk_norm=True),
    "phi": _rope(rotary=(4, False), activation="gelu_tanh", gated=False),
    "phi3": _rope(masks=(SLIDING, SLIDING)),
    "gpt2": _plain("gelu_tanh"),
    "gpt_neox": _plain("gelu", rotary=(4, False)),
    "gptj": _plain("gelu_tanh", rotary=(4, True)),
    "opt": _plain("relu"),
    "bloom": _plain("gelu_tanh", hidden=192, alibi=True),
    "falcon": _rope(activation="gelu", gated=False),
    "mpt": _plain("gelu", hidden=192, alibi=True),
    "stablelm": _rope(rotary=(4, False)),
    "smollm3": _rope(),
    "olmo2": _rope(qk_norm=True),
    "cohere": _rope(rotary=(8, True), qk_norm=True),
    "granite": _rope(scale=0.3),
    "starcoder2": _rope(activation="gelu_tanh", gated=False, masks=(SLIDING, SLIDING)),
    "bert": _plain("gelu", masks=(BOTH, BOTH)),
    "roberta": _plain("gelu", masks=(BOTH, BOTH)),
    "distilbert": _plain("gelu", masks=(BOTH, BOTH)),
    "vit": _plain("gelu", masks=(BOTH, BOTH)),
    "minimal_gpt": _plain("gelu"),
    "torch_encoder": _plain("relu", masks=(BOTH, BOTH)),
    "torch_mha": _plain("relu"),
}

DECODERS = [name for name in FAMILIES if name not in ("bert", "roberta", "distilbert", "vit", "t5", "torch_encoder")]


@cache
def raised(name: str) -> tuple[Raised, Any]:
    program, reference = raw_program(name)
    return raise_program(program), reference


def every(names: Any) -> list[Any]:
    """Parametrise over families; those that are not quick run in the conformance suite."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.conformance) for name in names]


def attention_blocks(result: Raised) -> list[AttentionBlock]:
    return [block for block in result.blocks if isinstance(block, AttentionBlock)]


def check_logits(name: str) -> None:
    result, reference = raised(name)
    assert result.near_misses == ()
    assert result.program.raised
    for batch, length in ((1, 1), (1, 2), (3, 11), (2, 17)):
        inputs = inputs_of(result.program, batch, length)
        with torch.no_grad():
            got = result.program(*inputs, *result.program.new_state(batch))[0]
            want = reference(*inputs)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def check_attention(name: str) -> None:
    attention = attention_blocks(raised(name)[0])
    if name == "t5":
        check_encoder_decoder(attention)
        return
    want = EXPECTED[name]
    assert [block.layer for block in attention] == [0, 1]
    for block, mask in zip(attention, want.masks, strict=True):
        assert (block.num_heads, block.num_kv_heads, block.head_dim) == (HEADS, want.kv_heads, want.head_dim)
        assert block.mask == mask
        assert block.scale == pytest.approx(want.scale or want.head_dim**-0.5, rel=1e-6)
        assert block.softcap == want.softcap
        assert block.qk_norm == want.qk_norm
        assert isinstance(block.bias, Alibi) == want.alibi
        assert sorted(block.projections) == ["key", "output", "query", "value"]
        assert block.hidden is not None
        assert block.kind == "attention"
        if not (name == "smollm3" and block.layer == 1):  # its second layer has no positions, by configuration
            assert (block.rotary and (block.rotary.size, block.rotary.interleaved)) == want.rotary


def check_encoder_decoder(attention: list[AttentionBlock]) -> None:
    self_, cross = "attention", "cross_attention"
    assert [block.kind for block in attention] == [self_, self_, self_, cross, self_, cross]
    assert [type(block.mask) for block in attention] == [type(mask) for mask in (BOTH, BOTH, FULL, BOTH, FULL, BOTH)]
    assert [isinstance(block.bias, RelativeBias) for block in attention] == [True, True, True, False, True, False]
    assert not any(block.streamable for block in attention)


def check_feed_forward(name: str) -> None:
    blocks = [block for block in raised(name)[0].blocks if isinstance(block, FeedForwardBlock)]
    if name == "t5":
        assert [(block.layer, block.activation, block.hidden) for block in blocks] == [
            (0, "relu", FFN),
            (1, "relu", FFN),
        ] * 2
        return
    want = EXPECTED[name]
    assert [block.layer for block in blocks] == [0, 1]
    for block in blocks:
        if want.moe:
            assert block.kind == "moe"
        else:
            facts = (block.activation, block.gate is not None, block.hidden)
            assert facts == (want.activation, want.gated, want.hidden)


@pytest.mark.parametrize("name", every(FAMILIES))
def test_raised_logits_equal_the_original(name: str) -> None:
    check_logits(name)


@pytest.mark.parametrize("name", every(FAMILIES))
def test_attention_is_found_with_the_right_facts(name: str) -> None:
    check_attention(name)


@pytest.mark.parametrize("name", every(FAMILIES))
def test_feed_forward_is_found_with_the_right_facts(name: str) -> None:
    check_feed_forward(name)


@pytest.mark.parametrize("name", every(DECODERS))
def test_a_sequence_runs_in_pieces_and_among_padding(name: str) -> None:
    program = raised(name)[0].program
    tokens, positions = inputs_of(program, 2, 13)
    with torch.no_grad():
        whole = program(tokens, positions, *program.new_state(2))[0]
        state = program.new_state(2)
        pieces = []
        for start, stop in ((0, 4), (4, 5), (5, 12), (12, 13)):
            piece, *state = program(tokens[:, start:stop], positions[:, start:stop], *state)
            pieces.append(piece)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)
        # Padding before, within and after a sequence changes nothing for its tokens.
        where = torch.tensor([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15])
        padded_tokens = torch.full((2, 17), 1)
        padded_positions = torch.full((2, 17), -1)
        padded_tokens[:, where], padded_positions[:, where] = tokens, positions
        padded = program(padded_tokens, padded_positions, *program.new_state(2))[0][:, where]
    torch.testing.assert_close(padded, whole, rtol=0, atol=2e-5)


def test_every_family_is_expected() -> None:
    assert set(EXPECTED) | {"t5"} == set(FAMILIES)


@pytest.mark.parametrize("name", every(FAMILIES))
def test_the_published_coverage_holds(name: str) -> None:
    published = json.loads((files("memc") / "coverage.json").read_text())
    assert coverage_row(name) == published[name]


def coverage_row(name: str) -> dict[str, Any]:
    """Return a family's row of ``memc doctor --coverage``."""
    row: dict[str, Any] = {"captured": False, "attention": False, "ffn": False, "logits": False, "note": ""}
    try:
        result, _ = raised(name)
    except MemcError as error:
        return {**row, "note": str(error)}
    row["captured"] = True
    row["note"] = "; ".join(f"{miss.source} {miss.reason}" for miss in result.near_misses[:1])
    for key, check in (("attention", check_attention), ("ffn", check_feed_forward), ("logits", check_logits)):
        with suppress(AssertionError):
            check(name)
            row[key] = True
    return row


if __name__ == "__main__":
    # Write the published table anew: python -m tests.core.test_families
    table = {name: coverage_row(name) for name in FAMILIES}
    Path(str(files("memc") / "coverage.json")).write_text(json.dumps(table, indent=1) + "\n")

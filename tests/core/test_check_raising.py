"""The check of what raising made of a model goes past its windows, where a wrong one shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memc import api
from memc.blocks import SlidingWindow
from memc.conversion.raising import LONGEST, TOKENS, compared_tokens
from memc.errors import MemcError
from memc.raising import canonical
from memc.raising.masks import Scores, classify
from memc.recipe import Recipe
from tests.passes.tiny_program import tiny

WINDOWS = [(0, TOKENS), (40, 40 + TOKENS), (LONGEST, LONGEST + TOKENS), (LONGEST + 1, TOKENS)]


@pytest.mark.parametrize(("window", "tokens"), WINDOWS)
def test_the_longest_sequence_goes_past_a_window(window: int, tokens: int) -> None:
    assert compared_tokens(tiny(window=window)) == tokens


@pytest.mark.parametrize("off", [0, 1])
def test_a_window_that_is_off_by_one_is_no_model_to_convert(
    off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    def wrong(*given: Any) -> Scores:
        found = classify(*given)
        assert isinstance(found.mask, SlidingWindow) and found.mask.size == 40 > TOKENS
        return replace(found, mask=SlidingWindow(found.mask.size + off))

    config = MistralConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=40,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(canonical, "classify", wrong)

    def convert() -> Any:
        return api.convert(tmp_path / "model", tmp_path / "out", backend="eager", recipe=Recipe(recipe=1))

    if off:
        with pytest.raises(MemcError, match="raised_logits"):
            convert()
    else:
        assert convert().verified

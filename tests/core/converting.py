"""A tiny Llama on disk, and converting it: what the tests of conversions share."""

from __future__ import annotations

from pathlib import Path

import torch

from memc import api, plugins
from memc.program import Program
from memc.recipe import Recipe, Verify
from memc.report.models import ConvertDocument

ANY_TIME = Verify(budgets={"decode_time_ratio": 100.0, "prompt_time_ratio": 100.0})
"""Models as small as those of the tests get no faster: tests/core/test_speed.py is about time."""


TRAINED = 128
"""Positions of :func:`make_llama`."""


def make_llama(folder: Path, dtype: torch.dtype = torch.float32, layers: int = 2, hidden: int = 40) -> Path:
    """Save a random Llama whose every dimension is distinct, and a tokenizer of bytes."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67,
        hidden_size=24,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(67)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def register_toy(setitem: object) -> None:
    """Make ``toy`` a known pass."""
    setitem(plugins.BUILTIN["memc.passes"], "toy", "tests.core.toy:Toy")  # type: ignore[operator]
    plugins.registered.cache_clear()


class Logits(torch.nn.Module):
    """A Hugging Face model as a function of tokens and positions."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, position_ids=positions, use_cache=False).logits
        return logits


def run(llama: Path | Program, out: Path, *passes: str, **options: object) -> ConvertDocument:
    return api.convert(llama, out, passes=passes, backend="eager", recipe=Recipe(recipe=1), **options)  # type: ignore[arg-type]

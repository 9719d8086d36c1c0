"""The tiny Llama that conversions are tested on, on disk and captured, once for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memc.frontend import capture
from memc.program import Program
from tests.core.converting import Logits, make_llama, register_toy


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def program(llama: Path) -> Program:
    """The same model, captured."""
    from transformers import LlamaForCausalLM

    module = LlamaForCausalLM.from_pretrained(llama)
    tokens = torch.arange(14).reshape(2, 7)
    return capture(Logits(module), (tokens, torch.arange(7).expand(2, 7).contiguous()), name="tiny-llama")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``toy`` a known pass for a test."""
    register_toy(monkeypatch.setitem)

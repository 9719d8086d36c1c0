"""An artifact is a model of transformers: its logits, its loss, its ways of generating, in a pipeline of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import memc
from memc import api
from memc.errors import MemcError
from memc.interop import SessionModel
from tests.core.converting import make_llama

TOKENS = torch.tensor([[3, 4, 5, 6, 9], [0, 0, 7, 9, 11]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module", params=["window:window=6,sinks=1", "linearize:window=4"])
def out(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "out"
    api.convert(folder, out, passes=[request.param], threads=1)
    return out


@pytest.fixture(scope="module")
def dense(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> SessionModel:
    out = tmp_path_factory.mktemp("dense") / "out"
    api.convert(folder, out, recipe="dense", threads=1, context=64)
    return memc.load(out, threads=1, chunk=3).as_transformers()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True}, {"use_cache": False}],
)
def test_it_generates_what_the_original_does(dense: SessionModel, original: Any, options: dict[str, Any]) -> None:
    found = []
    for model in (dense, original):
        torch.manual_seed(0)
        found.append(model.generate(TOKENS, attention_mask=MASK, max_new_tokens=9, pad_token_id=1, **options))
    assert torch.equal(*found)


def test_logits_loss_and_columns_are_the_originals(dense: SessionModel, original: Any) -> None:
    labels = TOKENS.masked_fill(MASK == 0, -100)
    ours, theirs = (model(TOKENS, attention_mask=MASK, labels=labels) for model in (dense, original))
    shown = MASK.bool()
    assert torch.allclose(ours.logits[shown], theirs.logits[shown], atol=1e-4)
    assert abs(float(ours.loss) - float(theirs.loss)) < 1e-4
    last: Tensor = dense(TOKENS, attention_mask=MASK, logits_to_keep=2).logits
    assert torch.allclose(last, ours.logits[:, -2:], atol=1e-5)
    listed = dense(TOKENS, attention_mask=MASK, logits_to_keep=torch.tensor([0, 4])).logits
    assert torch.allclose(listed, ours.logits[:, [0, 4]], atol=1e-5)


def test_a_cache_goes_on_where_it_was(dense: SessionModel) -> None:
    whole = dense(TOKENS, attention_mask=MASK).logits
    first = dense(TOKENS[:, :3], attention_mask=MASK[:, :3], use_cache=True)
    rest = dense(TOKENS[:, 3:], attention_mask=MASK, past_key_values=first.past_key_values).logits
    assert torch.allclose(rest, whole[:, 3:], atol=1e-5)


def test_a_rewritten_model_generates_what_its_session_does(out: Path) -> None:
    session = memc.load(out, threads=1)
    prompt = [3, 4, 5, 6, 9, 12, 13]
    expected = session.generate(prompt, max_new_tokens=12, stop=[]).ids
    model = session.as_transformers()
    found = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert found.tolist() == expected
    alone = model.generate(TOKENS[1:, 2:], max_new_tokens=6, pad_token_id=1)[0, 3:]
    padded = model.generate(TOKENS, attention_mask=MASK, max_new_tokens=6, pad_token_id=1)[1, 5:]
    assert alone.tolist() == padded.tolist()


def test_it_works_in_a_pipeline(dense: SessionModel, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    generate = pipeline("text-generation", model=dense, tokenizer=tokenizer)
    (said,) = generate("w3 w4 w5", max_new_tokens=4, do_sample=False)
    ids = dense.session.generate([3, 4, 5], max_new_tokens=4).ids
    written = "".join(f"w{token}" for token in (3, 4, 5, *ids))
    assert said["generated_text"].replace(" ", "") == written, "their decoder joins words as it likes"


def test_what_it_cannot_do_is_refused(dense: SessionModel, original: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        dense.generate(TOKENS[:1], assistant_model=original, max_new_tokens=2)
    with pytest.raises(MemcError, match="E208 an artifact takes no inputs_embeds"):
        dense(TOKENS, inputs_embeds=torch.zeros(1))
    with pytest.raises(MemcError, match="E208 an artifact is not saved by transformers"):
        dense.save_pretrained(tmp_path)
    with pytest.raises(MemcError, match="E206"):
        dense(torch.zeros(1, 200, dtype=torch.int64))
    assert np.isfinite(dense(TOKENS).logits.numpy()).all(), "and it goes on"

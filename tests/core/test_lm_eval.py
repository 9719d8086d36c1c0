"""lm-eval's stock adapter for transformers on an artifact: what it calls, and, where it is installed, tasks of ours."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, StoppingCriteria

import memc
from memc import api
from tests.core.converting import make_llama

ROWS = [[3, 4, 5, 6, 9], [7, 9, 11], [2]]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}]',
    "loglikelihood_rolling": "metric_list: [{metric: word_perplexity}]",
    "generate_until": "generation_kwargs: {until: [w9], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]",
}
DOCUMENTS = [
    {"question": "w3 w4", "choices": ["w5 w6", "w7"], "answer": 0},
    {"question": "w9 w12 w13 w20", "choices": ["w1", "w2 w3 w4"], "answer": 1},
]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """An artifact as a model of transformers, the model it was made from, and their tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    model = make_llama(folder / "llama")
    api.convert(model, folder / "out", recipe="dense", backend="eager", threads=1, context=64)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), eos_token="w1", pad_token="w0", unk_token="w0"
    )
    artifact = memc.load(folder / "out", threads=1).as_transformers()
    return artifact, AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer


def test_it_has_what_the_adapter_asks_for(sides: tuple[Any, Any, Any]) -> None:
    artifact, _, _ = sides
    assert isinstance(artifact, PreTrainedModel)
    assert artifact.eval() is artifact
    artifact.tie_weights()
    assert artifact.device == torch.device("cpu")
    assert artifact.config.max_position_embeddings == 64


def test_likelihoods_of_rows_padded_on_the_right_without_a_mask_are_the_original_s(sides: tuple[Any, Any, Any]) -> None:
    batch = torch.tensor([row + [0] * (5 - len(row)) for row in ROWS])
    found, expected = (model(batch).logits.log_softmax(-1) for model in sides[:2])
    for index, row in enumerate(ROWS):
        assert torch.allclose(found[index, : len(row)], expected[index, : len(row)], atol=1e-4)


class Until(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose last token is one of these, as the adapter's own does with texts."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], torch.tensor([20, 41, 52]))


def test_text_until_a_criterion_is_the_original_s(sides: tuple[Any, Any, Any]) -> None:
    batch = torch.tensor([[0] * (5 - len(row)) + row for row in ROWS])
    options = {
        "attention_mask": (batch != 0).long(),
        "max_length": 20,
        "pad_token_id": 0,
        "use_cache": True,
        "do_sample": False,
    }
    found, expected = (model.generate(batch, stopping_criteria=[Until()], **options) for model in sides[:2])
    assert torch.equal(found, expected) and found.shape[1] > 6


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: make lm-eval")
@pytest.mark.parametrize("kind", KINDS)
def test_its_stock_adapter_finds_what_it_finds_of_the_original(
    kind: str, sides: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.format(name=f"tiny_{kind}", data=data, kind=kind, more=KINDS[kind]))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = []
    for model in sides[:2]:
        adapter = HFLM(pretrained=model, tokenizer=sides[2], batch_size=2, max_length=64)
        result = simple_evaluate(adapter, tasks=[f"tiny_{kind}"], task_manager=tasks, bootstrap_iters=0)
        found.append([sample["filtered_resps"] for sample in result["samples"][f"tiny_{kind}"]])
    assert len(found[0]) == len(DOCUMENTS)
    assert str(found[0]) == str(found[1]) or _numbers(found[0]) == pytest.approx(_numbers(found[1]), abs=1e-3)


def _numbers(found: Any) -> list[float]:
    if isinstance(found, (list, tuple)):
        return [number for each in found for number in _numbers(each)]
    return [float(found)]

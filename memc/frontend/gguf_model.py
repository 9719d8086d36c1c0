"""GGUF models: configuration, weights under the names of transformers, and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memc.errors import MemcError
from memc.frontend.gguf_file import GgufFile, GgufWeights, read_gguf
from memc.frontend.gguf_tokenizer import write_tokenizer
from memc.frontend.huggingface import build_empty, model_info, trace_model
from memc.frontend.names import fit
from memc.frontend.source import Captured, side_files
from memc.machine import cache_folder
from memc.weights import Recipe, RenamedWeights

ARCHITECTURES = ("llama", "qwen2")
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FACTORS = "rope_freqs.weight"


def capture_gguf(path: Path, source: str, *, weights: bool) -> Captured:
    """Capture a ``.gguf`` file of a llama or qwen2 model.

    Raises ``MemcError`` E302 for a corrupt file, E303 when tensors do not fit the metadata, E305 for another
    architecture or an unsupported kind of rotary scaling, E308 for a tokenizer that cannot be converted.
    """
    file = read_gguf(path)
    raw = configuration(file, source)
    config = _config(raw)
    checkpoint = GgufWeights(file)
    module = build_empty(config, source, dtype=checkpoint.main_dtype)
    if _ROPE_FACTORS in file.tensors:
        _divide_frequencies(module, checkpoint.get(_ROPE_FACTORS))
    renamed = fit(RenamedWeights(checkpoint, _recipes(file, raw, source)), module)
    program = trace_model(module, model_info(config, source, checkpoint.digest))
    beside = [p for p in side_files(path.parent) if p.name != "config.json"]
    folder = cache_folder() / f"gguf-{checkpoint.digest[:16]}"
    tokenizer = beside if any(p.name == "tokenizer.json" for p in beside) else write_tokenizer(file, folder)
    return Captured(program, renamed if weights else None, raw, tokenizer)


def configuration(file: GgufFile, source: str) -> dict[str, Any]:
    """Return the transformers configuration that a GGUF file's metadata describes, as JSON values."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES or f"{arch}.expert_count" in meta:
        kind = f"{arch} with experts" if arch in ARCHITECTURES else repr(arch)
        hint = f"GGUF files of {' and '.join(ARCHITECTURES)} are read; for others give the Hugging Face folder"
        raise MemcError("E305", f"GGUF architecture {kind} is not supported", source, hint)
    try:
        config = {name: meta[f"{arch}.{key}"] for name, key in _FIELDS.items()}
        vocab = file.tensors["token_embd.weight"].shape[0]
    except KeyError as error:
        raise MemcError("E302", f"GGUF file lacks {error.args[0]!r}", source, "get the file again") from error
    heads = config["num_attention_heads"]
    config |= {
        "architectures": ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"],
        "model_type": arch,
        "vocab_size": vocab,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": {"rope_theta": meta.get(f"{arch}.rope.freq_base", 10000.0), **_scaling(meta, arch, source)},
    }
    head_dim = meta.get(f"{arch}.attention.key_length") or meta.get(f"{arch}.rope.dimension_count")
    if head_dim:
        config["head_dim"] = head_dim
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in meta:
            config[name] = meta[f"tokenizer.ggml.{key}_token_id"]
    return config


def _config(raw: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**raw)


def _scaling(meta: Mapping[str, Any], arch: str, source: str) -> dict[str, Any]:
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.get(f"{arch}.rope.scaling.factor", 1.0)}
    hint = "give the Hugging Face folder of the model"
    raise MemcError("E305", f"rotary scaling {kind!r} in a GGUF file is not supported", source, hint)


def _recipes(file: GgufFile, raw: Mapping[str, Any], source: str) -> dict[str, Recipe]:
    """Map the file's names to those of transformers; undo llama.cpp's order of rotary rows in queries and keys."""
    recipes: dict[str, Recipe] = {}
    for name in file.tensors:
        block = _BLOCK.fullmatch(name)
        if name == _ROPE_FACTORS:
            continue
        if block and block[2] in _LAYER:
            target = f"model.layers.{block[1]}.{_LAYER[block[2]]}.{block[3]}"
            heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}.get(block[2])
            if raw["model_type"] == "llama" and heads:
                recipes[target] = Recipe((name,), "permute", build=_Unpermute(heads))
                continue
        elif name in _GLOBAL:
            target = _GLOBAL[name]
        else:
            raise MemcError("E305", f"GGUF tensor {name!r} has no place in a {raw['model_type']} model", source)
        recipes[target] = Recipe((name,))
    return recipes


class _Unpermute:
    """Take a projection's rows from llama.cpp's interleaved rotary order to the half-split order of transformers."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """Return the one tensor ``[heads * head_dim, ...]`` with its rows reordered."""
        (value,) = tensors
        pairs = value.view(self.heads, value.shape[0] // self.heads // 2, 2, *value.shape[1:])
        return pairs.transpose(1, 2).reshape(value.shape)


def _divide_frequencies(module: nn.Module, factors: Tensor) -> None:
    """Apply llama 3's per-frequency factors, which llama.cpp stores as a tensor, to the computed rotary frequencies."""
    for name, value in module.named_buffers():
        if name.rpartition(".")[2] in ("inv_freq", "original_inv_freq"):
            value.div_(factors)

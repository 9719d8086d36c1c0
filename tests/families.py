"""Tiny random models of every family that memc promises, each dimension distinct so that a mix-up shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from memc.frontend import capture, huggingface
from memc.frontend.huggingface import model_info, trace_model
from memc.frontend.trace import first_output
from memc.program import Program

VOCAB, HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WINDOW, POSITIONS = 97, 48, 80, 2, 6, 3, 10, 5, 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**_SIZES, "num_key_value_heads": KV_HEADS}
_WIDE = {**GROUPED, "head_dim": HEAD_DIM}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LAYER_TYPES = ["sliding_attention", "full_attention"]


class MinimalGPT(nn.Module):
    """The hand-written decoder of many tutorials: explicit matmul, a tril mask buffer, softmax, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.blocks = nn.ModuleList([MinimalBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(length, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class MinimalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, FFN), nn.GELU(), nn.Linear(FFN, HIDDEN))
        self.register_buffer("mask", torch.tril(torch.ones(POSITIONS, POSITIONS)).view(1, 1, POSITIONS, POSITIONS))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (t.view(batch, length, HEADS, width // HEADS).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        y = torch.softmax(scores, dim=-1) @ v
        x = x + self.out(y.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.mlp(self.norm2(x))


class TorchEncoder(nn.Module):
    """A token classifier on ``nn.TransformerEncoder``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, FFN, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(tokens)))


class TorchMHA(nn.Module):
    """A causal decoder on ``nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.attention = nn.ModuleList([nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True) for _ in range(LAYERS)])
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(LAYERS)])
        self.up = nn.ModuleList([nn.Linear(HIDDEN, FFN) for _ in range(LAYERS)])
        self.down = nn.ModuleList([nn.Linear(FFN, HIDDEN) for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        x = self.tokens(tokens) + self.positions(positions)
        for attention, norm, up, down in zip(self.attention, self.norms, self.up, self.down, strict=True):
            normed = norm(x)
            x = x + attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
            x = x + down(torch.relu(up(x)))
        return self.head(x)


_GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FFN}
_GPT2 |= {"n_positions": POSITIONS, "bos_token_id": 1, "eos_token_id": 2}
_BLOOM = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "bos_token_id": 1}
_FALCON = {**_SIZES, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "ffn_hidden_size": FFN, "bias": True}
_MPT = {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "expansion_ratio": 2, "max_seq_len": POSITIONS}
_DISTILBERT = {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": HEADS}
_T5 = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": HEAD_DIM, "d_ff": FFN, "num_layers": LAYERS, "num_heads": HEADS}
_GEMMA3 = {**_WIDE, "sliding_window": WINDOW, "query_pre_attn_scalar": HEAD_DIM, "layer_types": _LAYER_TYPES}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_WIDE, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**_WIDE, sliding_window=WINDOW),
    "mixtral": lambda: tf.MixtralConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    "qwen2": lambda: tf.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=WINDOW, layer_types=_LAYER_TYPES[::-1]
    ),
    "qwen3": lambda: tf.Qwen3Config(**_WIDE),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_WIDE, **_EXPERTS, num_experts=4),
    "gemma": lambda: tf.GemmaConfig(**_WIDE),
    "gemma2": lambda: tf.Gemma2Config(
        **_WIDE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
    ),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**_GEMMA3),
    "phi": lambda: tf.PhiConfig(**GROUPED, partial_rotary_factor=0.5),
    "phi3": lambda: tf.Phi3Config(**GROUPED, sliding_window=WINDOW),
    "gpt2": lambda: tf.GPT2Config(**_GPT2),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**_SIZES, rotary_pct=0.5),
    "gptj": lambda: tf.GPTJConfig(**_GPT2, rotary_dim=4),
    "opt": lambda: tf.OPTConfig(**_SIZES, ffn_dim=FFN, word_embed_proj_dim=HIDDEN),
    "bloom": lambda: tf.BloomConfig(**_BLOOM),
    "falcon": lambda: tf.FalconConfig(**_FALCON),
    "mpt": lambda: tf.MptConfig(vocab_size=VOCAB, **_MPT),
    "stablelm": lambda: tf.StableLmConfig(**GROUPED, partial_rotary_factor=0.5, use_qkv_bias=True),
    "smollm3": lambda: tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED),
    "cohere": lambda: tf.CohereConfig(**GROUPED, use_qk_norm=True),
    "granite": lambda: tf.GraniteConfig(
        **GROUPED, attention_multiplier=0.3, residual_multiplier=0.7, embedding_multiplier=2.0, logits_scaling=1.5
    ),
    "starcoder2": lambda: tf.Starcoder2Config(**GROUPED, sliding_window=WINDOW),
    "bert": lambda: tf.BertConfig(**_SIZES),
    "roberta": lambda: tf.RobertaConfig(**_SIZES | {"max_position_embeddings": POSITIONS + 1}),
    "distilbert": lambda: tf.DistilBertConfig(**_DISTILBERT, max_position_embeddings=POSITIONS),
    "vit": lambda: tf.ViTConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=20,
        patch_size=4,
    ),
    "t5": lambda: tf.T5Config(**_T5, decoder_start_token_id=0),
    "minimal_gpt": MinimalGPT,
    "torch_encoder": TorchEncoder,
    "torch_mha": TorchMHA,
}


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value of its own: matrices keep the scale of their input, norms stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
            if value.ndim >= 2:
                value.copy_(noise / math.sqrt(value.shape[-1]))
            else:
                value.copy_(0.1 * noise + (1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0))


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """Return the family's module in eval mode with seeded random weights, and its configuration (None for torch)."""
    torch.manual_seed(seed)
    made = FAMILIES[name]()
    if isinstance(made, nn.Module):
        module, config = made, None
    else:
        module, config = huggingface.build(made, name, dtype=torch.float32), made
    randomize(module, seed)
    return module.eval(), config


def raw_program(name: str, seed: int = 0) -> tuple[Program, Callable[..., Tensor]]:
    """Return the raw program with its weights, and the original as a callable of the same inputs in the same order."""
    module, config = build(name, seed)
    if config is None:
        module_inputs = 2 if name == "torch_mha" else 1
        tokens = torch.arange(14).view(2, 7) % VOCAB
        examples = (tokens, torch.arange(7).expand(2, 7))[:module_inputs]
        program = capture(module, examples, name=name, max_positions=None if name == "torch_encoder" else POSITIONS)
        return program, lambda *inputs: first_output(module(*inputs[:module_inputs]))
    program = trace_model(module, model_info(config, name, ""))

    def reference(*inputs: Tensor) -> Tensor:
        names = {"tokens": "input_ids", "positions": "position_ids", "decoder_tokens": "decoder_input_ids"}
        given = {names.get(spec.name, spec.name): value for spec, value in zip(program.inputs, inputs, strict=True)}
        if name in WITHOUT_POSITIONS:
            given.pop("position_ids")
        with torch.no_grad():
            return first_output(module(**given))

    return program, reference


WITHOUT_POSITIONS = ("bloom", "mpt")
"""Decoders whose forward takes no position_ids: their positions input is not read."""


def inputs_of(program: Program, batch: int, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Make inputs for a program: random tokens, positions 0, 1, 2, ..., normal noise for anything else."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"B": batch, "T": length, "U": length + 2}
    made = []
    for spec in program.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        if spec.role == "positions":
            made.append(torch.arange(length).expand(batch, length).contiguous())
        elif spec.dtype == torch.int64:
            made.append(torch.randint(3, VOCAB, shape, generator=generator))
        else:
            made.append(torch.randn(shape, generator=generator))
    return tuple(made)

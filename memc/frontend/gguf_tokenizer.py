"""A GGUF file's vocabulary as the files that the runtime reads: tokenizer, template, generation configuration."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from memc.errors import MemcError
from memc.frontend.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"llama-bpe": _WORDS % "{1,3}", "llama3": _WORDS % "{1,3}", "qwen2": _WORDS % ""}
"""Pre-tokenizer -> the expression that cuts text into words, as in the models' own tokenizer.json."""


def write_tokenizer(file: GgufFile, folder: Path) -> list[Path]:
    """Write ``tokenizer.json`` and its companions for a GGUF file into ``folder`` and return their paths.

    Raises ``MemcError`` E308 for a kind of tokenizer that has no conversion here.
    """
    meta = file.metadata
    tokens, kinds = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if not tokens:
        return []
    model = meta.get("tokenizer.ggml.model")
    if model == "gpt2":
        tokenizer = _byte_level(file, tokens)
    elif model == "llama":
        tokenizer = _sentence_pieces(file, tokens)
    else:
        raise _unsupported(file, f"model {model!r}")
    special = [
        AddedToken(text, special=kind == _CONTROL, normalized=False)
        for text, kind in zip(tokens, kinds or [], strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(special)
    _add_start(tokenizer, meta, tokens, default=model == "llama")
    folder.mkdir(parents=True, exist_ok=True)
    return _write(folder, tokenizer, meta, tokens)


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    meta = file.metadata
    merges = [tuple(pair.split(" ", 1)) for pair in meta.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(BPE({text: i for i, text in enumerate(tokens)}, merges))
    pre = meta.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[pre]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    elif pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif pre in ("default", "gpt-2"):
        tokenizer.pre_tokenizer = byte_level
    else:
        raise _unsupported(file, f"pre-tokenizer {pre!r}")
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre in ("llama-bpe", "llama3"):
        tokenizer.model.ignore_merges = True
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_pieces(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """Rebuild the merges of a SentencePiece BPE model from its scores: the best-scored piece is merged first."""
    meta = file.metadata
    scores = meta.get("tokenizer.ggml.scores")
    if not scores:
        raise _unsupported(file, "SentencePiece model without scores")
    ids = {text: i for i, text in enumerate(tokens)}
    found = []
    for text, score in zip(tokens, scores, strict=True):
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [(a, b) for a, b in halves if a in ids and b in ids]
        found += [(score, a, b) for a, b in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    found.sort(key=lambda item: -item[0])
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = [(a, b) for _, a, b in found]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend("▁")] if meta.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _add_start(tokenizer: Tokenizer, meta: dict[str, Any], tokens: list[str], *, default: bool) -> None:
    start = meta.get("tokenizer.ggml.bos_token_id")
    if start is None or not meta.get("tokenizer.ggml.add_bos_token", default):
        return
    text = tokens[start]
    tokenizer.post_processor = processors.TemplateProcessing(f"{text} $A", f"{text} $A {text} $B", [(text, start)])


def _write(folder: Path, tokenizer: Tokenizer, meta: dict[str, Any], tokens: list[str]) -> list[Path]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    generation: dict[str, Any] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            config[f"{name}_token"] = tokens[index]
            if name != "unk":
                generation[f"{name}_token_id"] = index
    template = meta.get("tokenizer.chat_template")
    texts = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(config | ({"chat_template": template} if template else {}), indent=1),
        "generation_config.json": json.dumps(generation, indent=1),
    }
    if template:
        texts["chat_template.jinja"] = template
    for name, text in texts.items():
        _replace(folder / name, text)
    return [folder / name for name in texts]


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(text)
    Path(name).replace(path)


def _unsupported(file: GgufFile, what: str) -> MemcError:
    hint = "put the model's own tokenizer.json beside the GGUF file"
    return MemcError("E308", f"GGUF tokenizer cannot be converted: {what}", str(file.path), hint)

"""A tiny decoder, a tiny sentence encoder of words, and texts about separate topics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from memc import __version__
from memc.bank.encoder import EncoderFacts
from memc.bank.layout import BankShape
from memc.bank.manifest import PASSAGES, RECORDS, TREE, BankManifest, seal
from memc.bank.passages import CLUSTERS, EMBEDDINGS, write_passages
from memc.bank.records import write_records
from memc.bank.tree import Tree, nearest_child

TOPICS, WORDS = 4, 20
WIDTH = 24
SHAPE = BankShape(branch=2, ranks=(4, 2), layers=(0, 2), width=6)


def words(topic: int) -> list[str]:
    """Return the words of a topic; no two topics share one."""
    return [f"w{topic}x{number}" for number in range(WORDS)]


def text(topic: int, count: int, seed: int) -> str:
    """Return a text of ``count`` words of one topic."""
    return " ".join(np.random.default_rng([topic, seed]).choice(words(topic), count))


def write_texts(folder: Path, passages: int = 12) -> list[str]:
    """Write one file a topic, each record one passage."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for topic in range(TOPICS):
        path = folder / f"topic{topic}.jsonl"
        lines = [json.dumps({"text": text(topic, 16, seed)}) for seed in range(passages)]
        path.write_text("\n".join(lines) + "\n")
        files.append(str(path))
    return files


def vocabulary() -> list[str]:
    """Return all tokens, the special ones first."""
    return ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(word for topic in range(TOPICS) for word in words(topic))]


def word_tokenizer(single: str) -> Tokenizer:
    """Return a tokenizer of whole words that frames a text as ``single`` says."""
    names = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return tokenizer


def write_encoder(folder: Path, *, width: int = WIDTH) -> Path:
    """Write a random BERT with a tokenizer of whole words, as sentence-transformers would."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    names = vocabulary()
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    model = BertModel(config).eval()
    centres = torch.randn(TOPICS, width).repeat_interleave(WORDS, 0)
    with torch.no_grad():  # words of a topic are alike
        model.embeddings.word_embeddings.weight[4:] = 2 * centres + 0.3 * torch.randn(TOPICS * WORDS, width)
    model.save_pretrained(folder)
    word_tokenizer("[CLS] $A [SEP]").save(str(folder / "tokenizer.json"))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def write_model(folder: Path) -> Path:
    """Write a random decoder of two layers, with a tokenizer of whole words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    word_tokenizer("[CLS] $A").save(str(folder / "tokenizer.json"))
    return folder


def embeddings(count: int = 64, seed: int = 0) -> np.ndarray:
    """Return unit vectors around four well-separated centres, one after the other."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(TOPICS, 8))
    points = centres[np.arange(count) % TOPICS] + 0.1 * generator.normal(size=(count, 8))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def records(shape: BankShape = SHAPE, seed: int = 0) -> dict[tuple[int, ...], np.ndarray]:
    """Return a random record for every cluster that has one."""
    generator = np.random.default_rng(seed)
    return {
        cluster: generator.normal(size=shape.record_shape(level)).astype(np.float32)
        for level in (-1, *shape.storing())
        for cluster in shape.all_clusters(level)
    }


def write_bank(folder: Path, trained: dict[tuple[int, ...], np.ndarray] | None = None) -> Path:
    """Write a bank of two levels without an encoder, whose clusters are those of ``embeddings()``."""
    (folder / PASSAGES).mkdir(parents=True)
    points = embeddings()
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": f"passage {n}"}) + "\n" for n in range(len(points))))
    write_passages(folder / PASSAGES, [str(source)], 1000)
    source.unlink()
    leaves = points[:TOPICS]
    tops = np.stack([leaves[:2].mean(axis=0), leaves[2:].mean(axis=0)])
    root = np.zeros(len(points), np.int64)
    first, _ = nearest_child(points, root, tops, 2)
    second, _ = nearest_child(points, first, leaves, 2)
    counts = np.bincount(first, minlength=2), np.bincount(second, minlength=4)
    Tree(2, (tops, leaves.copy()), counts, (1.0, 0.6)).save(folder / TREE)
    (folder / PASSAGES / EMBEDDINGS).write_bytes(points.tobytes())
    (folder / PASSAGES / CLUSTERS).write_bytes(np.stack([first, second], axis=1).astype("<i4").tobytes())
    write_records(folder / RECORDS, SHAPE, (trained or {}).items())
    facts = EncoderFacts(source="tiny", digest="0", width=8, limit=16)
    manifest = BankManifest(
        version=__version__, model="tiny", model_digest="0", **vars(SHAPE), encoder=facts, passages=len(points),
        passage_characters=1000, sources=["source.jsonl"], seed=0,
    )  # fmt: skip
    seal(folder, manifest)
    return folder

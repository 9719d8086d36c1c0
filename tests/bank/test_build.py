"""Building a bank: from text to clusters, the same one however often it is killed, and refusals by code."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from memc.bank import Bank, tasks
from memc.bank.build import BankModel, BuildOptions, build_bank
from memc.bank.encoder import Encoder
from memc.bank.manifest import ENCODER
from memc.bank.passages import EMBEDDINGS, cut
from memc.bank.sentence import SentenceFacts, prepare_encoder, sentence_facts
from memc.bank.tasks import BLOCK
from memc.cli import main
from memc.progress import Silent
from tests.bank.test_records import refused
from tests.bank.tiny_bank import TOPICS, WIDTH, text, words, write_encoder, write_texts

pytestmark = pytest.mark.xdist_group("bank")  # they share what takes seconds to make


def test_topics_become_clusters_and_texts_find_them(built: Path) -> None:
    bank = Bank.open(built, verify=True)
    assert (bank.shape.layers, bank.shape.width, bank.shape.ranks) == ((0, 1), 12, (4, 2))
    tops = {topic: set(bank.passages.clusters[bank.passages.sources == topic, 0].tolist()) for topic in range(TOPICS)}
    assert all(len(found) == 1 for found in tops.values()) and len(set.union(*tops.values())) == TOPICS
    for topic in range(TOPICS):
        assert {bank.retrieve(text(topic, 16, 999)).cluster[0]} == tops[topic]
    near = [bank.retrieve(bank.passages.text(index)).depth for index in range(0, 160, 8)]
    assert near.count(2) >= 15
    assert bank.retrieve("words that nobody knows").depth == 0
    assert not bank.fetch(bank.retrieve(bank.passages.text(0))).any()


def test_every_passage_is_where_descent_leads(built: Path) -> None:
    bank = Bank.open(built)
    places, _ = bank.tree.assign(np.asarray(bank.passages.embeddings))
    assert np.array_equal(places, bank.passages.clusters)
    assert bank.passages.text(41) == text(1, 16, 1)
    assert sum(bank.tree.counts[1]) == len(bank.passages) == 160


def test_the_same_seed_gives_the_same_bytes(
    place: Path, built: Path, tmp_path: Path, owner: BankModel, sources: list[str], options: BuildOptions
) -> None:
    build_bank(owner, sources, tmp_path / "bank", options)
    names = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file() and ENCODER not in p.parts)
    assert all((tmp_path / "bank" / name).read_bytes() == (built / name).read_bytes() for name in names)


def test_a_build_that_is_killed_goes_on(
    place: Path, built: Path, tmp_path: Path, owner: BankModel, sources: list[str], options: BuildOptions
) -> None:
    out = tmp_path / "bank"
    child = os.fork()
    if child == 0:
        encode = Encoder.encode
        Encoder.encode = lambda self, *texts, **how: (time.sleep(0.5), encode(self, *texts, **how))[1]  # type: ignore[method-assign]
        build_bank(owner, sources, out, options)
        os._exit(0)
    embedded = tmp_path / "bank.partial" / "passages" / EMBEDDINGS
    began = time.monotonic()
    while not (embedded.is_file() and embedded.stat().st_size >= BLOCK * WIDTH * 4):
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists()
    with embedded.open("ab") as stream:
        stream.write(b"half a row")
    before = embedded.stat().st_mtime
    build_bank(owner, sources, out, options)
    assert (out / "passages" / EMBEDDINGS).stat().st_mtime > before
    for name in ("bank.json", "tree.safetensors", "passages/embeddings.bin", "passages/clusters.bin", "records.bank"):
        assert (out / name).read_bytes() == (built / name).read_bytes(), name


def test_what_is_built_already_or_otherwise_is_not_gone_on_with(
    place: Path, built: Path, tmp_path: Path, owner: BankModel, sources: list[str], options: BuildOptions
) -> None:
    refused("E204", build_bank, owner, sources, built, options)
    out = tmp_path / "bank"
    few = str(write_texts(tmp_path / "few", 1)[0])
    refused("E207", build_bank, owner, [few], out, options)
    refused("E204", build_bank, owner, sources, out, options)
    build_bank(owner, sources, out, options, fresh=True)


def test_a_bank_for_some_layers(
    place: Path, tmp_path: Path, owner: BankModel, sources: list[str], options: BuildOptions
) -> None:
    last = owner.layers[-1]
    manifest = build_bank(owner.only([last, last]), sources, tmp_path / "bank", options)
    assert manifest.shape.layers == (last,) and len(owner.layers) > 1
    bank = Bank.open(tmp_path / "bank")
    assert set(bank.inputs([bank.retrieve("w0x1 w0x2")])) == {f"bank_{last}"}
    message = refused("E200", owner.only, [0, last + 1])
    assert f"layer {last + 1} has no feed-forward block" in message
    refused("E200", owner.only, [])


def test_data_that_are_no_bank_are_refused(
    place: Path, tmp_path: Path, owner: BankModel, options: BuildOptions
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    refused("E207", build_bank, owner, [str(empty)], tmp_path / "a", options)
    refused("E207", build_bank, owner, [str(tmp_path / "none")], tmp_path / "b", options)
    few = [str(tmp_path / "few.jsonl")]
    Path(few[0]).write_text(json.dumps({"text": "w0x1"}))
    message = refused("E207", build_bank, owner, few, tmp_path / "c", options)
    assert "1 passages, fewer than the 16 clusters" in message
    for wrong in ({"ranks": (0, 0)}, {"ranks": ()}, {"branch": 1}, {"ranks": (4, -1)}):
        refused("E200", lambda wrong=wrong: replace(options, **wrong))


def test_little_disk_or_memory_is_told_before(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: BankModel,
    sources: list[str],
    options: BuildOptions,
) -> None:
    monkeypatch.setattr("memc.bank.build.ENCODER_BYTES", 1 << 60)
    refused("E502", build_bank, owner, sources, tmp_path / "a", options)
    monkeypatch.undo()
    monkeypatch.setattr("memc.bank.build.memory_bytes", lambda: 100)
    refused("E501", build_bank, owner, sources, tmp_path / "b", options)


def test_a_decoder_is_no_encoder(place: Path, tmp_path: Path) -> None:
    refused("E208", prepare_encoder, str(place / "model"), tmp_path / "encoder", Silent())


def test_another_encoder_is_refused(place: Path, built: Path) -> None:
    facts = Bank.open(built).manifest.encoder
    refused("E310", Encoder, place / "encoder", facts.model_copy(update={"digest": "other"}))
    refused("E310", Encoder(place / "encoder", facts.model_copy(update={"width": 9})).encode, ["w0x1"])


def test_texts_past_the_limit_and_blank_ones(built: Path) -> None:
    encoder = Bank.open(built).encoder
    assert encoder.facts.limit == 16 and encoder.facts.width == WIDTH
    long = text(0, 60, 5).split()
    parts = [" ".join(long[start : start + 14]) for start in range(0, 60, 14)]
    sizes = np.array([len(part.split()) + 2 for part in parts])
    mean = (encoder.encode(parts) * sizes[:, None]).sum(axis=0)
    np.testing.assert_allclose(encoder.encode([" ".join(long)])[0], mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encoder.encode([words(1)[0], long[0]]), axis=1), 1, atol=1e-5)
    refused("E205", encoder.encode, ["  "])
    marks, alone = encoder.encode(["", words(1)[0]], blank=True)
    np.testing.assert_array_equal(alone, encoder.encode([words(1)[0]])[0])
    np.testing.assert_allclose(np.linalg.norm(marks), 1, atol=1e-5)
    encoder.__dict__["_ends"] = [], []
    assert not encoder.encode([""], blank=True).any()


def test_a_passage_that_the_encoder_cannot_read_stops_no_build(
    owner: BankModel, options: BuildOptions, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = tasks.texts
    monkeypatch.setattr(tasks, "texts", lambda *where: ["", *read(*where)[1:]])
    made = build_bank(owner, sources, tmp_path / "bank", options)
    passages = Bank.open(tmp_path / "bank").passages
    assert len(passages) == made.passages and np.isfinite(passages.embeddings).all()


def test_vectors_are_those_of_the_model_itself(place: Path, built: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    model = BertModel.from_pretrained(place / "sentence").eval()
    ids = Tokenizer.from_file(str(place / "sentence" / "tokenizer.json")).encode(text(2, 9, 0)).ids
    with torch.no_grad():
        want = model(torch.tensor([ids])).last_hidden_state.mean(dim=1)[0].numpy()
    np.testing.assert_allclose(
        Bank.open(built).encoder.encode([text(2, 9, 0)])[0], want / np.linalg.norm(want), atol=1e-5
    )


def test_what_sentence_transformers_says_is_read(tmp_path: Path) -> None:
    assert sentence_facts(tmp_path) == SentenceFacts()
    write_encoder(tmp_path / "e")
    assert sentence_facts(tmp_path / "e") == SentenceFacts("mean", True, 16)
    pooling = tmp_path / "e" / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert sentence_facts(tmp_path / "e").pooling == "cls"
    pooling.write_text(json.dumps({"pooling_mode_lasttoken": True}))
    refused("E208", sentence_facts, tmp_path / "e")
    (tmp_path / "e" / "modules.json").write_text(json.dumps([{"path": "2_Dense", "type": "x.models.Dense"}]))
    refused("E208", sentence_facts, tmp_path / "e")
    (tmp_path / "e" / "modules.json").write_text("[")
    refused("E302", sentence_facts, tmp_path / "e")


def test_passages_end_where_text_does() -> None:
    document = "One two three. " * 10 + "\n\n" + "Four five six. " * 30
    passages = list(cut([document[:77], document[77:]], 200))
    assert " ".join(" ".join(passages).split()) == " ".join(document.split())
    assert max(map(len, passages)) <= 200 and all(passage.endswith(".") for passage in passages)
    assert passages[0] == ("One two three. " * 10).strip()
    assert list(cut(["x" * 450], 200)) == ["x" * 200, "x" * 200, "x" * 50]
    assert list(cut(["  \n "], 200)) == [] and list(cut([], 200)) == []


def test_the_commands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sources: list[str]) -> None:
    out = str(tmp_path / "bank")
    words = ["bank", "build", "--model", str(place / "model"), "--data", *sources[:1], "-o", out]
    sizes = ["--levels", "1", "--branch", "2", "--ranks", "3", "--encoder", str(place / "encoder")]
    assert main([*words, "--levels", "2", "--ranks", "3"]) == 2
    assert "1 ranks for 2 levels" in capsys.readouterr().err
    assert main([*words, *sizes, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.bank/1" and document["passages"] == 40
    assert main(["bank", "inspect", out, "--cluster", "1", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "cluster 1:" in shown and "w0x" in shown and "untrained" in shown
    assert main(["bank", "inspect", out, "--cluster", "2"]) == 2
    assert "E200" in capsys.readouterr().err
    assert main(["bank", "inspect", str(tmp_path / "missing")]) == 3

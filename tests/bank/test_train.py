"""Training a bank: blocks learn their own cluster beside a frozen model, the same however often it is killed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from memc import __version__
from memc.bank import Bank, BankShape, train
from memc.bank.build import BankModel
from memc.bank.encoder import EncoderFacts
from memc.bank.learner import Learner
from memc.bank.manifest import PASSAGES, RECORDS, TREE, BankManifest, require_model, seal
from memc.bank.measure import measure_bank
from memc.bank.passages import CLUSTERS, EMBEDDINGS, Passages, write_passages
from memc.bank.records import RecordFile, write_records
from memc.bank.sequences import held_out, pack
from memc.bank.train import FOLDER, TrainOptions, all_jobs, parse_job, train_bank
from memc.bank.tree import Tree
from memc.cli import main
from memc.progress import Silent
from memc.train import loop
from memc.train.parallel import Processes
from tests.bank.test_records import refused
from tests.bank.tiny_bank import TOPICS, vocabulary, write_texts

pytestmark = pytest.mark.xdist_group("bank")  # they share what takes seconds to make

PASSAGES_EACH = 12
SHAPE = BankShape(branch=2, ranks=(3, 2), layers=(0, 1), width=12)
OPTIONS = TrainOptions(epochs=5, length=40, rate=0.1, held_out=0.1)


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return place / "model"


@pytest.fixture(scope="module")
def template(owner: BankModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a bank in which every topic is a leaf."""
    folder = tmp_path_factory.mktemp("bank") / "bank"
    (folder / PASSAGES).mkdir(parents=True)
    files = write_texts(folder.parent / "texts", PASSAGES_EACH)
    write_passages(folder / PASSAGES, files, 1000)
    leaves = np.eye(TOPICS, dtype=np.float32)
    tops = np.stack([leaves[:2].mean(axis=0), leaves[2:].mean(axis=0)])
    topics = np.repeat(np.arange(TOPICS), PASSAGES_EACH)
    counts = np.bincount(topics // 2), np.bincount(topics)
    Tree(2, (tops, leaves), counts, (1.0, 0.5)).save(folder / TREE)
    (folder / PASSAGES / EMBEDDINGS).write_bytes(leaves[topics].tobytes())
    (folder / PASSAGES / CLUSTERS).write_bytes(np.stack([topics // 2, topics], axis=1).astype("<i4").tobytes())
    write_records(folder / RECORDS, SHAPE, ())
    facts = EncoderFacts(source="tiny", digest="0", width=TOPICS, limit=16)
    manifest = BankManifest(
        version=__version__, model="model", model_digest=owner.digest, **vars(SHAPE), encoder=facts,
        passages=len(topics),        passage_characters=1000, sources=[Path(file).name for file in files], seed=0,
    )  # fmt: skip
    seal(folder, manifest)
    return folder


@pytest.fixture(scope="module")
def learner(model: Path, template: Path) -> Learner:
    return Learner.load(str(model), Bank.open(template).manifest)


@pytest.fixture
def bank(template: Path, tmp_path: Path) -> Bank:
    return Bank.open(shutil.copytree(template, tmp_path / "bank"))


@pytest.fixture(scope="module")
def trained(template: Path, learner: Learner, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    bank = Bank.open(shutil.copytree(template, tmp_path_factory.mktemp("trained") / "bank"))
    train_bank(bank, learner, OPTIONS, Silent())
    return bank


def test_a_fresh_block_changes_nothing(learner: Learner, bank: Bank) -> None:
    (sequence, *_) = pack(bank.passages, SHAPE, ~held_out(bank.passages, 0), learner.text.encode, 40, 0)
    scale = learner.input_scale([sequence])
    block = torch.cat([learner.first_values(sequence.cluster[: n + 1], 0, scale) for n in range(2)], dim=2)
    with torch.no_grad():
        assert torch.equal(learner.loss(sequence, block), learner.loss(sequence, None))
        assert not block[:, 2].any() and block[:, :2].std() > 0
        block[:, 2] = 0.1
        assert not torch.equal(learner.loss(sequence, block), learner.loss(sequence, None))


def test_first_values_give_hidden_units_of_size_one(learner: Learner, bank: Bank) -> None:
    sequences = list(pack(bank.passages, SHAPE, ~held_out(bank.passages, 0), learner.text.encode, 40, 0))
    scale = learner.input_scale(sequences)
    assert scale.shape == (2,) and (scale > 0).all()
    wide = Learner(learner.program, BankShape(2, (4000,), SHAPE.layers, SHAPE.width), learner.text)
    x = torch.randn(200, SHAPE.width) * scale[0]
    assert float((x @ wide.first_values((1,), 0, scale)[0, 0].T).std()) == pytest.approx(1, rel=0.05)


def test_sequences_are_of_one_cluster_and_leave_out_what_is_held_out(learner: Learner, bank: Bank) -> None:
    held = held_out(bank.passages, 0.25)
    assert held.sum() == TOPICS * 3 and held[9:12].all() and not held[:9].any()
    found = list(pack(bank.passages, SHAPE, ~held, learner.text.encode, 40, 0))
    for sequence in found:
        words = learner.text.decode(sequence.tokens.tolist()).split()
        topic = sequence.cluster[0] * 2 + sequence.cluster[1]
        assert {word[1] for word in words if word.startswith("w")} == {str(topic)}
        starts = np.flatnonzero(sequence.tokens == 1)
        assert set(starts.tolist()) <= set(np.flatnonzero(sequence.positions == 0).tolist())
        assert len(sequence.tokens) <= 40
    assert sum(len(s.tokens) for s in found) == TOPICS * 9 * 17


def test_every_block_is_trained_and_the_right_one_is_best(trained: Bank, learner: Learner) -> None:
    names = [(), *((n,) for n in range(2)), *((a, b) for a in range(2) for b in range(2))]
    assert all(trained.records.trained(cluster) for cluster in names)
    jobs = train_bank(trained, learner, OPTIONS, Silent())  # nothing is left to do
    assert [job.job for job in jobs] == ["0", "1", "generic"]
    assert jobs[0].blocks == 3 and jobs[2].tokens == jobs[0].tokens + jobs[1].tokens
    document = measure_bank(trained, learner, OPTIONS, jobs, Silent())
    assert len(document.held_out) == 2
    block, generic, wrong = (document.ratio(side) for side in ("block", "generic", "wrong"))
    assert block is not None and generic is not None and wrong is not None
    assert block < 0.8 and block < 0.9 * wrong


def test_the_model_stays_as_it_is(trained: Bank, learner: Learner, model: Path) -> None:
    held = {tuple(value.shape): value for value in load_file(model / "model.safetensors").values()}
    for name, now in learner.program.module.named_parameters():
        assert now.grad is None and tuple(now.shape) in held, name
    embedding = held[len(vocabulary()), SHAPE.width]
    assert any(torch.equal(now, embedding) for now in learner.program.module.parameters())


class KilledError(Exception):
    """Stands for the end of the process."""


def test_a_training_that_is_killed_goes_on(
    trained: Bank, bank: Bank, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    save, saved = loop.Checkpoints.save, 0

    def failing(self: loop.Checkpoints, *args: object) -> None:
        nonlocal saved
        save(self, *args)  # type: ignore[arg-type]
        saved += 1
        if saved == 7:
            raise KilledError

    monkeypatch.setattr(loop.Checkpoints, "save", failing)
    with pytest.raises(KilledError):
        train_bank(bank, learner, OPTIONS, Silent())
    assert not bank.records.trained((0,)) and (bank.folder / FOLDER / "0").is_dir()
    train_bank(Bank.open(bank.folder), learner, OPTIONS, Silent())
    assert (bank.folder / RECORDS).read_bytes() == (trained.folder / RECORDS).read_bytes()


def test_training_elsewhere_comes_to_the_same_bank(trained: Bank, bank: Bank, learner: Learner) -> None:
    train_bank(bank, learner, OPTIONS, Silent(), device=torch.device("cpu", 0))  # another name of the CPU
    assert (bank.folder / RECORDS).read_bytes() == (trained.folder / RECORDS).read_bytes()


def test_narrow_products_give_nearly_the_same_gradient(trained: Bank, learner: Learner) -> None:
    (sequence, *_) = pack(trained.passages, SHAPE, ~held_out(trained.passages, 0), learner.text.encode, 40, 0)
    found = []
    for products in (None, torch.bfloat16):
        levels = [torch.from_numpy(trained.records.read(sequence.cluster[: n + 1]).copy()) for n in range(2)]
        block = torch.cat(levels, dim=2).requires_grad_()
        with learner.learning(torch.device("cpu"), products) as learning:
            loss = learning.loss(sequence, block)
        loss.backward()
        assert block.grad is not None
        found.append((loss.detach(), block.grad))
    (loss, wide), (near, narrow) = found
    assert 0 < abs(loss - near) < 1e-2 * loss
    assert (wide - narrow).norm() < 0.05 * wide.norm()


def test_jobs_apart_come_to_the_same_bank(trained: Bank, bank: Bank, learner: Learner) -> None:
    train_bank(bank, learner, OPTIONS, Silent(), only=[(1,)])
    for path in (bank.folder / FOLDER).iterdir():  # as on another machine
        path.rename(bank.folder.parent / path.name)
    assert bank.records.trained((1, 0)) and not bank.records.trained((0,)) and not bank.records.trained(())
    second = Processes(1, 2)  # of two processes the one that does not lead
    object.__setattr__(second, "wait", lambda: None)
    train_bank(bank, learner, OPTIONS, Silent(), only=[(1,), ()], processes=second)
    assert [path.name for path in (bank.folder / FOLDER).glob("*.bank")] == ["generic.bank"]
    for name in ("1.bank", "1.json"):
        (bank.folder.parent / name).rename(bank.folder / FOLDER / name)
    train_bank(bank, learner, OPTIONS, Silent())
    assert (bank.folder / RECORDS).read_bytes() == (trained.folder / RECORDS).read_bytes()


def test_clusters_go_on_from_the_generic_block(bank: Bank, learner: Learner) -> None:
    still = replace(OPTIONS, epochs=1, rate=1e-9, start="generic")
    refusal = refused("E200", lambda: train_bank(bank, learner, still, Silent(), only=[(0,)]))
    assert "--start random" in refusal and not bank.records.trained(())
    train_bank(bank, learner, replace(OPTIONS, epochs=1), Silent(), only=[()])
    generic, (first, second) = bank.records.read(()).copy(), SHAPE.ranks
    train_bank(bank, learner, still, Silent(), only=[(0,)])
    np.testing.assert_allclose(bank.records.read((0,)), generic[:, :, :first], atol=1e-6)
    (leaf, *_) = (c for c in SHAPE.all_clusters(1) if c[0] == 0 and bank.records.trained(c))
    np.testing.assert_allclose(bank.records.read(leaf), generic[:, :, first : first + second], atol=1e-6)
    train_bank(bank, learner, OPTIONS, Silent(), only=[()], fresh=True)
    assert "another start" in refused("E204", lambda: train_bank(bank, learner, still, Silent(), only=[(0,)]))


def test_the_generic_block_goes_first_where_others_start_from_it(bank: Bank, learner: Learner) -> None:
    jobs = train_bank(bank, learner, replace(OPTIONS, epochs=1, start="generic"), Silent())
    assert [job.job for job in jobs] == ["0", "1", "generic"]
    again = train_bank(Bank.open(bank.folder), learner, replace(OPTIONS, epochs=1, start="generic"), Silent())
    assert again == jobs


def test_a_cluster_of_which_all_is_held_out_is_left_alone(
    bank: Bank, learner: Learner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_the_first(passages: Passages, share: float) -> npt.NDArray[np.bool_]:
        return held_out(passages, share) | (passages.clusters[:, 0] == 0)

    monkeypatch.setattr(train, "held_out", without_the_first)
    jobs = train_bank(bank, learner, replace(OPTIONS, epochs=1), Silent())
    assert [job.job for job in jobs] == ["1", "generic"] and not bank.records.trained((0,))
    refused("E207", lambda: train_bank(bank, learner, replace(OPTIONS, epochs=1), Silent(), only=[(0,)]))


def test_another_training_needs_fresh(trained: Bank, bank: Bank, learner: Learner) -> None:
    train_bank(bank, learner, OPTIONS, Silent(), only=[(0,)])
    other = TrainOptions(epochs=1, length=40, held_out=0.1)
    message = refused("E204", lambda: train_bank(bank, learner, other, Silent(), only=[(0,)]))
    assert "epochs, rate" in message
    before = RecordFile(bank.folder / RECORDS).read((0,))
    train_bank(bank, learner, other, Silent(), only=[(0,)], fresh=True)
    assert not np.array_equal(bank.records.read((0,)), before)


def test_what_cannot_be_trained_is_told(trained: Bank, bank: Bank, learner: Learner) -> None:
    refused("E310", require_model, bank.manifest, "another", "model")
    program = learner.program.copy()
    program.model = replace(program.model, absolute_positions=True, max_positions=39)
    short = replace(learner, program=program)
    assert "39 positions" in refused("E206", lambda: train_bank(bank, short, OPTIONS, Silent()))
    refused("E200", parse_job, "2", bank)
    refused("E200", parse_job, "all", bank)
    assert [parse_job(name, bank) for name in ("1", " generic")] == [(1,), ()] and len(all_jobs(bank)) == 3
    wild = TrainOptions(epochs=4, length=40, rate=1e30, held_out=0.1)
    refused("E403", lambda: train_bank(bank, learner, wild, Silent(), only=[(0,)]))
    assert not RecordFile(bank.folder / RECORDS).trained((0,))


def test_the_command(bank: Bank, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bank", "train", str(bank.folder), "--model", str(model), "--held-out", "0.1", "--length", "40"]
    assert main([*words, "--only", "0,7"]) == 2
    assert "no job '7'" in capsys.readouterr().err
    assert main([*words, "--only", "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "memc.bank-train/1"
    assert [row["cluster"] for row in document["held_out"]] == ["0"] and document["jobs"][0]["steps"] > 0

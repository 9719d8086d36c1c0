"""A converted model with a bank: each sequence gets the blocks of its own text, and without them nothing moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from memc import api, load
from memc.bank import Bank
from memc.bank.manifest import MANIFEST, RECORDS
from memc.bank.records import write_records
from memc.bank.session import BankSession, fetch_for, require_bank
from memc.cli import main
from memc.runtime import Session
from tests.bank.test_records import refused
from tests.bank.tiny_bank import TOPICS, records, text

pytestmark = pytest.mark.xdist_group("bank")  # they share what takes seconds to make


@pytest.fixture(scope="module")
def artifact(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    api.convert(place / "model", out, passes=["memory_bank:ranks=4:2"], backend="eager")
    return out


@pytest.fixture(scope="module")
def folder(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the bank that was built, and give every cluster a block that shows."""
    copy = Path(shutil.copytree(built, tmp_path_factory.mktemp("bank") / "bank"))
    write_records(copy / RECORDS, Bank.open(built).shape, records(Bank.open(built).shape).items())
    return copy


@pytest.fixture(scope="module")
def session(artifact: Path) -> Session:
    return load(artifact)


def prompts(session: Session, bank: Bank) -> list[list[int]]:
    """Return a passage of each topic that is near its leaf."""
    found = []
    for topic in range(TOPICS):
        texts = (bank.passages.text(40 * topic + index) for index in range(40))
        found.append(next(each for each in texts if bank.retrieve(each).depth == 2))
    return [session.encode(each) for each in found]


def test_a_batch_of_topics_is_as_one_by_one(session: Session, folder: Path) -> None:
    joined, plain = BankSession(session, Bank.open(folder)), session
    rows = prompts(session, Bank.open(folder))
    together = joined.logits(rows)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_allclose(joined.logits([row])[0], found, atol=1e-4)
        assert np.abs(plain.logits([row])[0] - found).max() > 1e-2


def test_a_window_of_which_the_encoder_knows_nothing_fetches_what_such_passages_do(
    session: Session, folder: Path
) -> None:
    bank = Bank.open(folder)
    joined, marks = BankSession(session, bank), np.array([2, 2])
    assert joined.decode(marks.tolist()) == ""
    want = bank.inputs([bank.tree.descend(bank.encoder.encode([""], blank=True)[0])])
    assert np.array_equal(joined.fetch([marks])["bank_0"], want["bank_0"])


def test_what_is_denied_or_untrained_gives_the_original_bit_for_bit(
    session: Session, folder: Path, built: Path
) -> None:
    rows = prompts(session, Bank.open(folder))
    want = session.logits(rows)
    for bank in (Bank.open(built), Bank.open(folder, deny=["0", "1", "2", "3"])):
        assert np.array_equal(BankSession(session, bank).logits(rows), want)


def test_a_conversation_keeps_what_its_first_tokens_fetched(session: Session, folder: Path) -> None:
    joined = BankSession(session, Bank.open(folder))
    rows = prompts(session, Bank.open(folder))
    state = joined.new_state(len(rows))
    joined.prefill(rows, state)
    held = {name: array.copy() for name, array in state.fetched.items()}
    assert all(block.any() for block in held["bank_0"])
    joined.prefill([[5], rows[0], [6], []], state)
    assert np.array_equal(state.fetched["bank_0"], held["bank_0"])
    whole = joined.new_state(1)
    np.testing.assert_allclose(joined.prefill([rows[0]], whole), joined.logits([rows[0]])[:, -1], atol=1e-4)


def test_what_was_used_is_said(folder: Path) -> None:
    bank = Bank.open(folder, memory_bytes=0)
    inputs, uses = fetch_for(bank, [bank.passages.text(0), "nothing of it is known"])
    assert inputs["bank_1"].shape == (2, 3, 6, 12) and not inputs["bank_1"][1].any()
    near, far = uses
    assert near.used == [near.cluster.split(".")[0], near.cluster] and near.records_read == 2
    assert near.bytes_read == bank.shape.record_bytes(0) + bank.shape.record_bytes(1)
    assert near.line().startswith(f"bank: cluster {near.used[0]}, {near.cluster} (distance ")
    assert far.near == "" and "like nothing in it" in far.line() and "nothing is fetched" in far.line()


def test_a_bank_of_another_model_or_shape_is_refused(session: Session, folder: Path, tmp_path: Path) -> None:
    for key, value, code in (("model_digest", "other", "E310"), ("layers", [0], "E310")):
        copy = Path(shutil.copytree(folder, tmp_path / key))
        data = json.loads((copy / MANIFEST).read_text())
        (copy / MANIFEST).write_text(json.dumps({**data, key: value}))
        if key == "layers":
            write_records(copy / RECORDS, Bank.open(folder).shape.__class__(4, (4, 2), (0,), 12), ())
        refused(code, require_bank, session.manifest, session.folder, Bank.open(copy))
    without = [port for port in session.manifest.inputs if port.role != "fetched"]
    dense = session.manifest.model_copy(update={"inputs": without})
    assert "memory_bank:ranks=4:2" in refused("E208", require_bank, dense, session.folder, Bank.open(folder))


def test_a_fused_block_is_as_the_fetched_one(
    artifact: Path, session: Session, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, (row, *_) = tmp_path / "fused", prompts(session, Bank.open(folder))
    said = session.decode(row)
    assert main(["bank", "fuse", str(folder), str(artifact), "--text", said, "-o", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    fused = load(out)
    assert made["used"] == fetch_for(Bank.open(folder), [said])[1][0].used and made["wider"] == [0, 1]
    assert [check["name"] for check in made["checks"]] == ["lowered_logits", "fused_logits"]
    assert all(port.role != "fetched" for port in fused.manifest.inputs)
    want = BankSession(session, Bank.open(folder)).logits([row])[0]
    np.testing.assert_allclose(fused.logits([row])[0], want, atol=1e-4)
    assert np.abs(session.logits([row])[0] - want).max() > 1e-2
    again = ["bank", "fuse", str(folder), str(artifact), "-o", str(out)]
    assert main([*again, "--cluster", made["used"][-1]]) == 2 and "E204" in capsys.readouterr().err
    assert main([*again, "--cluster", made["used"][-1], "--force"]) == 0
    assert "wider feed-forward network" in capsys.readouterr().out
    np.testing.assert_allclose(load(out).logits([row])[0], want, atol=1e-4)


def test_fusing_nothing_is_refused(
    artifact: Path, folder: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bank", "fuse", str(built), str(artifact), "-o", str(tmp_path / "fused")]
    for more in ([], ["--cluster", "0", "--generic"], ["--cluster", "9"], ["--cluster", "0.1"], ["--generic"]):
        assert main([*words, *more]) == 2, more
        assert "E200" in capsys.readouterr().err and not list(tmp_path.iterdir())
    fused = tmp_path / "fused"
    words = ["bank", "fuse", str(folder), str(artifact), "--cluster", "0", "-o", str(fused)]
    assert main(words) == 0 and capsys.readouterr()
    assert main(["bank", "fuse", str(folder), str(fused), "--cluster", "0"]) == 2
    assert "E208" in capsys.readouterr().err


def test_the_commands(artifact: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(artifact), "--prompt", Bank.open(folder).passages.text(0), "--max-new-tokens", "3"]
    assert main([*words, "--bank", str(folder)]) == 0
    assert "bank: cluster " in capsys.readouterr().err
    assert main([*words, "--bank", str(folder), "--json"]) == 0
    with_bank = json.loads(capsys.readouterr().out)
    assert with_bank["bank"]["records_read"] == 2
    top = with_bank["bank"]["used"][0]
    assert main([*words, "--bank", str(folder), "--deny", top, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bank"]["used"] == []
    assert main([*words, "--generic"]) == 2
    capsys.readouterr()
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text(1, 60, 3)}))
    ask = ["eval", str(artifact), "--text", str(tmp_path / "text.jsonl"), "--context", "16", "--json"]
    assert main(ask) == 0
    without = json.loads(capsys.readouterr().out)["sides"]["a"]["perplexity"]
    assert main([*ask, "--bank", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["sides"]["a"]["perplexity"] != without

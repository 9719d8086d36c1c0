"""An open bank: paths, blocks, what is denied, what is read once and read ahead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memc.bank import Bank, BankShape
from memc.bank.manifest import MANIFEST, RECORDS, TREE
from memc.bank.passages import CLUSTERS
from memc.bank.records import write_records
from memc.bank.tiers import Tier, memory, place
from tests.bank.test_records import refused
from tests.bank.tiny_bank import SHAPE, embeddings, records, write_bank


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bank(tmp_path / "bank", records())


def test_a_block_is_the_units_of_every_level_one_after_the_other(folder: Path) -> None:
    bank = Bank.open(folder)
    for point in embeddings(8, seed=3):
        path = bank.retrieve(point)
        assert path.depth == 2
        block = bank.fetch(path)
        assert block.shape == (len(SHAPE.layers), 3, SHAPE.units, SHAPE.width) and block.dtype == np.float32
        assert np.array_equal(block[:, :, :4], records()[path.cluster[:1]])
        assert np.array_equal(block[:, :, 4:], records()[path.cluster])


def test_inputs_are_one_block_a_layer_and_sequence(folder: Path) -> None:
    bank = Bank.open(folder)
    paths = [bank.retrieve(point) for point in embeddings(3)]
    inputs = bank.inputs(paths)
    assert list(inputs) == ["bank_0", "bank_2"]
    for index, layer in enumerate(SHAPE.layers):
        want = [bank.fetch(path)[index] for path in paths]
        assert np.array_equal(inputs[f"bank_{layer}"], want)


def test_a_text_that_is_like_nothing_gets_zeros(folder: Path) -> None:
    bank = Bank.open(folder)
    path = bank.retrieve(-embeddings().sum(axis=0))
    assert path.depth == 0 and path.near == () and bank.used(path) == []
    assert not bank.fetch(path).any() and bank.cost.read == 0


def test_a_text_that_is_like_nothing_gets_the_generic_block_where_asked_for(folder: Path, tmp_path: Path) -> None:
    far = -embeddings().sum(axis=0)
    bank = Bank.open(folder, generic=True, deny=["0", "1"])
    assert np.array_equal(bank.fetch(bank.retrieve(far)), records()[()])
    assert not bank.fetch(bank.retrieve(embeddings()[0])).any()
    untrained = Bank.open(write_bank(tmp_path / "other"), generic=True)
    assert not untrained.fetch(untrained.retrieve(far)).any()


def test_an_untrained_bank_gives_zeros(tmp_path: Path) -> None:
    bank = Bank.open(write_bank(tmp_path / "bank"))
    path = bank.retrieve(embeddings()[0])
    assert path.depth == 2 and not bank.fetch(path).any() and bank.cost.bytes == 0


@pytest.mark.parametrize("denied", [0, 1])
def test_what_is_denied_is_never_read(folder: Path, denied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Bank.open(folder).retrieve(embeddings()[0])
    name = ".".join(map(str, path.cluster[: denied + 1]))
    bank = Bank.open(folder, deny=[name])
    asked: list[tuple[int, ...]] = []
    read = bank.records.read
    monkeypatch.setattr(bank.records, "read", lambda cluster: asked.append(cluster) or read(cluster))
    bank.pin()
    bank.prefetch(path)
    block = bank.fetch(path)
    assert not any(cluster[: denied + 1] == path.cluster[: denied + 1] for cluster in asked)
    assert np.array_equal(block[:, :, :4], records()[path.cluster[:1]] if denied else 0 * block[:, :, :4])
    assert not block[:, :, 4:].any()


def test_a_conversation_reads_each_record_once(folder: Path) -> None:
    bank = Bank.open(folder)
    path = bank.retrieve(embeddings()[0])
    bank.fetch(path)
    assert (bank.cost.read, bank.cost.reused) == (2, 0)
    assert bank.cost.bytes == SHAPE.record_bytes(0) + SHAPE.record_bytes(1)
    assert bank.fetch(path) is bank.fetch(path) and not bank.fetch(path).flags.writeable
    assert (bank.cost.read, bank.cost.reused) == (2, 6)
    other = bank.retrieve(embeddings()[2])
    bank.fetch(other)
    bank.fetch(path)
    assert other.cluster != path.cluster and bank.cost.read <= 4


def test_little_memory_holds_only_the_last_records(folder: Path) -> None:
    bank = Bank.open(folder, memory_bytes=SHAPE.record_bytes(1))
    paths = [bank.retrieve(point) for point in embeddings(4)]
    for path in [*paths, *paths]:
        bank.fetch(path)
    assert bank.cost.read >= 2 * len(paths) and len(bank._recent) == 1


def test_what_is_pinned_or_read_ahead_costs_no_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    level = SHAPE.level_bytes(0)
    bank = Bank.open(folder, memory_bytes=2 * level + 1)
    assert [placement.tier.name for placement in bank.placements] == ["memory", "disk"]
    bank.pin()
    path = bank.retrieve(embeddings()[0])
    bank.prefetch(path)
    bank._reader.shutdown()
    monkeypatch.setattr(bank.records, "read", lambda cluster: pytest.fail(f"{cluster} is read again"))
    assert np.array_equal(bank.fetch(path)[:, :, 4:], records()[path.cluster])


def test_levels_go_where_they_fit() -> None:
    shape = BankShape(branch=16, ranks=(256, 64, 16, 0), layers=tuple(range(35)), width=512, dtype="bfloat16")
    assert [shape.record_bytes(level) for level in range(3)] == [27_525_120, 6_881_280, 1_720_320]  # the paper's 160M
    fast, slow = memory(1 << 30), Tier("card", 1e8, 0.01)
    placements = place(shape, [fast, Tier("disk", 1e9, 1e-4, 2 << 30), slow])
    assert [p.tier.name for p in placements] == ["memory", "disk", "card"]
    assert placements[2].seconds == pytest.approx(0.01 + 1_720_320 / 1e8)
    assert [p.tier.name for p in place(shape, [memory(0), slow])] == ["card"] * 3


def test_a_bank_that_is_not_whole_is_told(folder: Path, tmp_path: Path) -> None:
    refused("E310", Bank.open, tmp_path / "missing")
    (folder / "passages" / CLUSTERS).unlink()
    assert CLUSTERS in refused("E310", Bank.open, folder)


def test_damage_is_told(folder: Path) -> None:
    tree = folder / TREE
    whole = tree.read_bytes()
    tree.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("E402", Bank.open, folder)
    tree.write_bytes(whole)
    clusters = folder / "passages" / CLUSTERS
    clusters.write_bytes(clusters.read_bytes()[:-1] + b"\x07")
    Bank.open(folder)  # passages are not read when generating
    refused("E402", lambda: Bank.open(folder, verify=True))


def test_a_damaged_record_is_told_when_it_is_fetched(folder: Path) -> None:
    data = bytearray((folder / RECORDS).read_bytes())
    bank = Bank.open(folder)
    path = bank.retrieve(embeddings()[0])
    data[int(bank.records._entry(path.cluster)["offset"])] ^= 1
    (folder / RECORDS).write_bytes(data)
    refused("E402", Bank.open(folder).fetch, path)
    refused("E402", lambda: Bank.open(folder, verify=True))


def test_records_of_another_bank_are_refused(folder: Path) -> None:
    other = BankShape(branch=2, ranks=(4, 2), layers=(0, 1, 2), width=6)
    write_records(folder / RECORDS, other, ())
    refused("E310", Bank.open, folder)


def test_another_schema_or_width_is_refused(folder: Path) -> None:
    bank = Bank.open(folder)
    refused("E310", bank.retrieve, np.zeros(9))
    refused("E403", bank.retrieve, np.full(8, np.nan))
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    for key, value in (("schema", "memc.bank.folder/9"), ("branch", "two"), ("ranks", [4, 2, 1])):
        path.write_text(json.dumps({**data, key: value}))
        refused("E310", Bank.open, folder)
    path.write_text("{")
    refused("E310", Bank.open, folder)


def test_reading_a_bank_imports_no_torch() -> None:
    code = "import sys, memc.bank; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

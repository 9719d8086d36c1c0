"""The file of records: what is written comes back, and whatever is damaged is told by its code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from memc.bank.layout import BankShape, name, parse_cluster
from memc.bank.records import ALIGN, RecordFile, write_records
from memc.errors import MemcError
from tests.bank.tiny_bank import SHAPE, records


def refused(code: str, call: object, *args: object) -> str:
    with pytest.raises(MemcError) as caught:
        call(*args)  # type: ignore[operator]
    assert caught.value.code == code, caught.value
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_records(tmp_path / "records", SHAPE, records().items())
    return tmp_path / "records"


def test_records_come_back_bit_for_bit(path: Path) -> None:
    file = RecordFile(path)
    assert file.shape == SHAPE
    for cluster, record in records().items():
        assert file.trained(cluster)
        assert np.array_equal(file.read(cluster), record)


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    shape = replace(SHAPE, dtype="bfloat16")
    write_records(tmp_path / "records", shape, records().items())
    file = RecordFile(tmp_path / "records")
    for cluster, record in records().items():
        want = torch.from_numpy(record).bfloat16().float().numpy()
        assert np.array_equal(file.read(cluster), want)


def test_clusters_without_a_record_are_zero_and_the_file_is_small(tmp_path: Path) -> None:
    shape = BankShape(branch=4, ranks=(64, 0, 16), layers=(0,), width=32)
    write_records(tmp_path / "records", shape, [((1,), np.ones(shape.record_shape(0), np.float32))])
    file = RecordFile(tmp_path / "records")
    assert file.trained((1,)) and not file.trained((0,)) and not file.trained((1, 2)) and not file.trained((1, 2, 3))
    assert not file.read((1, 2, 3)).any() and file.read((1, 2, 3)).shape == shape.record_shape(2)
    assert (tmp_path / "records").stat().st_size <= shape.record_bytes(0) + 2 * ALIGN


def test_equal_records_give_equal_bytes_and_pages_are_aligned(path: Path, tmp_path: Path) -> None:
    write_records(tmp_path / "again", SHAPE, records().items())
    assert path.read_bytes() == (tmp_path / "again").read_bytes()
    assert all(int(entry["offset"]) % ALIGN == 0 for entry in RecordFile(path)._index)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("place", [0, 9, 20, 60, 200])
def test_every_damage_of_the_header_is_told(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(MemcError) as caught:
        RecordFile(path)
    assert caught.value.code in ("E310", "E402")


def test_a_damaged_record_is_told_and_the_others_read(path: Path) -> None:
    file = RecordFile(path)
    data = bytearray(path.read_bytes())
    data[int(file._entry((1, 0))["offset"]) + 7] ^= 1
    path.write_bytes(data)
    file = RecordFile(path)
    assert "1.0" in refused("E402", file.read, (1, 0))
    assert np.array_equal(file.read((0, 1)), records()[0, 1])


@pytest.mark.parametrize("kept", [0, 5, 40, 100, 5000, -1])
def test_a_file_that_is_cut_short_is_told(path: Path, kept: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:kept] if kept >= 0 else data[: 1 + max(int(e["offset"]) for e in RecordFile(path)._index)])
    with pytest.raises(MemcError) as caught:
        RecordFile(path)
    assert caught.value.code in ("E310", "E402")


def test_a_file_that_is_cut_short_while_it_is_open_is_told(path: Path) -> None:
    file = RecordFile(path)
    with path.open("r+b") as stream:
        stream.truncate(ALIGN)
    assert "cut short" in refused("E310", file.read, (1, 1))


def test_what_is_no_record_file_is_told(path: Path, tmp_path: Path) -> None:
    refused("E310", RecordFile, tmp_path / "missing")
    data = bytearray(path.read_bytes())
    data[8] = 9
    path.write_bytes(data)
    assert "version 9" in refused("E310", RecordFile, path)


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = records()[(0,)]
    bad[0, 0, 0, 0] = np.nan
    refused("E403", write_records, tmp_path / "records", SHAPE, [((0,), bad)])
    assert not (tmp_path / "records").exists()


def test_clusters_are_numbered_and_named() -> None:
    shape = BankShape(branch=3, ranks=(0, 0, 1), layers=(0,), width=1)
    for level in range(3):
        assert [shape.number(cluster) for cluster in shape.all_clusters(level)] == list(range(3 ** (level + 1)))
    assert name((0, 2, 1)) == "0.2.1" and parse_cluster("0.2.1", shape) == (0, 2, 1)
    for wrong in ("", "3", "0.", "0.0.0.0", "-1", "a"):
        refused("E200", parse_cluster, wrong, shape)

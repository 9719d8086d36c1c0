"""Tables of which a token reads a few rows: known to the manifest, and read row by row where memory is too small."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from memc import api, machine, runtime
from memc.artifact import Manifest, read_manifest
from memc.backends.onnx.runner import OnnxRunner
from memc.program_io import load_program
from tests.core.tiny import TinyConfig, tiny_program

NAME, SLOTS, ROW = "memc.memory_bank.values", 16384, 32


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of 2 MiB, as it was inserted."""
    folder = tmp_path_factory.mktemp("tables") / "out"
    pass_ = f"memory_bank:kind=pkm,slots={SLOTS},row={ROW},top=4,heads=2"
    api.convert(tiny_program(TinyConfig(vocab=64, layers=2)), folder, passes=[pass_], backend="onnx")
    return folder


def flags(folder: Path) -> list[str]:
    """Return what this process asks of the system for every part of the data file that it has mapped."""
    maps = Path("/proc/self/smaps").read_text()
    return re.findall(rf"{re.escape(str(folder.resolve()))}\S*\.data\n(?:.*\n)*?VmFlags: (.*)", maps)


def read(folder: Path, manifest: Manifest) -> np.ndarray:
    """Return the logits of some tokens."""
    runner = OnnxRunner(folder, manifest)
    tokens = np.arange(2, 40)[None]
    return runner.run(tokens, np.arange(tokens.shape[1])[None], runner.new_state(1))


def test_the_manifest_says_where_the_rows_lie(artifact: Path) -> None:
    (table,) = read_manifest(artifact).tables
    assert (table.name, table.shape, table.dtype) == (NAME, [SLOTS, ROW], "float32")
    found = np.fromfile(artifact / table.file, np.float32, SLOTS * ROW, offset=table.offset).reshape(SLOTS, ROW)
    wanted = dict(load_program(artifact / "program").module.named_parameters())[NAME].detach().numpy()
    assert wanted.any() and (found == wanted).all()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is mapped")
def test_a_table_larger_than_memory_is_read_row_by_row(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(2, 40))
    held = runtime.load(artifact)
    assert not any("rr" in found.split() for found in flags(artifact))
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    mapped = runtime.load(artifact)
    assert sum("rr" in found.split() for found in flags(artifact)) == 1
    assert (held.logits(tokens) == mapped.logits(tokens)).all()


def test_rows_of_another_place_show(artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As inserted the output projection is zeros, and only what is not finite comes through."""
    monkeypatch.setattr(machine, "memory_bytes", lambda: 1 << 20)
    manifest = read_manifest(artifact)
    (table,) = manifest.tables
    (tmp_path / "rows").write_bytes(np.full(SLOTS * ROW, np.nan, np.float32).tobytes())
    wrong = table.model_copy(update={"file": "rows", "offset": 0})
    broken = manifest.model_copy(update={"tables": [wrong]})
    for name in ("lowered", "memc.json"):
        (tmp_path / name).symlink_to(artifact / name)
    assert np.isfinite(read(artifact, manifest)).all() and np.isnan(read(tmp_path, broken)).all()

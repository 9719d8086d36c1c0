"""Tiles of products that are timed: which one is taken, that what is made of it is right, and that it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import op_programs as ops
import pytest
from tvm_support import lower

from memc import api
from memc.artifact import read_manifest
from memc.backend import LowerOptions
from memc.backends.tvm import TvmBackend, backend, tune
from memc.backends.tvm.isa import Isa, Tile, isa_of
from memc.backends.tvm.tiles import Product, Tiles, Tuned
from memc.conversion.again import lower_again
from memc.errors import MemcError
from memc.program import Program
from memc.target import get_target
from tests.backends.runs import compare
from tests.core.tiny import tiny_program

CPU = get_target("cpu")
ISA = isa_of(CPU)
SMALL = Product(32, 64, 64)
STEP, PROMPT = tune.ROWS


def prepared(times: dict[Tile, tuple[float, float]]) -> tune.Prepare:
    """Return what times a product in a tile by a table, a step and a prompt; tiles that are not in it take 1 s."""

    def prepare(product: Product, tile: Tile, isa: Isa) -> tune.Timed:
        return lambda rows: times.get(tile, (1.0, 1.0))[rows == PROMPT]

    return prepare


def chosen(times: dict[Tile, tuple[float, float]]) -> Tuned:
    return tune.choose(SMALL, ISA, tune.candidates(ISA.tile), prepared(times))


def test_the_fastest_tile_is_taken() -> None:
    first, second, *_ = tune.candidates(ISA.tile)
    found = chosen({first: (0.8, 1.0), second: (0.5, 1.02)})
    assert (found.columns, found.rows) == (second.columns, second.rows)
    assert found.gain == {STEP: 2.0, PROMPT: 0.98}


@pytest.mark.parametrize("times", [(0.99, 0.99), (0.5, 1.2), (1.2, 0.5)])
def test_a_tile_that_gains_little_or_loses_with_some_rows_is_not(times: tuple[float, float]) -> None:
    first, *_ = tune.candidates(ISA.tile)
    found = chosen({first: times})
    assert (found.columns, found.rows, found.gain) == (ISA.tile.columns, ISA.tile.rows, {STEP: 1.0, PROMPT: 1.0})


def test_a_tile_that_is_fast_once_is_not_taken() -> None:
    lucky, steady, *_ = tune.candidates(ISA.tile)
    ran = 0

    def prepare(product: Product, tile: Tile, isa: Isa) -> tune.Timed:
        def timed(rows: int) -> float:
            nonlocal ran
            ran += tile == lucky
            return 0.2 if tile == lucky and ran <= 2 * (tune.ROUNDS + 1) else 0.9 if tile == steady else 1.0

        return timed

    found = tune.choose(SMALL, ISA, [lucky, steady], prepare)
    assert (found.columns, found.rows) == (steady.columns, steady.rows)


@pytest.mark.parametrize("default", [Tile(16, 2), Tile(16, 4), Tile(32, 2), Tile(64, 4, dots=True)])
def test_candidates_differ_and_have_columns_that_vectors_are_made_of(default: Tile) -> None:
    found = tune.candidates(default)
    assert default not in found and len(set(found)) == len(found) >= 5
    assert all(tile.columns in (16, 32, 64, 128) and tile.dots == default.dots for tile in found)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_products_are_timed_as_they_are_stored(bits: int) -> None:
    timed = tune.compiled(Product(bits, 70, 64), ISA.tile, ISA)
    assert 0 < timed(1) < 1 and 0 < timed(3) < 1


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another number of columns win for every product, a different one by its size."""

    def prepare(product: Product, tile: Tile, isa: Isa) -> tune.Timed:
        wide = 16 if product.out > 40 else 32 if ISA.tile.columns != 32 else 128
        return lambda rows: 0.5 if tile.columns == wide and tile != isa.tile else 1.0

    monkeypatch.setattr(tune, "compiled", prepare)


def artifact(program: Program, folder: Path, options: LowerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower with options that the shared helper does not know."""
    real = backend.lower
    monkeypatch.setattr(backend, "lower", lambda *args: real(*args[:3], options))
    lower(program, folder, weights=options.weights)
    monkeypatch.setattr(backend, "lower", real)


@pytest.mark.usefixtures("tuned")
def test_what_is_made_in_other_tiles_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = ops.llama("attention", layers=1)
    artifact(program, tmp_path, LowerOptions("fp32", 24, 1, tune=100), monkeypatch)
    info = json.loads((tmp_path / "lowered/tvm/library.json").read_text())
    assert len(info["tuned"]) >= 3 and info["tuned_on"]
    assert len({one["columns"] for one in info["tuned"]}) == 2
    runner = TvmBackend().load(tmp_path, read_manifest(tmp_path), 1)
    assert compare(program, runner, [([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]], None), ([[5], [3]], None)]) < 1e-5


@pytest.mark.usefixtures("tuned")
def test_what_was_timed_is_kept_and_used_again_on_such_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, again = tmp_path / "source", tmp_path / "again"
    api.convert(tiny_program(), source, backend="tvm", passes=["window:window=8"], context=24, tune=100)
    forms = json.loads((source / "report/convert.json").read_text())["forms"]
    assert "times as fast with 1 rows" in forms["tuned"]
    monkeypatch.setattr(tune, "compiled", lambda *_: pytest.fail("timed again"))
    document = lower_again(source, again, target="cpu", backend="tvm")
    assert document.forms["tuned"] == forms["tuned"]
    held = [json.loads((out / "lowered/tvm/library.json").read_text())["tuned"] for out in (source, again)]
    assert held[0] == held[1]
    options = LowerOptions(tuned=source)
    assert [one.model_dump(mode="json") for one in backend.tuned(tiny_program(), ISA, options)] == held[0]
    monkeypatch.setattr(backend, "cpu_name", lambda: "another processor")
    assert backend.tuned(tiny_program(), ISA, options) == []


def test_where_there_is_nothing_to_time_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemcError, match="onnx backend has no forms of a product") as error:
        api.convert(tiny_program(), tmp_path / "out", passes=["window:window=8"], tune=4)
    assert error.value.code == "E200" and "--backend tvm" in error.value.next and not (tmp_path / "out").exists()
    for target in ("aarch64", "nvidia-sm90"):
        assert backend.refuses_tuning(get_target(target))
    assert backend.refuses_tuning(CPU) is None


def test_tiles_are_read_back() -> None:
    written = [Tuned(weights=kind, out=8, into=4, columns=16, rows=3, gain={1: 1.1}) for kind in ("fp32", "int4")]
    tiles = Tiles.of(ISA.tile, written)
    assert tiles.tile(Product(32, 8, 4)) == tiles.tile(Product(4, 8, 4)) == Tile(16, 3, ISA.tile.dots)
    assert tiles.tile(Product(8, 8, 4)) == ISA.tile

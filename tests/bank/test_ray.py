"""Building a bank on Ray: the same bytes as without, refusals that come back as they are, and how it is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from memc.bank.build import BankModel, BuildOptions, build_bank
from memc.bank.manifest import ENCODER
from memc.bank.tasks import BLOCK
from memc.bank.workers import RayWorkers, Workers
from memc.cli import main
from memc.errors import MemcError

pytestmark = pytest.mark.xdist_group("bank")  # they share what takes seconds to make


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield RayWorkers("local")
    ray.shutdown()


def refusing(number: int) -> int:
    if number == 3:
        raise MemcError("E205", "the text has no tokens", "passage 3", "give a word")
    return number * number


def squares() -> object:
    return refusing


def test_results_come_in_order_and_refusals_as_they_are(workers: RayWorkers) -> None:
    for each in (Workers(), workers):
        assert list(each.map(squares, range(0))) == []
        assert list(each.map(squares, range(4, 9))) == [16, 25, 36, 49, 64]
        with pytest.raises(MemcError) as refusal:
            list(each.map(squares, range(5)))
        assert refusal.value == MemcError("E205", "the text has no tokens", "passage 3", "give a word")


def test_a_bank_is_the_same_bytes(
    workers: RayWorkers,
    built: Path,
    tmp_path: Path,
    owner: BankModel,
    sources: list[str],
    options: BuildOptions,
) -> None:
    out = tmp_path / "bank"
    manifest = build_bank(owner, sources, out, options, workers=workers)
    assert manifest.passages > BLOCK, "more than one piece of embedding"
    names = sorted(p.relative_to(built) for p in built.rglob("*") if p.is_file() and ENCODER not in p.parts)
    assert names == sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file() and ENCODER not in p.parts)
    assert all((out / name).read_bytes() == (built / name).read_bytes() for name in names)


def test_without_ray_the_command_says_what_to_install(
    place: Path, tmp_path: Path, sources: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["bank", "build", "--model", str(place / "model"), "--data", sources[0], "-o", str(tmp_path / "bank")]
    assert main([*command, "--ray", "local"]) == 6
    told = capsys.readouterr().err
    assert "E602 ray is not installed" in told and "pip install 'memc[ray]'" in told
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.0.1:1", "Connection refused"), ("auto", "Could not find any running Ray instance")]
)
def test_a_cluster_that_does_not_answer_is_refused(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if address == "auto":
        error = ConnectionError(f"{said}.\nPlease specify one")
        monkeypatch.setattr(ray, "init", partial(_fail, error))
    with pytest.raises(MemcError) as refusal:
        RayWorkers(address)
    assert "E602 no Ray cluster answers: " in str(refusal.value) and said in str(refusal.value)
    assert f"[--ray {address}] Next: ray start --head" in str(refusal.value)


def _fail(error: Exception, *args: object, **options: object) -> None:
    raise error

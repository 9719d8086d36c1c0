"""Every test of the command line has a cache folder of its own, and no debugging."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from memc import plugins
from tests.core.runtime_fakes import CORPUS, byte_tokenizer, make_artifact


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("MEMC_DEBUG", raising=False)
    return folder


@pytest.fixture
def fake_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a backend that holds everything in memory."""
    point = EntryPoint("fake", "tests.core.runtime_fakes:FakeBackend", "memc.backends")
    known = plugins.registered

    def registered(group: str) -> dict[str, EntryPoint]:
        return {**known(group), **({"fake": point} if group == "memc.backends" else {})}

    monkeypatch.setattr(plugins, "registered", registered)


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(make_artifact(tmp_path / "out", tokenizer=byte_tokenizer()))


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(CORPUS))
    return str(tmp_path / "text.txt")

"""What takes seconds to make, made once: a model, an encoder that is converted, and a bank of four topics."""

from __future__ import annotations

from pathlib import Path

import pytest

from memc import api
from memc.bank.build import BankModel, BuildOptions, build_bank
from tests.bank.tiny_bank import write_encoder, write_model, write_texts


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold ``model``, ``sentence`` (the encoder as it is published), ``encoder`` (converted) and ``texts``."""
    folder = tmp_path_factory.mktemp("bank")
    write_model(folder / "model")
    write_texts(folder / "texts", 40)
    sentence = write_encoder(folder / "sentence")
    api.convert(sentence, folder / "encoder", recipe="dense", backend="eager")  # onnx takes ten times as long
    for name in ("modules.json", "sentence_bert_config.json"):
        (folder / "encoder" / name).write_bytes((sentence / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def owner(place: Path) -> BankModel:
    """Return the facts of the model."""
    return BankModel.of(str(place / "model"))


@pytest.fixture(scope="session")
def sources(place: Path) -> list[str]:
    """Return the files of text, one a topic."""
    return sorted(map(str, (place / "texts").glob("*.jsonl")))


@pytest.fixture(scope="session")
def options(place: Path) -> BuildOptions:
    """Return what the bank is built with."""
    return BuildOptions(ranks=(4, 2), branch=4, encoder=str(place / "encoder"), seed=7)


@pytest.fixture(scope="session")
def built(owner: BankModel, sources: list[str], options: BuildOptions, place: Path) -> Path:
    """Build an untrained bank."""
    build_bank(owner, sources, place / "bank", options)
    return place / "bank"

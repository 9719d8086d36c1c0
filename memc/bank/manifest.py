"""``bank.json``: what a bank is, whose it is, and the digest of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memc.artifact import sha256
from memc.bank.encoder import EncoderFacts
from memc.bank.layout import BankShape, Dtype
from memc.errors import MemcError
from memc.partial import partial_of, write_whole

MANIFEST, RECORDS, TREE, PASSAGES, ENCODER = "bank.json", "records.bank", "tree.safetensors", "passages", "encoder"
"""The names in a bank's folder."""

_SCHEMA: Literal["memc.bank.folder/1"] = "memc.bank.folder/1"


class BankManifest(BaseModel):
    """What a bank is. ``model`` and ``model_digest`` name the model that its blocks are for.

    ``files`` has the sha256 of every file but the records, which have digests of their own, and the encoder.
    """

    model_config = ConfigDict(extra="forbid")

    schema_: Literal["memc.bank.folder/1"] = Field(default=_SCHEMA, alias="schema")
    version: str
    model: str
    model_digest: str
    branch: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    width: int
    dtype: Dtype
    encoder: EncoderFacts
    passages: int
    passage_characters: int
    sources: list[str]
    seed: int
    files: dict[str, str] = Field(default_factory=dict)

    @property
    def shape(self) -> BankShape:
        """The sizes of the bank."""
        return BankShape(self.branch, self.ranks, self.layers, self.width, self.dtype)


def seal(folder: Path, manifest: BankManifest) -> None:
    """Write ``bank.json`` with the digests of the other files."""
    named = [folder / TREE, *sorted((folder / PASSAGES).iterdir())]
    files = {str(path.relative_to(folder)): sha256(path) for path in named}
    text = manifest.model_copy(update={"files": files}).model_dump_json(by_alias=True, indent=1)
    write_whole(folder / MANIFEST, text + "\n")


def read_manifest(folder: Path, *, verify: bool = False) -> BankManifest:
    """Read and check ``bank.json``, and the digest of the tree; with ``verify`` that of every file it names.

    Raises ``MemcError``: E310 when the folder is no bank, is incomplete or has another schema; E402 when a digest
    differs.
    """
    path = folder / MANIFEST
    if not path.is_file():
        partial = partial_of(folder)
        hint = (
            "run the same memc bank build again: it resumes"
            if partial.is_dir()
            else "memc bank build --model MODEL --data FILE -o BANK"
        )
        raise MemcError("E310", "no bank here", str(folder), hint)
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != _SCHEMA:
            raise MemcError("E310", f"bank has schema {data.get('schema')!r}, this memc reads {_SCHEMA!r}", str(path))
        manifest = BankManifest.model_validate(data)
    except (ValueError, ValidationError, AttributeError) as error:
        raise MemcError("E310", f"bank.json does not parse: {str(error).splitlines()[0]}", str(path)) from error
    for name, digest in manifest.files.items():
        if not (folder / name).is_file():
            raise MemcError("E310", f"bank lacks the file {name}", str(folder), "build it again")
        if (verify or name == TREE) and sha256(folder / name) != digest:
            raise MemcError("E402", f"digest of {name} does not match bank.json", str(folder), "build it again")
    return manifest


def require_model(manifest: BankManifest, digest: str, where: str) -> None:
    """Raise ``MemcError`` E310 when the model of a digest is not the one that a bank is for."""
    if digest != manifest.model_digest:
        hint = f"give {manifest.model}, or build a bank for this model"
        raise MemcError("E310", f"the bank is for another model, {manifest.model}", where, hint)

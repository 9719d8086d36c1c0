"""From a sentence encoder as it is published to one that a bank carries: converted once, run without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memc.artifact import MANIFEST, read_manifest
from memc.bank.encoder import EncoderFacts, Pooling
from memc.conversion.folder import link_folder
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.frontend.hub import download, is_hub_id
from memc.progress import Progress

LIMIT = 512
"""Tokens read at once by an encoder that does not say."""

FILES = ("modules.json", "sentence_bert_config.json", "*_Pooling/config.json")
"""Where sentence-transformers says how a vector comes of a text; kept beside the converted encoder."""

_LAYERS = ("Transformer", "Pooling", "Normalize")
_POOLINGS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def prepare_encoder(source: str, out: Path, progress: Progress) -> EncoderFacts:
    """Convert an encoder (hub id, local folder, or an artifact of one) into ``out``, and say what it is.

    What ``out`` holds already is kept. Raises ``MemcError`` as ``memc.convert``, and E208 for a model that is no
    encoder of text, or one with layers after its pooling that are not carried.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir() and is_hub_id(source):
        folder = download(source, remote_code=False, weights=True, beside=FILES)
    said = sentence_facts(folder)
    if not (out / MANIFEST).is_file():
        _convert(folder, source, out, progress)
    manifest = read_manifest(out)
    width = manifest.outputs[0].shape[-1]
    taken = [port.name for port in manifest.inputs if port.role == "other"]
    if manifest.decoder or taken or not isinstance(width, int):
        raise _no_encoder(manifest.family, source, taken)
    limits = [limit for limit in (said.limit, manifest.capacity) if limit]
    return EncoderFacts(
        source=manifest.source,
        digest=manifest.source_digest,
        width=width,
        limit=min(limits, default=LIMIT),
        pooling=said.pooling,
        normalize=said.normalize,
    )


@dataclass(frozen=True)
class SentenceFacts:
    """How sentence-transformers makes a vector of a text; ``limit`` in tokens, None where it does not say."""

    pooling: Pooling = "mean"
    normalize: bool = True
    limit: int | None = None


def sentence_facts(folder: Path) -> SentenceFacts:
    """Return what a folder of sentence-transformers says of its pooling; of any other folder the usual.

    Raises ``MemcError``: E302 a file that does not parse, E208 a pooling or a layer that is not known.
    """
    modules = _json(folder / "modules.json")
    if modules is None:
        return SentenceFacts()
    paths = {str(module.get("type", "")).rpartition(".")[2]: str(module.get("path", "")) for module in modules}
    if unknown := [kind for kind in paths if kind not in _LAYERS]:
        hint = f"give an encoder of {', '.join(_LAYERS)} alone"
        raise MemcError("E208", f"encoder has a layer {unknown[0]!r}", str(folder), hint)
    limit = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    config = (_json(folder / paths["Pooling"] / "config.json") or {}) if "Pooling" in paths else {}
    modes = [key for key, value in config.items() if key.startswith("pooling_mode") and value is True]
    if config and (len(modes) != 1 or modes[0] not in _POOLINGS):
        said = ", ".join(modes) or "nothing known"
        raise MemcError("E208", f"encoder pools by {said}", str(folder), "give one that pools by mean, cls or max")
    return SentenceFacts(_POOLINGS[modes[0]] if modes else "mean", "Normalize" in paths, limit)


def _convert(folder: Path, source: str, out: Path, progress: Progress) -> None:
    if (folder / MANIFEST).is_file():
        link_folder(folder, out)
        return
    from memc import api

    program = capture_source(folder, weights=False).program
    taken = [spec.name for spec in program.inputs if spec.role == "other"]
    if program.model.decoder or taken:  # told before the minutes of a conversion
        raise _no_encoder(program.model.family, source, taken)
    api.convert(folder, out, recipe="dense", progress=progress)
    for pattern in FILES:
        for path in folder.glob(pattern):
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())


def _no_encoder(family: str, source: str, taken: list[str]) -> MemcError:
    reason = f"{family} is no encoder of text" + (f": it takes {', '.join(taken)} too" if taken else "")
    return MemcError("E208", reason, source, "give a sentence encoder like sentence-transformers/all-MiniLM-L6-v2")


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MemcError("E302", f"file does not parse: {error}", str(path), "fetch the encoder again") from error

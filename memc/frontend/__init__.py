"""Capture: a Hugging Face folder or hub id, GGUF, ``.pt2``, a factory or any ``nn.Module`` becomes a raw program."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from memc.arguments import short
from memc.errors import MemcError
from memc.frontend.factory import PREFIX, capture_factory
from memc.frontend.gguf_model import capture_gguf
from memc.frontend.hub import download, is_hub_id
from memc.frontend.huggingface import capture_folder
from memc.frontend.module import capture
from memc.frontend.pt2 import capture_pt2
from memc.frontend.source import Captured

__all__ = ["Captured", "capture", "capture_source"]


def capture_source(
    model: str | Path, *, remote_code: bool = False, weights: bool = True, float32_below: float = 0
) -> Captured:
    """Capture whatever ``model`` names.

    ``model`` is a local Hugging Face folder, a hub id ``organisation/name[@revision]``, a ``.gguf`` or ``.pt2`` file,
    or ``python:package.module:factory``. Folders, hub ids and GGUF give fake parameters and, with ``weights``, the
    checkpoint that ``memc.weights.materialize`` loads into them; without, no weight is read. The others hold their
    own values.

    A folder or hub id in half precision whose parameters take fewer bytes in float32 than ``float32_below`` is captured
    in float32, with the numbers that it computes for itself: a Gemma scales its embeddings by one that it rounds to the
    type it is in.

    Raises ``MemcError``: E301 not found, E302 unreadable or corrupt, E303 configuration and weights disagree, E304
    pickled or in need of ``remote_code``, E305 cannot be captured, E308 tokenizer cannot be converted, E200 what is
    neither text nor a path.
    """
    if not isinstance(model, str | Path):
        hint = "give what the command line takes; memc.capture makes a program of a module, which convert takes"
        raise MemcError("E200", f"model is {short(model)}", next=hint)
    text = str(model)
    path = Path(text).expanduser()
    folder_of = partial(
        capture_folder, source=text, remote_code=remote_code, weights=weights, float32_below=float32_below
    )
    if text.startswith(PREFIX):
        return capture_factory(text)
    if path.is_dir():
        return _named(folder_of(path), path)
    if path.is_file():
        return _named(_capture_file(path, text, weights=weights), path)
    if is_hub_id(text) and path.suffix not in (".gguf", ".pt2"):
        return folder_of(download(text, remote_code=remote_code, weights=weights))
    hint = "give a folder, a .gguf or .pt2 file, a hub id organisation/name, or python:package.module:factory"
    raise MemcError("E301", f"no model at {text!r}", next=hint)


def _named(captured: Captured, path: Path) -> Captured:
    """Call the model by its own name: an artifact does not depend on, or tell, where its source lay."""
    program = captured.program
    model = replace(program.model, source=path.resolve().name)
    return replace(captured, program=replace(program, model=model))


def _capture_file(path: Path, text: str, *, weights: bool) -> Captured:
    match path.suffix:
        case ".gguf":
            return capture_gguf(path, text, weights=weights)
        case ".pt2":
            return capture_pt2(path, text)
        case ".bin" | ".pt" | ".pth" | ".pkl" | ".ckpt":
            hint = "convert it to safetensors where you trust it"
            raise MemcError("E304", "checkpoint is pickled, which can run code", text, hint)
        case _:
            hint = "give the folder that has config.json, a .gguf file or a .pt2 file"
            raise MemcError("E301", f"a {path.suffix or 'nameless'} file is no model", text, hint)

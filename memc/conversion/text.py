"""The verification text of one conversion: the recipe's data, else sampled, and kept in the report either way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from memc.data import TokenStream, holds_ids, read_tokens, tokenize
from memc.errors import MemcError
from memc.frontend.source import side_files
from memc.partial import write_whole
from memc.prepare import HALF
from memc.program import Program
from memc.progress import Progress
from memc.recipe import Recipe
from memc.runtime.text import Text
from memc.verify import VerificationText, sample_text, token_limit
from memc.verify.text import SEQUENCES
from memc.weights import program_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROW = 384
"""Tokens of a row: long enough to go past the windows in use."""

TOKENS = 1536
"""Tokens of the data that are used."""


def verification_text(
    recipe: Recipe, original: Program, folder: Path, apart: VerificationText | None = None
) -> VerificationText:
    """Return the text of ``report/text.json`` if there is one, else make it and write it there.

    ``apart`` is what is held out of the data where a pass looks at them. ``folder`` holds the tokenizer. Sampled
    sequences are joined into one row, so that windows shorter than it are gone past. Raises ``MemcError``: E207 for
    data that is no text or too short, E308 when it has no tokenizer for text.
    """
    path = folder / "report" / "text.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        return VerificationText(torch.tensor(kept["tokens"]), kept["origin"])
    if apart is not None:
        return keep_text(apart, folder)
    return keep_text(_from_data(recipe, original, folder) if recipe.data else _sampled(recipe, original), folder)


def text_beside(model: str | Path | Program) -> list[Path]:
    """Return the files in a model's own folder, where it is one: they can be looked at before its graph is captured."""
    if isinstance(model, str | Path) and (folder := Path(model).expanduser()).is_dir():
        return side_files(folder)
    return []


def require_text_files(files: Sequence[Path]) -> None:
    """Look at the files of a model that tokenize text and say how to go on with it, before they become an artifact's.

    Raises ``MemcError`` E302 that names one which cannot be read.
    """
    for folder in dict.fromkeys(path.parent for path in files):
        try:
            Text(folder).require_readable()
        except MemcError as error:
            hint = "get the file again, correct it, or leave it out: the model itself does not need it"
            raise MemcError("E302", error.message, error.where, hint) from error


def keep_text(text: VerificationText, folder: Path) -> VerificationText:
    """Write a text to ``report/text.json`` and return it."""
    facts = {"origin": text.origin, "tokens": text.tokens.tolist()}
    write_whole(folder / "report" / "text.json", json.dumps(facts) + "\n")
    return text


def read_streams(recipe: Recipe, original: Program, folder: Path, progress: Progress) -> list[TokenStream]:
    """Read a recipe's data through the cache of tokens, one stream a source.

    Raises ``MemcError``: E207 for data that cannot be used or hold a token that the model does not know, E308 when
    ``folder`` has no tokenizer for text.
    """
    tokenizer = tokenizer_for(recipe.data, folder)
    streams = [read_tokens(source, tokenizer, progress=progress) for source in recipe.data]
    vocab = token_limit(original)
    for stream in streams:
        if len(stream) and int(stream.ids.max()) >= vocab:
            hint = f"check the tokenizer, or the ids: the model takes those below {vocab}"
            raise MemcError("E207", "data hold a token that the model does not know", stream.name, hint)
    return streams


def tokenizer_for(data: Sequence[str], folder: Path) -> Tokenizer | None:
    """Return the tokenizer of ``folder``, None where all data are token ids. Raises ``MemcError`` E308: it has none."""
    return None if all(map(holds_ids, data)) else Text(folder).tokenizer


def _sampled(recipe: Recipe, original: Program) -> VerificationText:
    # Where parameters are converted for each run, a token costs: half of the sequences still go past a window of 256.
    halved = SEQUENCES // 2 if program_dtype(original) in HALF else SEQUENCES
    text = sample_text(original, recipe.seed, sequences=halved)
    row = _row(original, text.tokens.numel())
    return VerificationText(text.tokens.reshape(-1)[: text.tokens.numel() // row * row].reshape(-1, row), text.origin)


def _from_data(recipe: Recipe, original: Program, folder: Path) -> VerificationText:
    ids = torch.from_numpy(tokenize(recipe.data, tokenizer_for(recipe.data, folder), limit=TOKENS))
    vocab = token_limit(original)
    if ids.numel() < 16 or int(ids.max()) >= vocab:
        reason = "fewer than 16 tokens" if ids.numel() < 16 else "a token that the model does not know"
        raise MemcError("E207", f"verification data has {reason}", ", ".join(recipe.data), "give another --data FILE")
    row = _row(original, min(ROW, ids.numel()))
    tokens = ids[: ids.numel() // row * row].reshape(-1, row)
    return VerificationText(tokens, f"{tokens.numel()} tokens of {', '.join(recipe.data)}")


def _row(original: Program, length: int) -> int:
    limit = original.model.longest
    return min(length, limit) if limit is not None else length

"""The sequences of a conversion that a pass may look at: the recipe's data but for what verifies, else sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from memc.conversion.text import read_streams
from memc.data import Corpus
from memc.pipeline import Calibration
from memc.program import Program
from memc.progress import Progress
from memc.recipe import Recipe, Train
from memc.tensor_file import read_tensors, write_tensors
from memc.verify import VerificationText, sample_text
from memc.verify.inputs import positions_of

SAMPLED = 64
"""Most sequences that are sampled: a token costs more than looking at it does."""

PIECE = 512
"""Tokens that are sampled in one go: a longer sequence is joined from several.

A step costs as much as reading the model, another sequence beside the first ones hardly anything.
"""

HELD_OUT = 8
"""Most held-out sequences that verify what was calibrated on the rest."""


@dataclass
class CalibrationText:
    """Sequences for passes, the same whenever they are asked for.

    ``folder`` holds the tokenizer and keeps what was sampled. Reading data raises ``MemcError`` E207 for data that
    cannot be used or are too few, and E308 when there is no tokenizer for text.
    """

    recipe: Recipe
    original: Program
    folder: Path
    progress: Progress
    _made: dict[tuple[int, int], Calibration] = field(default_factory=dict)

    def __call__(self, count: int, length: int) -> Calibration:
        """Return at most ``count`` sequences of ``length`` tokens, or of as many as the model has positions for."""
        length = min(length, self.original.model.longest or length)
        if (count, length) not in self._made:
            make = self._from_data if self.recipe.data else self._sampled
            self._made[count, length] = make(count, length)
        return self._made[count, length]

    def held_out(self) -> VerificationText | None:
        """Return what of the data no pass is shown, None where there are no data."""
        if not self.recipe.data:
            return None
        rows = self._corpus.guard(self._block, HELD_OUT).tokens
        return VerificationText(torch.from_numpy(rows), f"{len(rows)} held-out sequences of {self._corpus.where}")

    @property
    def _block(self) -> int:
        length = (self.recipe.train or Train()).length
        return min(length, self.original.model.longest or length)

    @cached_property
    def _corpus(self) -> Corpus:
        streams = read_streams(self.recipe, self.original, self.folder, self.progress)
        return Corpus(streams, guard=(self.recipe.train or Train()).guard, block=self._block)

    def _from_data(self, count: int, length: int) -> Calibration:
        with self.progress.step(f"calibration text, {count} sequences of {length} tokens at most"):
            sequences = self._corpus.sequences(length, self.recipe.seed)
            tokens, positions = sequences.batch(0, min(count, len(sequences)))
        return Calibration(torch.from_numpy(tokens), torch.from_numpy(positions), self._corpus.where)

    def _sampled(self, count: int, length: int) -> Calibration:
        """Sample from the original, from another seed than the verification text is."""
        path = self.folder / "report" / f"calibration-{count}x{length}.safetensors"
        if not path.is_file():
            rows, pieces = min(count, SAMPLED), -(-length // PIECE)
            sizes = {"sequences": rows * pieces, "length": -(-length // pieces)}
            title = f"sample {rows} sequences of {length} tokens from the original"
            with self.progress.step(title, sizes["length"] - 1) as advance:
                text = sample_text(self.original, self.recipe.seed + 1, **sizes, advance=advance)
            write_tensors(path, {"tokens": text.tokens.reshape(rows, -1)[:, :length].contiguous()})
        tokens = read_tensors(path)["tokens"]
        return Calibration(tokens, positions_of(tokens), "sampled from the original")

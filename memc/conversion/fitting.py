"""A recipe that says only what the result has to keep, turned into one that says which passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from memc.conversion.calibration import CalibrationText
from memc.conversion.folder import resume_key
from memc.conversion.request import Request, Steps
from memc.data import source_digest
from memc.errors import MemcError
from memc.fit.driver import Fitting, fit
from memc.fit.limits import CONTEXT, Limits
from memc.fit.menu import Kept
from memc.frontend import Captured
from memc.machine import cache_folder
from memc.pipeline import Calibration
from memc.program import Program
from memc.recipe import Recipe, Verify
from memc.report.files import FitFacts
from memc.weights import materialize

LENGTHS = (2048, 1024, 512, 256, 128)
"""Tokens of a sequence, the longest that the data have enough of; of what is sampled, which costs more, the second."""

ROWS = 3
"""Sequences: one that layers are measured on, and two that the choice is held against."""


def fit_recipe(
    request: Request, limits: Limits, captured: Captured, program: Program, steps: Steps
) -> tuple[Recipe, FitFacts]:
    """Choose the passes that keep the limits and return the recipe that names them, and what was found.

    What was measured is kept in the cache, so that other limits for the same model and text cost little. Raises
    ``MemcError`` as :func:`memc.fit.driver.fit`, and E207 or E308 for data that cannot be used.
    """
    recipe = request.recipe
    with steps.step("fit", "fit to the limits"):
        original = materialize(program, captured.weights) if captured.weights is not None else program
        if not original.model.decoder:
            reason = "limits are about decoding, and the model is no decoder"
            raise MemcError("E208", reason, original.model.source, "leave out --fit")
        data = [source_digest(source) for source in recipe.data]
        with _place(resume_key("fit", original.model.digest, str(recipe.seed), *data), captured) as place:
            text = _text(CalibrationText(recipe, original, place, steps.progress), bool(recipe.data))
            longest = original.model.longest
            context = recipe.context or min(CONTEXT, longest or CONTEXT)
            fitting = Fitting(
                original,
                limits,
                request.target,
                request.weights,
                request.threads,
                context,
                text.tokens[:1],
                text.tokens[1:] if len(text.tokens) > 1 else text.tokens,
            )
            with torch.no_grad():
                passes, facts = fit(fitting, Kept(place / f"distances-{text.tokens.shape[1]}.json"), steps.progress)
    sources = (limits.budgets(), recipe.verify.budgets)
    budgets = {str(metric): most for source in sources for metric, most in source.items()}
    changes: dict[str, Any] = {
        "passes": [one.spec for one in passes],
        "fit": None,
        "tokens": 0 if recipe.data else None,
        "verify": Verify.model_validate({"budgets": budgets}),
    }
    return recipe.model_copy(update=changes), facts


def _text(sequences: CalibrationText, has_data: bool) -> Calibration:
    """Return the longest sequences of which there are enough."""
    longest = sequences.original.model.longest
    lengths = [length for length in LENGTHS[not has_data :] if longest is None or length <= longest] or LENGTHS[-1:]
    for length in lengths[:-1]:
        try:
            found = sequences(ROWS, length)
        except MemcError as error:
            if error.code != "E207":
                raise
            continue
        if len(found.tokens) == ROWS:
            return found
    return sequences(ROWS, lengths[-1])


@contextmanager
def _place(key: str, captured: Captured) -> Iterator[Path]:
    """Give the folder of what is kept of a model and a text, with its tokenizer; a passing one if it cannot be made."""
    with TemporaryDirectory() as passing:
        place = cache_folder() / "fit" / key[:16]
        try:
            (place / "report").mkdir(parents=True, exist_ok=True)
        except OSError:
            place = Path(passing)
            (place / "report").mkdir()
        for path in captured.tokenizer_files:
            shutil.copyfile(path, place / path.name)
        yield place

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
from memc.fit.limits import CONTEXT, Limits, parse_limits
from memc.fit.menu import Kept
from memc.frontend import Captured
from memc.machine import cache_folder
from memc.pipeline import Calibration
from memc.program import ModelInfo, Program
from memc.progress import Progress
from memc.quantise import BITS
from memc.recipe import Recipe, Verify
from memc.report.files import FitFacts
from memc.verify.inputs import positions_of
from memc.weights import materialize

LENGTHS = (2048, 1024, 512, 256, 128)
"""Tokens of a sequence, the longest that the data have enough of; of what is sampled, which costs more, the second."""

MEASURED, SHORTER = 2, 2
"""Sequences that blocks are measured on, of so many times fewer tokens; the second where the first leaves it open."""

CHECKED = 2
"""Sequences that the choice is held against."""

SHOWN = 6
"""Sequences that passes may look at: of 1,024 tokens, what a layer of 1,536 channels takes to be cut."""


def fit_recipe(
    request: Request, limits: Limits, captured: Captured, program: Program, steps: Steps
) -> tuple[Recipe, FitFacts]:
    """Choose what keeps the limits and return the recipe that names it, and what was found.

    What was measured is kept in the cache, so that other limits for the same model and text cost little. Raises
    ``MemcError`` as :func:`memc.fit.driver.fit`, E206 for a limit at a context that the model has no positions for, and
    E207 or E308 for data that cannot be used.
    """
    recipe = request.recipe
    with steps.step("fit", "fit to the limits"):
        original = materialize(program, captured.weights) if captured.weights is not None else program
        if not original.model.decoder:
            reason = "limits are about decoding, and the model is no decoder"
            raise MemcError("E208", reason, original.model.source, "leave out --fit")
        limits, context = _within(limits, recipe, original.model, steps.progress)
        data = [source_digest(source) for source in recipe.data]
        with _place(resume_key("fit", original.model.digest, str(recipe.seed), *data), captured) as place:
            text = _text(CalibrationText(recipe, original, place, steps.progress), bool(recipe.data))
            fitting = _fitting(request, limits, original, context, text)
            key = "x".join(map(str, fitting.measured.shape))
            with torch.no_grad():
                found = fit(fitting, Kept(place / f"distances-{key}.json"), steps.progress)
    sources = (limits.budgets(), recipe.verify.budgets)
    budgets = {str(metric): most for source in sources for metric, most in source.items()}
    changes: dict[str, Any] = {
        "passes": [one.spec for one in found.passes],
        "fit": None,
        "tokens": 0 if recipe.data else None,
        "weights": found.weights,
        "verify": Verify.model_validate({"budgets": budgets}),
    }
    return recipe.model_copy(update=changes), found.facts


def _within(limits: Limits, recipe: Recipe, model: ModelInfo, progress: Progress) -> tuple[Limits, int]:
    """Put limits that name no context where the model can be, and refuse those that it cannot reach.

    Returns them, and the context at which speed counts where none is named. A context past what the model was trained
    on, which it can run, is said.
    """
    context = recipe.context or min(CONTEXT, model.longest or CONTEXT)
    assert recipe.fit is not None
    limits = parse_limits(recipe.fit, context)
    for limit in limits.costs:
        if model.longest is not None and limit.context > model.longest:
            reason = f"the limit is at {limit.context} tokens, past the model's {model.longest} positions"
            raise MemcError("E206", reason, f"--fit {limit.text}", f"{limit.what}@{model.longest}, or less")
        if model.max_positions is not None and limit.context > model.max_positions:
            progress.note(f"beyond_trained: {limit.text} is past the {model.max_positions} positions of the training")
    return limits, context


def _fitting(request: Request, limits: Limits, original: Program, context: int, text: Calibration) -> Fitting:
    """Share the sequences out: to measure on, to hold the choice against, and for passes to look at."""
    measured, checked, shown = text.tokens.split([1, CHECKED, len(text.tokens) - 1 - CHECKED])
    length = max(text.tokens.shape[1] // SHORTER, 2)
    rows = measured.reshape(-1)[: MEASURED * length].reshape(-1, length)

    def calibrate(count: int, length: int) -> Calibration:
        length = min(length, shown.numel())
        found = shown.reshape(-1)[: shown.numel() // length * length].reshape(-1, length)[:count]
        return Calibration(found, positions_of(found), text.origin)

    types = _types(request)
    target, threads = request.target, request.threads
    return Fitting(original, limits, target, types, threads, context, rows, checked, calibrate)


def _types(request: Request) -> tuple[str, ...]:
    """Return the types of weights that may be chosen: all that the backend takes, unless one was asked for."""
    if request.recipe.weights is not None:
        return (request.weights,)
    backend = request.backend
    taken = (kind for kind in BITS if kind in backend.weights)
    return request.weights, *(kind for kind in taken if not backend.refuses_weights(kind, request.target))


def _text(sequences: CalibrationText, has_data: bool) -> Calibration:
    """Return the longest sequences of which there are enough."""
    longest, rows = sequences.original.model.longest, 1 + CHECKED + SHOWN
    lengths = [length for length in LENGTHS[not has_data :] if longest is None or length <= longest] or LENGTHS[-1:]
    for length in lengths:
        try:
            found = sequences(rows, length)
        except MemcError as error:
            if error.code != "E207" or length == lengths[-1]:
                raise
            continue
        if len(found.tokens) == rows:
            return found
    reason = f"limits are fitted on {rows} sequences of {lengths[-1]} tokens, and there are {len(found.tokens)}"
    raise MemcError("E207", reason, found.origin, "give more --data, or none")


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

"""What Python callers use, one function for each command: ``memc.inspect``, ``analyse`` and ``memc.convert``."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from memc.analysis.methods import parse_analysis
from memc.arguments import MOST_THREADS, path_of, text_of, texts, whole_number, whole_numbers
from memc.conversion.driver import convert_model
from memc.conversion.facts import block_facts, model_facts, near_miss_facts
from memc.conversion.request import Request
from memc.conversion.text import read_streams
from memc.cost import predict
from memc.data import Corpus
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.plugins import load_plugin
from memc.program import Program
from memc.progress import Progress, Silent
from memc.raising import raise_program
from memc.recipe import Recipe, load_recipe
from memc.report.facts import CONTEXTS
from memc.report.models import AnalysisDocument, ConvertDocument, InspectDocument
from memc.target import get_target
from memc.verify.relations import finite
from memc.weights import materialize


def inspect(model: str | Path, *, remote_code: bool = False, contexts: Sequence[int] = CONTEXTS) -> InspectDocument:
    """Say what is in a model: its blocks, masks and heads, and what a token costs at some ``contexts`` (in tokens).

    Reads the configuration alone where there is one. Raises ``MemcError`` E301 to E305 as capture does, and E200 for
    contexts that are no whole numbers.
    """
    wanted = whole_numbers("contexts", contexts)
    captured = capture_source(model, remote_code=remote_code, weights=False)
    raised = raise_program(captured.program)
    cost = predict(raised.program, get_target("cpu"), wanted)
    return InspectDocument(
        model=model_facts(raised.program, remote_code=remote_code),
        blocks=[block_facts(block, raised.program) for block in raised.blocks],
        near_misses=near_miss_facts(raised.near_misses),
        state_bytes=cost.state_bytes,
        bytes_read_per_token=cost.bytes_read_per_token,
        flops_per_token=cost.flops_per_token,
        flops_by_context=cost.flops_by_context,
    )


def analyse(
    model: str | Path,
    method: str,
    *,
    data: str | Path | Sequence[str | Path] = (),
    remote_code: bool = False,
    progress: Progress | None = None,
) -> AnalysisDocument:
    """Say which heads and channels of a model make something up: ``bigram`` or ``heads``, with options as passes have.

    The model is computed with in float32, on ``data`` as a recipe names them (several, or one), else on text that it
    makes itself. Raises ``MemcError``: E202 and E203 for a method that is not right, E301 to E306 as capture does, E207
    and E308 for data, E200 for arguments of another type, E403 for weights that are not finite, and what
    :meth:`memc.analysis.methods.Analysis.run` does.
    """
    chosen, progress = parse_analysis(text_of("method", method)), progress or Silent()
    sources = texts("data", data)
    captured = capture_source(model, remote_code=remote_code, float32_below=math.inf)
    if captured.weights is None:
        raise MemcError("E301", "there are no weights to analyse", str(model))
    with progress.step("load weights"):
        program = materialize(raise_program(captured.program).program, captured.weights, torch.float32)
    finite(program)
    tokens = None
    if sources:
        with tempfile.TemporaryDirectory() as folder:
            for path in captured.tokenizer_files:
                shutil.copyfile(path, Path(folder) / path.name)
            recipe = Recipe(recipe=1, data=sources)
            count, length = chosen.text
            corpus = Corpus(read_streams(recipe, program, Path(folder), progress), guard=0.0)
            sequences = corpus.sequences(min(length, program.model.longest or length))
            tokens = torch.from_numpy(sequences.batch(0, min(count, len(sequences)))[0])
    return chosen.run(program, tokens, progress)


def convert(
    model: str | Path | Program,
    out: str | Path,
    *,
    target: str = "cpu",
    recipe: str | Path | Recipe | None = None,
    passes: str | Sequence[str] = (),
    backend: str | None = None,
    weights: str | None = None,
    context: int | None = None,
    data: str | Path | Sequence[str | Path] = (),
    tokens: int | None = None,
    fit: str | None = None,
    dry_run: bool = False,
    fresh: bool = False,
    force: bool = False,
    seed: int | None = None,
    threads: int | None = None,
    remote_code: bool = False,
    contexts: Sequence[int] = CONTEXTS,
    tune: int = 0,
    progress: Progress | None = None,
) -> ConvertDocument:
    """Convert a model into the artifact ``out`` and return the document that says what was done.

    ``model`` is what the command line takes, or a program that ``memc.capture`` made.
    ``recipe`` is a name, a file or a ``Recipe``; None is ``long-context``, or no recipe where ``passes`` or limits to
    ``fit`` are given. The other options replace what the recipe says; ``passes`` come after its own. One pass, and
    one source of ``data``, needs no list. ``tune`` is how many other tiles are timed for each kind of product (backend
    ``tvm``). Raises ``MemcError`` as ``memc.conversion.driver.convert_model``, E201 to E203 for a recipe, pass,
    target or backend that is not right, and E200 for an argument of another type or out of range.
    """
    specs, sources = texts("passes", passes), texts("data", data)
    if recipe is None:
        recipe = Recipe(recipe=1) if specs or fit else "long-context"
    chosen = (
        recipe
        if isinstance(recipe, Recipe)
        else load_recipe(recipe if isinstance(recipe, str) else str(path_of("recipe", recipe)))
    )
    resolved = chosen.resolved(
        passes=specs,
        data=sources,
        tokens=tokens,
        weights=weights or chosen.weights or (None if fit or chosen.fit else "fp32"),  # limits choose it too
        context=context,
        seed=seed,
        fit=fit,
    )
    hardware = get_target(text_of("target", target))
    request = Request(
        model=model,
        out=path_of("out", out),
        recipe=resolved,
        target=hardware,
        backend=load_plugin("memc.backends", text_of("backend", backend or hardware.backend))(),
        dry_run=dry_run,
        fresh=fresh,
        force=force,
        threads=None if threads is None else whole_number("threads", threads, 1, MOST_THREADS),
        remote_code=remote_code,
        contexts=tuple(whole_numbers("contexts", contexts)),
        tune=whole_number("tune", tune, 0),
    )
    return convert_model(request, progress)

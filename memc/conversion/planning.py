"""Everything of a conversion that needs no weights: capture, raising, the plan, and whether the machine can do it."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

import torch

from memc import __version__, machine
from memc.conversion.facts import (
    block_facts,
    model_facts,
    near_miss_facts,
    op_counts,
    planned_facts,
)
from memc.conversion.folder import RECIPE, OutFolder
from memc.conversion.lowering import chosen_rows, past_training
from memc.conversion.pipeline import plan_all
from memc.conversion.request import Request, Steps, source_name
from memc.conversion.training import TOKENS
from memc.cost import SMALL, WORKING, curve, predict, prefill_ms
from memc.errors import MemcError
from memc.frontend import Captured, capture_source
from memc.frontend.recast import recast
from memc.pipeline import Pass
from memc.prepare import HALF, forms_of
from memc.program import Program
from memc.raising import Raised, raise_program
from memc.recipe import Train
from memc.report.files import CaptureReport, RaiseReport
from memc.report.models import ConvertDocument
from memc.target import get_target
from memc.verify import (
    require_well_formed,
)
from memc.weights import program_dtype

CONFIG = "config.json"

LOOKED_AT, TRAINED_ON = 4, 5
"""What a token that a pass calibrates on takes, and one that is trained on, in times of a token of a prompt.

Of SmolLM2-135M on one core a prompt took 4 ms a token, pruning with the refit 17, adapters behind it 19."""


def capture_and_raise(request: Request, steps: Steps) -> tuple[Captured, Program, Raised]:
    """Capture and raise the model: what was found, the raw program, and the raised one, well formed.

    Raises ``MemcError`` as capture does, and E306 when it cannot be raised.
    """
    with steps.step("capture", f"capture {source_name(request.model)}"):
        captured = _capture(request)
        program = captured.program
        if program_dtype(program) in HALF and _small(program):
            program = recast(program, torch.float32)
    with steps.step("raise", "raise"):
        raised = raise_program(program)
        require_raised(raised)
        require_well_formed(raised.program, "after raising")
    return captured, program, raised


def _capture(request: Request) -> Captured:
    if isinstance(request.model, Program):
        return Captured(request.model, None, {})
    return capture_source(
        request.model,
        remote_code=request.remote_code,
        weights=not request.dry_run or request.recipe.fit is not None,
        float32_below=SMALL,
    )


def require_raised(raised: Raised) -> None:
    """Raise ``MemcError`` E306 for a decoder that does not run on tokens and positions alone, saying why."""
    program = raised.program
    roles = [spec.role for spec in program.inputs]
    if program.model.decoder and roles != ["tokens", "positions"]:
        names = ", ".join(spec.name for spec in program.inputs)
        reason = f"conversion takes decoders of tokens at positions, this one takes {names}"
        raise MemcError("E306", reason, program.model.source, "memc inspect MODEL shows its blocks")
    if program.model.decoder and not program.raised:
        near = raised.near_misses[0] if raised.near_misses else None
        reason = f"{near.nearest}: {near.reason}" if near else "an op mixes tokens in an unknown way"
        where = f"{near.path or near.node} {near.source}".strip() if near else program.model.source
        raise MemcError("E306", reason, where, "memc inspect MODEL --why")


def make_plan(
    request: Request, steps: Steps, passes: list[Pass], captured: Captured, raised: Raised, training: bool
) -> ConvertDocument:
    """Plan every pass on what the ones before leave, and predict what the result costs.

    Raises ``MemcError`` E601 where the backend could not lower it, before anything is rewritten or trained.
    """
    train = request.recipe.train or Train()
    with steps.step("plan", "plan"):
        merges = training and train.onto == "original"
        planned, reports = plan_all(passes, raised.program, request.target, undecided=training, merges=merges)
        forms_of(planned, request.target, request.backend.name, request.backend.supports)
        settings: dict[str, Any] = {"weights": request.weights, "threads": request.threads}
        sides = {"original": raised.program, "converted": planned}
        costs = [predict(program, request.target, request.contexts, **settings) for program in sides.values()]
        seconds = (costs[1].seconds or 0.0) + _learning_seconds(request, raised.program, passes, training)
        costs[1] = costs[1].model_copy(update={"seconds": seconds})
        curves = {name: curve(program, request.target, **settings) for name, program in sides.items()}
    return ConvertDocument(
        out=str(request.out),
        target=request.target.name,
        backend=request.backend.name,
        weights=request.weights,
        context=request.recipe.context,
        dry_run=request.dry_run,
        model=model_facts(raised.program, remote_code=request.remote_code),
        passes=[planned_facts(report, train if training else None) for report in reports],
        original=costs[0],
        predicted=costs[1],
        curves=curves,
        untrained=any(report.untrained for report in reports),
        versions={"memc": __version__, "torch": torch.__version__, "python": platform.python_version()},
        seed=request.recipe.seed,
        threads=request.threads,
        machine=machine.describe(),
        command=_again(request),
        remote_code=request.remote_code,
        warnings=_warnings(request, raised.program, planned),
        next=[f"memc convert {source_name(request.model)} -o {request.out} (without --dry-run)"]
        if request.dry_run
        else [],
    )


def _learning_seconds(request: Request, program: Program, passes: Sequence[Pass], training: bool) -> float:
    """Estimate what passes that calibrate and the training take here, with as much text as is asked for."""
    length = min(512, program.model.longest or 512)
    prompt = prefill_ms(program, [length], get_target("cpu"), threads=request.threads)
    looked_at = sum(count * tokens for count, tokens in filter(None, (pass_.calibrates() for pass_ in passes)))
    trained_on = (TOKENS if request.recipe.tokens is None else request.recipe.tokens) if training else 0
    runs = LOOKED_AT * looked_at + TRAINED_ON * trained_on
    return runs * prompt[length] / 1000 / length if prompt else 0.0


def _again(request: Request) -> str:
    """Return the command that makes the same from the recipe that is kept; empty for a program of Python's."""
    if isinstance(request.model, Program):
        return ""
    out = str(request.out)
    words = ["memc", "convert", str(request.model), "-o", f"{out}-again", "--recipe", f"{out}/{RECIPE}"]
    words += ["--target", request.target.name, "--backend", request.backend.name]
    words += [] if request.threads is None else ["--threads", str(request.threads)]
    words += ["--tune", str(request.tune)] if request.tune else []
    return shlex.join(words + (["--remote-code"] if request.remote_code else []))


def _warnings(request: Request, program: Program, planned: Program) -> list[str]:
    rows = chosen_rows(planned, request.weights)
    return [*past_training(request.recipe.context, planned), *([rows] if rows else [])]


def write_plan(
    folder: OutFolder, recipe: str, captured: Captured, raised: Raised, document: ConvertDocument, steps: Steps
) -> None:
    """Write what is known before any weight is read: recipe, tokenizer, reports of capture, raising and plan."""
    assert document.model is not None
    (folder.partial / RECIPE).write_text(recipe)
    for path in captured.tokenizer_files:
        shutil.copyfile(path, folder.partial / path.name)
    if captured.config and not (folder.partial / CONFIG).exists():
        (folder.partial / CONFIG).write_text(json.dumps(captured.config, indent=2) + "\n")
    blocks = [block_facts(block, raised.program) for block in raised.blocks]
    folder.write_report(
        "00-capture.json",
        CaptureReport(model=document.model, blocks=blocks, warnings=document.warnings, timing=steps.timing("capture")),
    )
    folder.write_report(
        "01-raise.json",
        RaiseReport(
            blocks=blocks,
            near_misses=near_miss_facts(raised.near_misses),
            ops=op_counts(raised.program),
            timing=steps.timing("raise"),
        ),
    )
    folder.write_report("convert.json", document)


def _bytes(program: Program) -> int:
    return sum(value.numel() * value.element_size() for value in program.module.parameters())


def _small(program: Program) -> bool:
    return 4 * program.parameter_count < SMALL


def require_memory(request: Request, captured: Captured, program: Program, weight_bytes: int) -> None:
    """Refuse what cannot be converted and checked in this machine's memory.

    Parameters that are read from their file as they are used need none of their own; what the backend loads does.
    """
    memory = machine.memory_bytes()
    if memory is None:
        return
    weights, dtype = captured.weights, program_dtype(program)
    converted = dtype != program_dtype(captured.program)
    held = _bytes(program) if weights is None or converted else weights.held_bytes(dtype)
    largest = max((value.numel() for value in program.module.parameters()), default=0)
    rest = held + WORKING * 4 * largest
    if rest + weight_bytes <= memory:
        return
    bytes_of = {kind: _weight_bytes(program, request, kind) for kind in request.backend.taken_weights(request.target)}
    fitting = [kind for kind, size in bytes_of.items() if rest + size <= memory]
    reason = (
        f"checking the result takes {weight_bytes / 1e9:.1f} GB of memory for its {request.weights} weights and"
        f" {rest / 1e9:.1f} GB beside them, this machine has {memory / 1e9:.1f} GB"
    )
    hint = f"--weights {min(fitting, key=bytes_of.__getitem__)}" if fitting else "convert on a machine with more memory"
    raise MemcError("E501", reason, program.model.source, hint)


def _weight_bytes(program: Program, request: Request, kind: str) -> int:
    return predict(program, request.target, (), weights=kind).weight_bytes

"""``memc edit``: facts taught to the side copy of an artifact, which is then lowered again."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memc.artifact import Manifest, read_manifest
from memc.backend import Backend, LowerOptions, Runner
from memc.conversion.again import PROGRAM, copy_artifact, lower_copy, lowering_of, require_out, undone
from memc.conversion.folder import folder_bytes
from memc.conversion.outcome import next_commands
from memc.conversion.text import tokenizer_for
from memc.data import read_lines, read_tokens
from memc.doctor import require_backend
from memc.errors import MemcError
from memc.plugins import load_kernels, load_plugin
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.progress import Progress, Silent
from memc.report.facts import CheckFacts
from memc.report.models import EditDocument, EditFacts
from memc.runtime.text import Text
from memc.target import get_target
from memc.train.editing import Edit, Edited, EditSettings, answers, edit_program, follows
from memc.verify import token_limit

LENGTH, FEWEST, MOST, EACH = 24, 200, 1000, 10
"""Tokens of a sequence of unrelated text, the fewest and the most that are shown, and how many to an edit between."""

HELD_OUT = 200
"""Sequences that are not shown."""


@dataclass(frozen=True)
class Wanted:
    """An edit as it was written, its first prompt alone, and as token ids."""

    prompt: str
    target: str
    edit: Edit


def edit_artifact(
    source: Path,
    out: Path,
    edits: Path,
    data: Sequence[str],
    *,
    settings: EditSettings | None = None,
    threads: int | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> EditDocument:
    """Make the artifact ``out`` from ``source``, whose program has a side copy, with ``edits`` made one after another.

    ``edits`` is a file of JSON lines with a ``prompt``, or a list of them, and a ``target`` each. ``data``, one source
    at least, are text that is to stay as it is. What was lowered answers for the edits where this machine runs it, else
    the program. Raises ``MemcError``: E309 the source is no artifact, E402 a file of it has changed, E208 it has no
    side copy, E207 edits or data that cannot be used, E205 an empty prompt or target, E308 no tokenizer, E403 a loss
    that is not finite, and as :func:`memc.conversion.again.lower_again`.
    """
    began, progress = time.perf_counter(), progress or Silent()
    manifest = read_manifest(source, verify=True, unread="lowered")
    folder = require_out(source, out, edits, *data, force=force)
    target = get_target(manifest.target)
    backend: Backend = load_plugin("memc.backends", require_backend(target, manifest.backend))()
    load_kernels()
    program = load_program(source / PROGRAM)
    wanted = read_edits(edits, source, token_limit(program))
    count = min(MOST, max(FEWEST, EACH * len(wanted)))
    shown, held_out = _unrelated(source, data, program, progress, count)
    # Edited before anything is copied: what is refused leaves nothing behind.
    done = edit_program(program, [each.edit for each in wanted], shown, progress, settings, seed)
    copy_artifact(source, folder, "edit")
    with undone(folder):
        save_program(done.program, folder.partial / PROGRAM)
        document = _document(source, out, manifest, done, kept=_kept(program, done.program, held_out), rows=held_out)

        def measured(runner: Runner | None) -> list[CheckFacts]:
            document.edits = _facts(wanted, done, runner)
            return _checks(document, "what was lowered" if runner is not None else "the program in torch")

        options = LowerOptions(manifest.weights, manifest.capacity, threads, tuned=source)
        lowered = lower_copy(lowering_of(document), folder, done.program, backend, target, options, progress, measured)
    document = document.model_copy(
        update={
            "checks": lowered.checks,
            "warnings": _warnings(document, done, (settings or EditSettings()).keep),
            "disk_bytes": folder_bytes(folder.partial),
            "seconds": time.perf_counter() - began,
            "next": next_commands(out, done.program, folder.partial, runs=backend.runs_here(target)),
        }
    )
    folder.write_report("edit.json", document)
    folder.finish()
    return document


def read_edits(path: Path, folder: Path, limit: int) -> list[Wanted]:
    """Read edits from JSON lines, cut into tokens by the tokenizer of ``folder``; ids are below ``limit``.

    Raises ``MemcError``: E207 for a file or a line that cannot be used, E205 for an empty prompt or target, E308.
    """
    text = Text(folder)
    found = [_edit(line, where, text, limit) for line, where in read_lines(path)]
    if not found:
        raise MemcError("E207", "there is no edit in the file", str(path), _EXAMPLE)
    return found


_EXAMPLE = 'write a line like {"prompt": "The capital of France is", "target": " Lyon"} for each'
"""A prompt may be a list of wordings too."""


def _edit(line: str, where: str, text: Text, limit: int) -> Wanted:
    try:
        record = json.loads(line)
        prompt, target = record["prompt"], record["target"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MemcError("E207", "line is no edit", where, _EXAMPLE) from error
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not all(isinstance(one, str) for one in (*prompts, target)):
        raise MemcError("E207", "prompt and target are text", where, _EXAMPLE)
    if not prompts or not all((*prompts, target)):
        raise MemcError("E205", "an edit has a prompt and a target, and neither is empty", where, _EXAMPLE)
    first, *others = [tuple(text.encode(one)) for one in prompts]
    edit = Edit(first, tuple(text.encode(target, special=False)), tuple(others))
    if max(token for ids in (*edit.prompts, edit.target) for token in ids) >= limit:
        raise MemcError("E207", "the tokenizer gives a token that the model does not know", where)
    return Wanted(prompts[0], target, edit)


def _unrelated(
    source: Path, data: Sequence[str], program: Program, progress: Progress, count: int
) -> tuple[Tensor, Tensor]:
    """Return sequences ``[N,T]`` of text that is to stay, ``count`` to show and others to hold out."""
    tokenizer = tokenizer_for(data, source)
    streams = [read_tokens(one, tokenizer, progress=progress) for one in data]
    each = -(-(count + HELD_OUT) // len(streams)) * LENGTH
    pieces = [torch.from_numpy(np.asarray(stream.ids[:each], np.int64)) for stream in streams]
    length = min(LENGTH, program.model.longest or LENGTH)
    rows = torch.cat([piece[: len(piece) // length * length].view(-1, length) for piece in pieces])
    where = ", ".join(data)
    if len(rows) < 2:
        reason = f"unrelated text of less than {2 * length} tokens"
        raise MemcError("E207", reason, where, "give more text, of every kind that is to stay")
    if int(rows.max()) >= token_limit(program):
        raise MemcError("E207", "data hold a token that the model does not know", where)
    every = 1 + max(1, count // HELD_OUT)
    apart = torch.arange(len(rows)) % every == every - 1
    return rows[~apart][:count], rows[apart][:HELD_OUT]


@torch.no_grad()
def _kept(before: Program, after: Program, rows: Tensor) -> float:
    """Return the share of sequences ``[N,T]`` whose logits are the same bits."""
    same = sum(int((before.run(part) == after.run(part)).flatten(1).all(1).sum()) for part in rows.split(16))
    return same / len(rows)


def _document(source: Path, out: Path, manifest: Manifest, done: Edited, *, kept: float, rows: Tensor) -> EditDocument:
    return EditDocument(
        source=str(source),
        out=str(out),
        target=manifest.target,
        backend=manifest.backend,
        weights=manifest.weights,
        edits=[],
        sequences=len(rows),
        kept=kept,
        threshold=done.threshold,
        unrelated=done.unrelated,
        disk_bytes=0,
        seconds=0.0,
    )


def _facts(wanted: Sequence[Wanted], done: Edited, runner: Runner | None) -> list[EditFacts]:
    followed = partial(follows, done.program) if runner is None else partial(answers, partial(_logits, runner))
    return [
        EditFacts(
            prompt=each.prompt,
            target=each.target,
            wordings=len(each.edit.prompts),
            followed=followed(each.edit),
            steps=steps,
            difference=difference,
        )
        for each, steps, difference in zip(wanted, done.steps, done.differences, strict=True)
    ]


def _logits(runner: Runner, ids: list[int]) -> NDArray[np.float32]:
    """Return the logits ``[T,V]`` of what was lowered for a sequence."""
    tokens = np.array([ids], np.int64)
    logits: NDArray[np.float32] = runner.run(tokens, np.arange(tokens.shape[1])[None], runner.new_state(1))[0]
    return logits


def _checks(document: EditDocument, by: str) -> list[CheckFacts]:
    count = f"{len(document.edits)} edits, by {by}"
    rows = f"{document.sequences} sequences of unrelated text, none shown while editing"
    return [
        CheckFacts(name="edits_followed", value=document.followed, passed=True, detail=count),
        CheckFacts(name="unrelated_kept", value=document.kept, passed=True, detail=f"bit for bit, {rows}"),
    ]


def _warnings(document: EditDocument, done: Edited, keep: float) -> list[str]:
    found = []
    if missed := sum(not edit.followed for edit in document.edits):
        found.append(
            f"{missed} of {len(document.edits)} edits are not followed; more --steps, or a longer prompt, may do"
        )
    if not done.clear:
        found.append(
            "no threshold separates every edit from the unrelated text: more --data of its kind, fewer edits, or"
            " a lower --keep"
        )
    elif document.kept < keep:
        found.append(
            f"{1 - document.kept:.0%} of unrelated sequences have changed; more --data of that kind narrows it"
        )
    return found

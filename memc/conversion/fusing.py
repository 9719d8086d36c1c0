"""``memc bank fuse``: one block of a bank made part of an artifact, which then fetches nothing."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from memc.artifact import read_manifest
from memc.backend import Backend, LowerOptions
from memc.bank import Bank
from memc.bank.fuse import Fused, fuse
from memc.bank.layout import Cluster, name
from memc.bank.session import require_bank
from memc.bank.tree import TreePath
from memc.conversion.again import PROGRAM, copy_artifact, lower_copy, lowering_of, require_out, undone
from memc.conversion.facts import check_facts
from memc.conversion.folder import folder_bytes
from memc.conversion.outcome import NOTHING_KEPT, next_commands, require_passed
from memc.doctor import require_backend
from memc.errors import MemcError
from memc.plugins import load_kernels, load_plugin
from memc.program import Program
from memc.program_io import load_program, save_program
from memc.progress import Progress, Silent
from memc.report.models.banks import BankFuseDocument
from memc.target import get_target
from memc.verify import CheckResult, inputs_of, sample_text, take

TOLERANCE, NARROW_TOLERANCE = 1e-4, 2e-2
"""Largest difference of logits over the largest logit; the second where the program has weights of 16 bits."""


def fuse_artifact(
    source: Path,
    out: Path,
    bank: Bank,
    path: TreePath,
    *,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BankFuseDocument:
    """Make the artifact ``out`` from ``source`` with the block of ``path`` in it; ``out`` is whole or not there.

    The program is checked against the one that fetches, and what was lowered against the program. Raises
    ``MemcError``: E200 nothing of the path is trained, E208 and E310 as :func:`require_bank`, E309 the source is no
    artifact, E402 a file of it or a record has changed, E401 a check fails, and as
    :func:`memc.conversion.again.lower_again`.
    """
    began, progress = time.perf_counter(), progress or Silent()
    manifest = read_manifest(source, verify=True, unread="lowered")
    require_bank(manifest, source, bank)
    used = bank.used(path)
    if not used:
        where = name(path.near) if path.near else "nothing near"
        raise MemcError("E200", "the bank has no trained block for that", where, f"memc bank inspect {bank.folder}")
    folder = require_out(source, out, force=force)
    target = get_target(manifest.target)
    backend: Backend = load_plugin("memc.backends", require_backend(target, manifest.backend))()
    load_kernels()
    program = load_program(source / PROGRAM)
    blocks = {each: torch.from_numpy(block) for each, block in bank.inputs([path]).items()}
    with progress.step("fuse the block"):
        fused = fuse(program, blocks)
        checks = [_check(program, fused.program, blocks)]
        require_passed(checks, NOTHING_KEPT)
    copy_artifact(source, folder, "fuse")
    with undone(folder):
        save_program(fused.program, folder.partial / PROGRAM)
        document = _document(source, out, manifest.target, manifest.backend, manifest.weights, fused, used, bank)
        options = LowerOptions(manifest.weights, manifest.capacity, threads, tuned=source)
        facts = [check_facts(check) for check in checks]
        lowered = lower_copy(
            lowering_of(document), folder, fused.program, backend, target, options, progress, lambda _: facts
        )
    document = document.model_copy(
        update={
            "checks": lowered.checks,
            "disk_bytes": folder_bytes(folder.partial),
            "seconds": time.perf_counter() - began,
            "next": next_commands(out, fused.program, folder.partial, runs=backend.runs_here(target)),
        }
    )
    folder.write_report("fuse.json", document)
    folder.finish()
    return document


def chosen_path(bank: Bank, *, cluster: Cluster | None, text: str | None) -> TreePath:
    """Return the path of a cluster, that of a text, or with neither the generic block's."""
    if text is not None:
        return bank.retrieve(text)
    if cluster is None:
        bank.generic = True
        return TreePath((), (), 0)
    return TreePath(cluster, (0.0,) * len(cluster), len(cluster))


@torch.no_grad()
def _check(before: Program, after: Program, blocks: dict[str, torch.Tensor]) -> CheckResult:
    """Compare what two programs say of the same tokens, one with the blocks fetched."""
    tokens = take(sample_text(before, 0), 2, 33)
    given = zip(before.inputs, inputs_of(before, tokens), strict=True)
    fetched = [blocks[spec.name].expand(len(tokens), -1, -1, -1) if spec.name in blocks else v for spec, v in given]
    expected = before(*fetched, *before.new_state(len(tokens)))[0].double()
    found = after.run(tokens).double()
    value = float((found - expected).abs().max() / expected.abs().max())
    narrow = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in before.module.parameters())
    budget = NARROW_TOLERANCE if narrow else TOLERANCE
    detail = "difference from the logits with the block fetched, over the largest"
    return CheckResult("fused_logits", value, budget, None, value <= budget, detail)


def _document(
    source: Path, out: Path, target: str, backend: str, weights: str, fused: Fused, used: list[Cluster], bank: Bank
) -> BankFuseDocument:
    shape = bank.shape
    return BankFuseDocument(
        source=str(source),
        out=str(out),
        bank=str(bank.folder),
        used=[name(cluster) for cluster in used],
        target=target,
        backend=backend,
        weights=weights,
        wider=list(fused.wider),
        beside=list(fused.beside),
        parameters=3 * shape.units * shape.width * len(shape.layers),
        disk_bytes=0,
        seconds=0.0,
    )

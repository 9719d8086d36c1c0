"""``memc export``: a converted model as an ordinary Hugging Face folder, where transformers has a model like it."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from memc.artifact import read_manifest
from memc.conversion.facts import check_facts
from memc.conversion.folder import OutFolder, folder_bytes, require_space, resume_key
from memc.conversion.lowering import TOLERANCE
from memc.conversion.outcome import NOTHING_KEPT, require_passed
from memc.conversion.planning import CONFIG
from memc.dialect import arguments, op_spec
from memc.errors import MemcError
from memc.frontend.configure import HINT, Fitted, fit_config, renumbered
from memc.frontend.graph import first_names
from memc.frontend.huggingface import load_config, trace_model
from memc.frontend.source import side_files
from memc.plugins import load_kernels
from memc.program import Program, named_tensors, retie
from memc.program_io import load_program
from memc.progress import Progress, Silent
from memc.raising import raise_program
from memc.report.models import ExportDocument
from memc.verify import CheckResult, noise_floor, sample_text, take, whole
from memc.weights import program_dtype

NOT_COPIED = (CONFIG, "README.md")
"""Files of the source that say what the exported model is not."""


def export(source: Path, out: Path, *, force: bool = False, progress: Progress | None = None) -> ExportDocument:
    """Write the program of the artifact ``source`` as a folder that ``from_pretrained`` loads, whole or not at all.

    Raises ``MemcError``: E309 the source is no artifact, E402 a file of it has changed, E208 it comes from no Hugging
    Face model or :func:`export_program` refuses, E204 ``out`` is in the way, E401 as there, E502 too little disk.
    """
    began = time.perf_counter()
    read_manifest(source, verify=True, unread="lowered")
    if not (source / CONFIG).is_file():
        reason = "artifact has no configuration of transformers: its source was no Hugging Face or GGUF model"
        raise MemcError("E208", reason, str(source), HINT)
    load_kernels()
    folder = OutFolder(out)
    folder.refuse_existing("", {}, force=force, sources=[source])
    require_space(out, 2 * folder_bytes(source / "program"))
    program, config = load_program(source / "program"), load_config(source, remote_code=False)
    folder.open(resume_key("export", str(source)), fresh=True)
    try:
        fitted, checks = export_program(program, config, folder.partial, progress or Silent())
        for path in side_files(source):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder.partial / path.name)
    except MemcError:
        shutil.rmtree(folder.partial)
        raise
    shutil.rmtree(folder.partial / "report")  # its mark as a folder of ours
    document = ExportDocument(
        source=str(source),
        out=str(out),
        changed={name: list(values) for name, values in fitted.changed.items()},
        parameters=sum(value.numel() for value in fitted.module.parameters()),
        checks=[check_facts(check) for check in checks],
        disk_bytes=folder_bytes(folder.partial),
        seconds=time.perf_counter() - began,
        next=[f"memc inspect {shlex.quote(str(out))}"],
    )
    folder.finish()
    return document


def export_program(program: Program, config: Any, folder: Path, progress: Progress) -> tuple[Fitted, list[CheckResult]]:
    """Write a program as a model of transformers into ``folder``, and check it.

    The configuration is the source model's, with as few fields changed as the tensors ask for. Its model has to have
    the program's dialect ops, and once transformers has loaded it from the folder its logits. Raises ``MemcError`` E208
    where transformers has no such model, E401 where what was written does not load whole or computes something else.
    """
    stored = _stored(program)
    names, layers = renumbered([name for name, _ in stored])
    tensors = {names[name]: value for name, value in stored}
    with progress.step("find the configuration"):
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        made = any(name.endswith(".bias") and not program.provenance[name].source for name, _ in stored)
        hint = f"prune:bias=false adds no biases; {HINT}" if made else HINT
        fitted = fit_config(config, shapes, layers, program_dtype(program), partial(_difference, program), hint)
    with progress.step("write"):
        _write(fitted.module, tensors, folder)
    with progress.step("verify what was written"):
        return fitted, _verify(folder, program)


def _stored(program: Program) -> list[tuple[str, Tensor]]:
    """Return what a checkpoint of the program holds: every parameter, and no buffer that is computed."""
    buffers = {name for name, _ in program.module.named_buffers(remove_duplicate=False)}
    return [
        (name, value.detach())
        for name, value in named_tensors(program.module)
        if name not in buffers or program.provenance.get(name)
    ]


def _write(module: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    first = first_names(module)
    given = {first[name]: value for name, value in tensors.items()}
    values = dict[str, Tensor]()
    for name, like in module.state_dict(keep_vars=True).items():
        value = given.setdefault(first[name], torch.zeros(like.shape, dtype=like.dtype))
        given[first[name]] = values[name] = value if value.dtype == like.dtype else value.to(like.dtype)
    retie(module, values)
    with _without_bars():
        module.save_pretrained(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the progress bars of transformers out of the steps that are shown."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def _verify(folder: Path, program: Program) -> list[CheckResult]:
    text = sample_text(program, 0)
    tokens = take(text, 2, 13)
    floor = noise_floor(program, tokens)
    loaded = _load(folder)
    found = loaded(input_ids=tokens).logits
    value = float((found.float() - whole(program, tokens).float()).abs().max())
    budget = max(TOLERANCE, 10 * floor)
    check = CheckResult("exported_logits", value, budget, floor, value <= budget, "through from_pretrained")
    require_passed([check], NOTHING_KEPT)
    return [check]


def _load(folder: Path) -> nn.Module:
    """Load a folder as a user would; raises ``MemcError`` E401 where a tensor of it is missing or is not taken.

    In the type that it is in, with the numbers that the model rounds to that, and then to compute in float32.
    """
    from transformers import AutoModelForCausalLM

    with _without_bars():
        module, about = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    left = [f"{kind} {sorted(names)[0]}" for kind, names in about.items() if names and kind != "error_msgs"]
    if left:
        raise MemcError("E401", f"from_pretrained does not take it whole: {left[0]}", str(folder), "please report it")
    loaded: nn.Module = module.float().eval()
    return loaded


def _difference(program: Program, module: nn.Module) -> str:
    """Say in what the dialect ops of a module are not a program's, in order; empty for nothing."""
    try:
        theirs = _ops(raise_program(trace_model(module, program.model)).program)
    except MemcError as error:
        return error.message
    ours = _ops(program)
    for (name, values), (its_name, its_values) in zip(ours, theirs, strict=False):
        if name != its_name:
            return f"{name} where it has {its_name}"
        for key, value in values.items():
            if its_values.get(key) != value:
                return f"{name} of {key} {value} where it has {its_values.get(key)}"
    return "" if len(ours) == len(theirs) else f"{len(ours)} ops where it has {len(theirs)}"


def _ops(program: Program) -> list[tuple[str, dict[str, Any]]]:
    """Return the dialect ops of a program in order, with the fixed sizes of their tensors and their other arguments."""
    found = []
    for node in program.module.graph.nodes:
        spec = op_spec(node.target) if node.op == "call_function" else None
        if spec is not None:
            bound = arguments(node)
            found.append((spec.name, {key: _fixed(value) for key, value in bound.items()}))
    return found


def _fixed(value: Any) -> Any:
    """Return the sizes of a node's tensor that are numbers, or what is no node as it is."""
    if not isinstance(value, Node):
        return value
    return tuple(size for size in value.meta["val"].shape if isinstance(size, int))

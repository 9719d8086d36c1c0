"""The bundle: kernels compiled ahead of time for one GPU, and what is known of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.fx import GraphModule

from memc import machine
from memc.backends.triton.compiler import JOB, Binary, Job
from memc.backends.triton.variants import Variant, variants
from memc.errors import MemcError
from memc.kernels.launch import Gpu, Tile
from memc.kernels.tiles import Asked, tiles_of
from memc.program import Program
from memc.target import Target

INFO = "kernels.json"
SCHEMA = "memc.kernels/1"


class Bundle(BaseModel):
    """``kernels.json``: the binaries for one target, and with which Triton they were made."""

    model_config = ConfigDict(extra="forbid")

    schema_: str = SCHEMA
    target: str
    triton: str
    binaries: list[Binary]
    tiles: dict[str, dict[str, Tile]] = Field(default_factory=dict)
    """How kernels are cut where it is not as their host code says, by kernel and shape."""


def platform_of(target: Target) -> tuple[str, int | str]:
    """Return a target's platform and architecture in Triton's words."""
    if target.instruction_set.startswith("sm_"):
        return "cuda", int(target.instruction_set.removeprefix("sm_"))
    return "hip", target.instruction_set


def fit(program: Program, module: GraphModule, target: Target, gpu: Gpu, folder: Path) -> Bundle:
    """Compile what a prepared module launches into ``folder``; where a kernel spills, cut narrower.

    What was settled goes with the bundle, since host code has to cut alike. Raises ``MemcError`` as :func:`build`, E601
    for a kernel that no tile keeps from spilling.
    """
    tiles, tried = Asked(tiles_of(gpu.name)), dict[tuple[str, str], Iterator[Tile]]()
    done: dict[str, Binary] = {}
    while True:
        needed = variants(program, module, gpu, tiles)
        done |= compiled([item.variant for key, item in needed.items() if key not in done], target, folder)
        bad = {item.tile: done[key] for key, item in needed.items() if _refusal(done[key], gpu)}
        for tile, binary in bad.items():
            default = tiles.asked.get(tile)
            options = tried.setdefault(tile, narrower(default) if default is not None else iter(()))
            tiles.set[tile] = next(options, None) or _refuse(binary, gpu, target)
        if not bad:
            break
    for key in done.keys() - needed.keys():
        for name in (done[key].file, f"{key}.ttir"):
            (folder / name).unlink()
    return _write([done[key] for key in sorted(needed)], target, tiles, folder)


def narrower(tile: Tile) -> Iterator[Tile]:
    """Return tiles that take fewer registers or less memory, those nearest first."""
    if tile.stages > 1:
        yield replace(tile, stages=1)
    for warps in sorted({2, 4, 8} - {tile.warps}, key=lambda n: (abs(n - tile.warps), -n)):
        yield replace(tile, warps=warps)
    for name, size in tile.sizes.items():
        if size >= 32:
            for warps in (4, 8):
                yield replace(tile, sizes={**tile.sizes, name: size // 2}, warps=warps, stages=1)


def build(wanted: Sequence[Variant], target: Target, gpu: Gpu, folder: Path, *, spills: int = 0) -> Bundle:
    """Compile variants as they are cut into ``folder``.

    Raises ``MemcError`` E602 where Triton's compiler ends early, E601 for a kernel that spills more than ``spills``
    (see ``Binary``) or needs more shared memory than the GPU has: it would run, many times slower than planned, or not
    at all.
    """
    done = compiled(wanted, target, folder)
    for binary in done.values():
        if _refusal(binary, gpu, spills):
            _refuse(binary, gpu, target)
    return _write([done[key] for key in sorted(done)], target, Asked(), folder)


def compiled(wanted: Sequence[Variant], target: Target, folder: Path) -> dict[str, Binary]:
    """Compile into ``folder`` in processes of their own, as many as there are cores; returns binaries by key."""
    folder.mkdir(parents=True, exist_ok=True)
    platform, architecture = platform_of(target)
    shards = [list(wanted[start :: machine.cores()]) for start in range(min(machine.cores(), len(wanted)))]
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for number, shard in enumerate(shards):
            place = Path(scratch) / str(number)
            place.mkdir()
            job = Job(platform=platform, architecture=architecture, variants=shard)
            (place / JOB).write_text(job.model_dump_json())
            running.append((place, _start(place)))
        binaries = [binary for place, process in running for binary in _finish(place, process, target, folder)]
    return {binary.variant.key: binary for binary in binaries}


def _write(binaries: list[Binary], target: Target, tiles: Asked, folder: Path) -> Bundle:
    from triton import __version__ as version

    chosen: dict[str, dict[str, Tile]] = {}
    for kernel, shape in sorted(tiles.set.keys() & tiles.asked.keys()):
        chosen.setdefault(kernel, {})[shape] = tiles.set[kernel, shape]
    bundle = Bundle(target=target.name, triton=version, binaries=binaries, tiles=chosen)
    (folder / INFO).write_text(bundle.model_dump_json(indent=1) + "\n")
    return bundle


def read_bundle(path: Path) -> Bundle:
    """Read ``kernels.json``; raises ``MemcError`` E309 where it does not read."""
    try:
        return Bundle.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise MemcError(
            "E309", f"the kernels' description does not read: {reason}", str(path), "convert again"
        ) from error


def _start(place: Path) -> subprocess.Popen[str]:
    # The interpreter is asked for by whoever tests the kernels, and would leave nothing to compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "memc.backends.triton.compiler", str(place)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def _finish(place: Path, process: subprocess.Popen[str], target: Target, folder: Path) -> list[Binary]:
    _, stderr = process.communicate()
    if process.returncode != 0:
        kernel, reason = _reason(stderr, process.returncode)
        raise MemcError(
            "E602", f"Triton does not compile {kernel}: {reason}", target.name, "memc doctor says its version"
        )
    binaries = []
    for path in sorted(place.glob("*.json")):
        if path.name == JOB:
            continue
        binary = Binary.model_validate_json(path.read_text())
        for name in (binary.file, f"{binary.variant.key}.ttir"):
            (folder / name).write_bytes((place / name).read_bytes())
        binaries.append(binary)
    return binaries


def _reason(stderr: str, code: int) -> tuple[str, str]:
    """Return the kernel and what went wrong from what a compiling process left behind."""
    last = (stderr.strip().splitlines() or [""])[-1]
    try:
        said = json.loads(last)
        return str(said["kernel"]), str(said["error"])
    except (json.JSONDecodeError, TypeError, KeyError):
        return "a kernel", f"its process ended with {code}: {last[:200]}"


def _refusal(binary: Binary, gpu: Gpu, spills: int = 0) -> str:
    """Return why a GPU would run a binary badly or not at all, "" where it runs it well."""
    if binary.spills > spills:
        unit = "registers" if gpu.name.startswith("amd") else "bytes of stack"
        return f"a kernel spills {binary.spills} {unit} on {gpu.name}"
    if binary.shared > gpu.shared_memory:
        return f"a kernel needs {binary.shared} bytes of shared memory, {gpu.name} has {gpu.shared_memory}"
    return ""


def _refuse(binary: Binary, gpu: Gpu, target: Target) -> NoReturn:
    sizes = ", ".join(f"{name} {value}" for name, value in binary.variant.constants.items() if name.startswith("block"))
    where = f"{binary.variant.kernel} ({', '.join(filter(None, (sizes, f'{binary.variant.warps} warps')))})"
    reason = _refusal(binary, gpu) or "a kernel does not fit"
    raise MemcError("E601", reason, where, f"--backend eager runs it in torch on {target.name}")

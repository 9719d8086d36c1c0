"""The bundle: kernels compiled ahead of time for one GPU, and what is known of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from memc import machine
from memc.backends.triton.compiler import JOB, Binary, Job
from memc.backends.triton.variants import Variant
from memc.errors import MemcError
from memc.kernels.launch import Gpu
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


def platform_of(target: Target) -> tuple[str, int | str]:
    """Return a target's platform and architecture in Triton's words."""
    if target.instruction_set.startswith("sm_"):
        return "cuda", int(target.instruction_set.removeprefix("sm_"))
    return "hip", target.instruction_set


def build(variants: Sequence[Variant], target: Target, gpu: Gpu, folder: Path, *, spills: int = 0) -> Bundle:
    """Compile ``variants`` into ``folder`` in processes of their own, as many as there are cores.

    Raises ``MemcError`` E602 where Triton's compiler ends early, E601 for a kernel that spills more than ``spills``
    (see ``Binary``) or needs more shared memory than the GPU has: it would run, many times slower than planned, or not
    at all.
    """
    from triton import __version__ as version

    folder.mkdir(parents=True, exist_ok=True)
    platform, architecture = platform_of(target)
    shards = [list(variants[start :: machine.cores()]) for start in range(min(machine.cores(), len(variants)))]
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for number, shard in enumerate(shards):
            place = Path(scratch) / str(number)
            place.mkdir()
            (place / JOB).write_text(
                Job(platform=platform, architecture=architecture, variants=shard).model_dump_json()
            )
            running.append((place, _start(place)))
        binaries = [binary for place, process in running for binary in _finish(place, process, target, folder)]
    binaries.sort(key=lambda binary: binary.variant.key)
    for binary in binaries:
        check(binary, gpu, target, spills)
    bundle = Bundle(target=target.name, triton=version, binaries=binaries)
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


def check(binary: Binary, gpu: Gpu, target: Target, spills: int = 0) -> None:
    """Refuse a binary that its GPU would run badly or not at all."""
    sizes = ", ".join(f"{name} {value}" for name, value in binary.variant.constants.items() if name.startswith("block"))
    where = f"{binary.variant.kernel} ({sizes}, {binary.variant.warps} warps)"
    if binary.spills > spills:
        unit = "bytes of stack" if target.instruction_set.startswith("sm_") else "registers"
        raise MemcError("E601", f"a kernel spills {binary.spills} {unit} on {target.name}", where)
    if binary.shared > gpu.shared_memory:
        message = f"a kernel needs {binary.shared} bytes of shared memory, {target.name} has {gpu.shared_memory}"
        raise MemcError("E601", message, where)

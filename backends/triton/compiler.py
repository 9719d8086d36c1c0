"""Compile variants of kernels for a GPU that need not be there, in a process of its own: ``python -m ... FOLDER``.

Reads ``FOLDER/job.json`` and writes, for each variant, the binary, its TTIR, and ``KEY.json`` with what is known of it.
A process of its own, since Triton reads at import whether it interprets, and LLVM may end the process that it runs in.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from memc.backends.triton.variants import Variant
from memc.kernels.launch import function

JOB = "job.json"
_WARP = {"cuda": 32, "hip": 64}


class Binary(BaseModel):
    """A compiled variant, and what its binary says that it needs.

    ``threads`` and bytes of ``shared`` memory to a block; ``registers`` to a thread; ``spills``: bytes of a thread's
    stack on NVIDIA, spilled vector registers on AMD. ``scratch``: pointers that the binary takes after its own
    arguments, which are null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    variant: Variant
    symbol: str
    file: str
    threads: int
    shared: int
    registers: int
    spills: int
    scratch: int


class Job(BaseModel):
    """What to compile: ``architecture`` is 90 or gfx942, say, of the ``platform`` cuda or hip."""

    model_config = ConfigDict(extra="forbid")

    platform: str
    architecture: int | str
    variants: list[Variant]


def compile_variant(job: Job, variant: Variant, folder: Path) -> Binary:
    """Compile one variant into ``folder`` and read the figures from the binary itself."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.arguments)
    pointers = [index for index, kind in enumerate(variant.arguments.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=function(variant.kernel),
        signature={**variant.arguments, **dict.fromkeys(variant.constants, "constexpr")},
        constexprs=dict(variant.constants),
        # The launcher sees to it that every tensor begins at a multiple of 16 bytes.
        attrs={(index,): [["tt.divisibility", 16]] for index in pointers},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    compiled: Any = triton.compile(
        source, target=GPUTarget(job.platform, job.architecture, _WARP[job.platform]), options=options
    )
    kind = "cubin" if job.platform == "cuda" else "hsaco"
    (folder / f"{variant.key}.{kind}").write_bytes(compiled.asm[kind])
    (folder / f"{variant.key}.ttir").write_text(compiled.asm["ttir"])
    read = _nvidia if job.platform == "cuda" else _amd
    registers, spills = read(compiled)
    return Binary(
        variant=variant,
        symbol=compiled.metadata.name,
        file=f"{variant.key}.{kind}",
        threads=variant.warps * _WARP[job.platform],
        shared=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        scratch=_parameters(compiled, job.platform) - len(names),
    )


def _nvidia(compiled: Any) -> tuple[int, int]:
    """Return registers and bytes of stack to a thread, as the cubin says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text)


def _amd(compiled: Any) -> tuple[int, int]:
    """Return vector registers to a thread and how many of them are spilled, as the code object's notes say."""
    text = compiled.asm["amdgcn"]
    return _number(r"\.vgpr_count:\s+(\d+)", text), _number(r"\.vgpr_spill_count:\s+(\d+)", text)


def _parameters(compiled: Any, platform: str) -> int:
    """Count the arguments of the binary: its own and those that Triton adds."""
    if platform == "cuda":
        head = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
        return len(re.findall(r"\.param\b", head))
    notes = compiled.asm["amdgcn"].partition(".args:")[2].partition(".group_segment_fixed_size")[0]
    return len(re.findall(r"\.offset:", notes))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the binary's figures do not say {pattern}")
    return int(found[1])


def main(folder: Path) -> None:
    """Compile a job, one file of figures a variant; what fails is said on stderr, with the variant, and ends it."""
    job = Job.model_validate_json((folder / JOB).read_text())
    for variant in job.variants:
        try:
            binary = compile_variant(job, variant, folder)
        except Exception as error:
            print(json.dumps({"kernel": variant.kernel, "error": _last(error)}), file=sys.stderr)  # noqa: T201
            raise SystemExit(1) from error
        (folder / f"{variant.key}.json").write_text(binary.model_dump_json(indent=1) + "\n")


def _last(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

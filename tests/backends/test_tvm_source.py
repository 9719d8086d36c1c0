"""The target ``c``: source that any compiler takes, compiled and run here, and what is said of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import op_programs as ops
import pytest
import tvm.libinfo
import tvm_ffi.libinfo
from tvm_support import build, lower

from memc.api import convert
from memc.artifact import read_manifest
from memc.backends.tvm import TvmBackend
from memc.backends.tvm.library import open_machine
from memc.errors import MemcError
from memc.program import Program
from memc.recipe import Recipe
from memc.target import get_target
from tests.backends.runs import SCENARIOS, compare
from tests.core.test_families import raised
from tests.families import raw_program

TOLERANCE = 1e-4
SOURCE = Path("lowered/tvm/source")

PROGRAMS: dict[str, Callable[[], Program]] = {
    "a decoder": lambda: ops.llama("attention", layers=1),
    "a memory": lambda: ops.linear_memory(),
    "pages that are ranked": lambda: ops.sparse_attention(rerank=2, groups=1, page=3, budget=6, sinks=0),
    "lists by a tree": ops.CASES["sparse, by a tree, refreshed"],
    "landmarks by mass": ops.CASES["sparse, by landmarks, every option"],
    "few bits": ops.CASES["sparse, few bits, every option"],
    "compact places": ops.CASES["sparse, compact, every option"],
    "a bank": lambda: ops.bank_ffn("silu"),
    "gpt2": lambda: raised("gpt2")[0].program,
    "gemma2": lambda: raised("gemma2")[0].program,
}
QUICK = ("a decoder",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.conformance) for name in PROGRAMS]
)
def test_source_computes_what_the_program_does(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]()
    runner = build(program, tmp_path, target="c")
    for scenario in ("prompt", "pieces", "padding"):
        assert compare(program, runner, SCENARIOS[scenario]) < TOLERANCE, scenario


def test_any_compiler_makes_the_library_from_what_is_kept(tmp_path: Path) -> None:
    """With weights in 4 bits, by a compiler that is asked to do nothing clever, and to refuse what C does not have."""
    program = ops.rotary()
    built = build(program, tmp_path, weights="int4", target="c")
    tokens = SCENARIOS["pieces"]
    sources = sorted(path.name for path in (tmp_path / SOURCE).iterdir())
    assert sources == ["functions.c", "program.c"]
    include = [f"-I{path}" for path in (tvm.libinfo.find_include_path(), *tvm_ffi.libinfo.include_paths())]
    flags = ["-std=c11", "-O0", "-shared", "-fPIC", "-Werror=implicit-function-declaration", *include]
    other = tmp_path / "other.so"
    subprocess.run(["cc", *flags, *(str(tmp_path / SOURCE / name) for name in sources), "-o", other], check=True)
    again = TvmBackend().load(tmp_path, read_manifest(tmp_path), 1)
    again._entry = open_machine(other)[built.info.entry]
    assert abs(compare(program, again, tokens) - compare(program, built, tokens)) < TOLERANCE


def test_a_conversion_to_source_is_run_and_says_what_it_is(tmp_path: Path) -> None:
    program, _ = raw_program("llama")
    document = convert(program, tmp_path / "out", target="c", recipe=Recipe(recipe=1))
    assert document.backend == "tvm" and document.forms["library"].startswith("C source, compiled here for ")
    assert "lowered_logits" in {check.name for check in document.checks}
    manifest = read_manifest(tmp_path / "out")
    assert "cc -O3 -shared" in manifest.how_to_run and str(SOURCE) in manifest.how_to_run
    assert TvmBackend().runs_here(get_target("c"))


def test_a_missing_or_failing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    fake.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        with pytest.raises(MemcError, match="E602 cc does not make the library") as caught:
            lower(ops.norm(), tmp_path / "failing", target="c")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("memc.backends.tvm.build.shutil.which", lambda name: None)
    with pytest.raises(MemcError, match="apt-get install gcc"):
        lower(ops.norm(), tmp_path / "missing", target="c")

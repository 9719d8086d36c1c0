"""Runs what is compiled for a GPU on this processor: TVM's own CUDA runtime over a driver whose kernels run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)\s*\{')
_LOADED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import op_programs as ops
from pathlib import Path
from memc.artifact import read_manifest
from memc.backends.tvm import TvmBackend
from tests.backends.runs import SCENARIOS, compare
folder, case, *scenarios = sys.argv[2:]
runner = TvmBackend().load(Path(folder), read_manifest(Path(folder)), 1)
program = ops.CASES[case]()
print(json.dumps({name: compare(program, runner, SCENARIOS[name]) for name in scenarios}))
"""


def host_source(source: str) -> str:
    """Return CUDA source as the host's compiler takes it, with a function that runs any of its kernels."""
    calls = []
    for name, given in _KERNEL.findall(source):
        kinds = [argument.replace("__restrict__", "").strip().rsplit(" ", 1)[0] for argument in given.split(",")]
        values = ", ".join(f"*({kind}*)arguments[{index}]" for index, kind in enumerate(kinds))
        start = source.index("{", source.index(f" {name}({given})", source.index(f"{name}({given}) {{") - 1))
        body = source[start : source.find('extern "C" __global__', start)]
        barriers = "true" if re.search(r"__syncthreads|__shfl", body) else "false"
        run = f"run_grid(grid, block, {barriers}, [=] {{ {name}({values}); }})"
        calls.append(f'  if (!std::strcmp(name, "{name}")) {run};')
    head = 'extern "C" void emulate(const char* name, const unsigned* grid, const unsigned* block, void** arguments) {'
    # The host's compiler wants the alignment first.
    shared = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", source)
    return "\n".join(['#include "threads.h"', shared, head, *calls, "}"])


def build_driver(folder: Path) -> None:
    """Compile the driver, under the names that TVM's runtime looks for."""
    for name, prefix in (("libcuda.so.1", "cu"), ("libcudart.so.13", "cuda")):
        script = folder / f"{name}.map"
        script.write_text(f"{name} {{ global: {prefix}*; local: *; }};")
        versioned = [f"-Wl,--version-script={script}"] if prefix == "cuda" else []
        flags = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{name}", *versioned]
        subprocess.run(["g++", *flags, str(HERE / "driver.cpp"), "-o", str(folder / name), "-ldl"], check=True)


def build_kernels(source: str, folder: Path) -> Path:
    """Compile the kernels of CUDA source for the host."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    include = re.findall(r'"?-I"?([^"\s]+)', told)
    path = folder / "kernels.so"
    (folder / "kernels.cpp").write_text(host_source(source))
    flags = ["-shared", "-fPIC", "-O0", "-w", f"-I{HERE}", *(f"-I{place}" for place in include)]
    subprocess.run(["g++", *flags, str(folder / "kernels.cpp"), "-o", str(path)], check=True)
    return path


def run(folder: Path, case: str, kernels: Path, driver: Path, *scenarios: str) -> dict[str, Any]:
    """Open a library in a process of its own as on a GPU, and compare it with the program of a case."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(driver), "EMULATED_KERNELS": str(kernels)}
    command = [sys.executable, "-c", _LOADED, str(HERE.parent), str(folder), case, *scenarios]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found

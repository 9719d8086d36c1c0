"""From the prepared graph to a shared library: torch.export, Relax, TVM's stock pipeline, the linker."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import tvm
from torch.export import ExportedProgram
from torch.fx import Node
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter
from tvm.support.cc import create_shared

from memc.backends.tvm.convert import Converters
from memc.backends.tvm.gpu.binary import Binary, compile_source, packer
from memc.backends.tvm.gpu.convert import GpuConverters
from memc.backends.tvm.gpu.schedule import device_source, pipeline, target_of
from memc.backends.tvm.graph import Prepared
from memc.backends.tvm.isa import Isa
from memc.backends.tvm.tiles import Tiles
from memc.backends.tvm.tools import require_tools
from memc.errors import MemcError
from memc.prepare import export_module, first_line, named_node, source_of
from memc.program import Program

ENTRY = "main"
SOURCE = "source"
SOURCES = ("functions.c", "program.c")
"""C files of a library that is made from source: its functions, and the program that calls them."""

FLAGS = ("-O3",)
"""What they are compiled with here: for any processor of this machine's kind."""


def build(program: Program, prepared: Prepared, isa: Isa, tiles: Tiles, path: Path) -> Binary | None:
    """Compile and link the library ``path``; its function ``main`` takes the placeholders in their order.

    Returns a GPU's kernels, None for a CPU. Raises ``MemcError`` E601 that names the op which
    the importer refuses, E602 where a compiler fails.
    """
    require_tools(isa)
    with _reporting(program):
        converters = (GpuConverters() if isa.gpu else Converters(tiles)).table()
        exported = _decomposed(export_module(program, prepared.module, prepared.specs), set(converters))
        module = from_exported_program(exported, custom_convert_map=converters, run_ep_decomposition=False)
        executable = _compile(module, target_of(isa))
        source = device_source(executable) if isa.arch else ""
    binary = compile_source(source, isa.arch) if isa.arch else None
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"cc": isa.compiler} if isa.compiler is not None else {}
    if isa.source:
        options["fcompile"] = _from_source(path.parent / SOURCE)
    if binary is not None:
        options["fpack_imports"] = packer(source, binary)
    try:
        executable.mod.export_library(str(path), **options)
    except RuntimeError as error:
        message = f"{isa.compiler or 'the C compiler'} does not make the library: {first_line(error)}"
        raise MemcError("E602", message, "backend tvm") from error
    return binary


def _from_source(folder: Path) -> Any:
    """Return what keeps the C source of a library in ``folder``, and compiles the library from there."""

    def compile_library(library: str, files: list[str], options: list[str], cc: str) -> None:
        folder.mkdir(exist_ok=True)
        kept = [shutil.copyfile(file, folder / name) for file, name in zip(files, SOURCES, strict=True)]
        create_shared(library, [str(path) for path in kept], [*options, *FLAGS], cc=cc)

    compile_library.object_format = "c"  # type: ignore[attr-defined]
    return compile_library


def _decomposed(exported: ExportedProgram, converters: set[str]) -> ExportedProgram:
    """Take apart the ops that the importer has no converter of, and no others: it takes most as they are."""
    known = converters | set(ExportedProgramImporter().convert_map)
    targets = {node.target for node in exported.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    table = torch.export.default_decompositions()
    wanted = {target: table[target] for target in targets if target.__name__ not in known and target in table}
    return exported.run_decompositions(wanted) if wanted else exported


def _compile(module: Any, target: Any) -> Any:
    # tvm.compile's own pipeline for CPUs fuses nothing; of C it has none, and knows no vectors.
    to_source = target.kind.name == "c"
    if target.kind.name == "cuda":
        steps = pipeline(target)
    else:
        steps = relax.get_default_pipeline(tvm.target.Target({"kind": "llvm"}) if to_source else target)
    with target, tvm.transform.PassContext(config={"tirx.disable_vectorize": to_source}):
        return tvm.compile(module, target=target, relax_pipeline=steps)


@contextmanager
def _reporting(program: Program) -> Iterator[None]:
    """Turn what torch's exporter and TVM's importer raise into E601 with the op and the source line where known."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError, KeyError) as error:
        node = named_node(program, str(error)) or _imported(error)
        what = str(node.target) if node is not None else "this program"
        where = source_of(node) if node is not None else ""
        message = f"tvm cannot lower {what}: {first_line(error)}"
        raise MemcError("E601", message, where, "another --backend") from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise MemcError("E601", f"tvm cannot lower this program: {first_line(error)}") from error


def _imported(error: BaseException) -> Node | None:
    """Return the node that was being imported when an error arose: the importer's own errors do not name it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    nodes = (frame.f_locals.get("node") for frame in reversed(frames))
    return next((node for node in nodes if isinstance(node, Node)), None)

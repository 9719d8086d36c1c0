"""The compilers and linkers that targets need besides TVM. Imports no TVM."""

from __future__ import annotations

import shutil

from memc.backends.tvm.gpu.binary import require_compiler
from memc.backends.tvm.isa import Isa
from memc.errors import MemcError


def require_tools(isa: Isa) -> None:
    """Raise ``MemcError`` E602 with what installs it where a compiler or a linker for a target is missing."""
    if isa.arch:
        require_compiler(isa.arch)
    if isa.compiler is not None and shutil.which(isa.compiler) is None:
        hint = "apt-get install gcc" if isa.source else f"apt-get install gcc-{isa.compiler.removesuffix('-gcc')}"
        raise MemcError("E602", f"{isa.compiler} is needed to link for {isa.machine}", "backend tvm", hint)

"""The TVM backend: a shared library with dynamic batch and token count, compiled for one instruction set.

Loading and running need numpy and TVM's runtime library; torch and TVM's compiler are imported only to lower.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from memc.artifact import Manifest, check_digest
from memc.backend import Backend, Lowered, LowerOptions, No, Runner, Yes
from memc.errors import MemcError

if TYPE_CHECKING:
    from torch.fx import Node

    from memc.program import Program
    from memc.target import Target


class TvmBackend(Backend):
    """Lowers raised programs to native code by TVM, with functions of its own for all that takes time."""

    name: ClassVar[str] = "tvm"
    weights: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8", "int4")

    def missing(self) -> str:
        """Return which of TVM's packages is not there in the version that works, and the command that installs it."""
        from memc.backends.tvm.library import require_tvm

        try:
            require_tvm()
        except MemcError as error:
            return f"{error.message}: {error.next}"
        return ""

    def self_test(self) -> str:
        """Compile and run a function in a process of its own, which a wrong TVM ends; return what goes wrong."""
        from memc.backends.tvm.library import try_compiler

        return self.missing() or try_compiler()

    def require(self, target: Target) -> None:
        """Raise ``MemcError`` E602 where a compiler or a linker for a target is missing, with what installs it."""
        from memc.backends.tvm.isa import isa_of, knows
        from memc.backends.tvm.tools import require_tools

        if knows(target):
            require_tools(isa_of(target))

    def runs_here(self, target: Target) -> bool:
        """Tell whether this machine runs what is compiled for a target."""
        from memc.backends.tvm.isa import runs_here

        return runs_here(target)

    def supports(self, node: Node, target: Target) -> Yes | No:
        """Tell whether and how it lowers one node of a raised program."""
        from memc.backends.tvm.backend import supports

        return supports(node, target)

    def refuses_weights(self, weights: str, target: Target) -> str | None:
        """Return why it does not take a weight type on a target, or None when it does."""
        from memc.backends.tvm.backend import refuses_weights

        return refuses_weights(weights, target)

    def refuses_tuning(self, target: Target) -> str | None:
        """Return why no tiles are timed for a target, or None where they are."""
        from memc.backends.tvm.backend import refuses_tuning

        return refuses_tuning(target)

    def lower(self, program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
        """Write ``folder/lowered/tvm/model.so`` with its parameters and its description beside it.

        Raises ``MemcError`` E601 for an op, a weight type or a target that it does not take and E602 without TVM or a
        linker for the target.
        """
        from memc.backends.tvm.backend import lower

        if reason := self.refuses_weights(options.weights, target):
            hint = f"--weights {', '.join(self.taken_weights(target) or self.weights)}"
            raise MemcError("E601", f"tvm does not take {options.weights}: {reason}", next=hint)
        return lower(program, target, folder, options)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Open the library; raises ``MemcError`` E602 where TVM or this machine cannot run it, E402 where it is not
        the one that was written.
        """
        from memc.backends.tvm.gpu.runner import DeviceRunner
        from memc.backends.tvm.library import require_tvm
        from memc.backends.tvm.runner import INFO, TvmRunner, read_info

        require_tvm()
        path = (folder / manifest.lowered).parent / INFO
        check_digest(folder, manifest, path)
        info = read_info(path)
        return (DeviceRunner if info.options["kind"] == "cuda" else TvmRunner)(folder, manifest, threads)

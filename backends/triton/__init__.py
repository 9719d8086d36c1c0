"""The triton backend: torch on a GPU with kernels of memc's own, compiled ahead of time for the GPU that is asked for.

Lowering needs Triton and no GPU. Running needs torch, a GPU of the kind, and the binding of its driver.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from memc.artifact import Manifest
from memc.backend import Backend, Lowered, LowerOptions, No, Runner, Yes
from memc.errors import MemcError

if TYPE_CHECKING:
    from torch.fx import Node

    from memc.program import Program
    from memc.target import Target

OLDEST, TOO_NEW = (3, 6), (3, 10)
INSTALL = "pip install 'triton>=3.6,<3.10'"


class TritonBackend(Backend):
    """Lowers raised programs to torch with Triton kernels for the dialect's ops, states in place."""

    name: ClassVar[str] = "triton"
    weights: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def missing(self) -> str:
        """Return why nothing can be compiled here and what to type next."""
        if find_spec("triton") is None:
            return f"triton is not installed: {INSTALL}"
        try:
            found = version("triton")
        except PackageNotFoundError:
            return f"triton has no version: {INSTALL}"
        number = tuple(int(part) for part in found.split(".")[:2])
        return "" if OLDEST <= number < TOO_NEW else f"triton {found} is installed, 3.6 to 3.9 are known: {INSTALL}"

    def self_test(self) -> str:
        """Compile a kernel for one GPU in a process of its own; return what goes wrong."""
        from memc.backends.triton.backend import try_compiler

        return self.missing() or try_compiler()

    def runs_here(self, target: Target) -> bool:
        """Tell whether torch sees a GPU that runs what is compiled for a target."""
        from memc.backends.triton.backend import runs_here

        return runs_here(target)

    def supports(self, node: Node, target: Target) -> Yes | No:
        """Tell whether and how it lowers one node of a raised program."""
        from memc.backends.triton.backend import supports

        return supports(node, target)

    def refuses_weights(self, weights: str, target: Target) -> str | None:
        """Return why it does not take a weight type on a target, or None when it does."""
        from memc.backends.triton.backend import refuses_target

        if reason := refuses_target(target):
            return reason
        return None if weights in self.weights else f"the kernels compute in {', '.join(self.weights)}"

    def lower(self, program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
        """Write ``folder/lowered/triton``: the program, its kernels for the target, and their description.

        Raises ``MemcError`` E601 for an op, a weight type or a target that it does not take, and for a kernel that the
        GPU would run badly; E602 without Triton.
        """
        from memc.backends.triton.backend import lower

        if reason := self.refuses_weights(options.weights, target):
            hint = f"--weights {', '.join(self.weights)}"
            raise MemcError("E601", f"triton does not take {options.weights}: {reason}", next=hint)
        if reason := self.missing():
            raise MemcError("E602", reason, "backend triton")
        return lower(program, target, folder, options)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Load a lowered program onto the GPU.

        Raises ``MemcError`` E602 where there is none of the kind or its driver's binding is missing, E402 where a file
        is not the one that was written.
        """
        from memc.backends.triton.backend import load

        return load(folder, manifest)

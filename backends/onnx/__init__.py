"""The ONNX Runtime backend: one file with dynamic batch and token count for prefill, chunked prefill and decode.

Loading and running need numpy and onnxruntime; torch is imported only to lower.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from memc.artifact import Manifest
from memc.backend import Backend, Lowered, LowerOptions, No, Runner, Yes
from memc.errors import MemcError

if TYPE_CHECKING:
    from torch.fx import Node

    from memc.program import Program
    from memc.target import Target


class OnnxBackend(Backend):
    """Lowers raised programs to ONNX (opset 24 and contrib ops that the runtime has kernels for) and runs them."""

    name: ClassVar[str] = "onnx"
    weights: ClassVar[tuple[str, ...]] = ("fp32", "int8", "int4")

    def supports(self, node: Node, target: Target) -> Yes | No:
        """Tell whether and how it lowers one node of a raised program, by the kernels of the installed runtime."""
        from memc.backends.onnx.backend import supports

        return supports(node, target)

    def refuses_weights(self, weights: str, target: Target) -> str | None:
        """Return why it does not take a weight type on a target, or None when it does."""
        from memc.backends.onnx.backend import refuses_weights

        return refuses_weights(weights, target)

    def lower(self, program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
        """Write ``folder/lowered/onnx/model.onnx`` with its weights beside it.

        Raises ``MemcError`` E601 for an op or a weight type that it does not take and E602 without a runtime.
        """
        from memc.backends.onnx.backend import lower

        if reason := self.refuses_weights(options.weights, target):
            raise MemcError(
                "E601", f"onnx does not take {options.weights}: {reason}", next="--weights fp32, int8 or int4"
            )
        return lower(program, target, folder, options)

    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Open the file; raises ``MemcError`` E602 when the runtime is missing, too old or refuses the file."""
        from memc.backends.onnx.capability import require_runtime
        from memc.backends.onnx.runner import OnnxRunner

        require_runtime()
        return OnnxRunner(folder, manifest, threads)

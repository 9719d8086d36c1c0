"""What the installed ONNX Runtime can do, asked of the runtime itself."""

from __future__ import annotations

from functools import cache

from memc.errors import MemcError

OPSET = 24
"""Version of the default operator set that lowered files use."""

MINIMUM = (1, 24)
"""Oldest ONNX Runtime with kernels for opset 24."""


def require_runtime() -> None:
    """Check that ONNX Runtime is installed and new enough; raises ``MemcError`` E602 otherwise."""
    try:
        import onnxruntime
    except ImportError as error:
        hint = "pip install onnxruntime"
        raise MemcError("E602", f"onnxruntime cannot be imported: {error}", "backend onnx", hint) from error
    onnxruntime.disable_telemetry_events()
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        message = f"onnxruntime {onnxruntime.__version__} is too old, opset {OPSET} needs {wanted}"
        raise MemcError("E602", message, "backend onnx", f"pip install 'onnxruntime>={wanted}'")


@cache
def kernels() -> frozenset[tuple[str, str]]:
    """Return (domain, op) of every float32 CPU kernel that serves opset 24.

    Raises ``MemcError`` E602 without a runtime.
    """
    require_runtime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = set()
    for kernel in state.get_all_opkernel_def():
        first, last = kernel.version_range
        version = OPSET if not kernel.domain else 1
        types = {name for group in kernel.type_constraints.values() for name in group}
        if kernel.provider == "CPUExecutionProvider" and first <= version <= last and "tensor(float)" in types:
            found.add((kernel.domain, kernel.op_name))
    return frozenset(found)


def has_kernel(op: str, domain: str = "") -> bool:
    """Tell whether the runtime has a float32 CPU kernel for an op, and not only a function that expands to others."""
    return (domain, op) in kernels()

"""What is installed here and what works: versions, backends and why not, kernels of the runtime, model coverage."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from pydantic import TypeAdapter, ValidationError

from memc import __version__, machine
from memc.backend import Backend
from memc.errors import MemcError
from memc.plugins import load_plugin, registered
from memc.report.models import BackendRow, CoverageRow, DoctorDocument
from memc.report.tools import TargetRow, TargetsDocument
from memc.target import Target, targets

PACKAGES = (
    "torch", "transformers", "safetensors", "tokenizers", "gguf", "numpy", "pydantic", "onnx", "onnxscript",
    "onnxruntime", "triton", "cuda-bindings", "apache-tvm", "apache-tvm-ffi", "ray",
)  # fmt: skip
BACKEND_PACKAGES = {"eager": "torch", "onnx": "onnxruntime", "triton": "triton", "tvm": "apache-tvm"}
"""The distribution that a backend runs on, for its version."""

# Kernels of ONNX Runtime on a CPU that lowering looks for.
KERNELS = ("LinearAttention", "GroupQueryAttention", "Attention", "RotaryEmbedding", "RMSNormalization", "MatMulNBits")
COVERAGE = "coverage.json"


def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def backend_reason(name: str) -> str:
    """Return why a backend cannot be used here, empty when it can. Imports it."""
    if name not in registered("memc.backends"):
        return f"backend {name!r} is not part of this version of memc"
    try:
        backend: Backend = load_plugin("memc.backends", name)()
    except MemcError as error:
        return error.message
    return backend.missing()


def require_backend(target: Target, backend: str | None = None) -> str:
    """Return the backend to use for a target.

    Raises ``MemcError`` E202 for a backend nobody knows and E602, with the reason, for one that cannot be used here.
    """
    name = backend or target.backend
    if name not in registered("memc.backends") and name != target.backend:
        load_plugin("memc.backends", name)
    if reason := backend_reason(name):
        what = f"target {target.name!r} needs it" if backend is None else "asked for"
        raise MemcError("E602", f"{reason} ({what})", next="memc targets shows what can be used here")
    return name


def list_targets() -> TargetsDocument:
    """Describe every target and whether its backend can be used here."""
    reasons = {name: backend_reason(name) for name in {target.backend for target in targets().values()}}
    rows = [
        TargetRow(
            **target.model_dump(exclude={"cache_bytes", "disk_bandwidth", "launch_overhead"}),
            available=not reasons[target.backend],
            reason=reasons[target.backend],
        )
        for target in sorted(targets().values(), key=lambda t: (t.kind != "cpu", t.name != "cpu", t.name))
    ]
    return TargetsDocument(targets=rows)


def examine(*, coverage: bool = False) -> DoctorDocument:
    """Examine this installation."""
    backends = [_backend(name) for name in sorted(registered("memc.backends"))]
    return DoctorDocument(
        version=__version__,
        python=platform.python_version(),
        machine=machine.describe(),
        threads=machine.cores(),
        packages={name: package_version(name) for name in PACKAGES},
        backends=backends,
        kernels=onnx_kernels(),
        coverage=read_coverage() if coverage else None,
        problems=[f"backend {row.name}: {row.reason}" for row in backends if not row.available],
    )


def _backend(name: str) -> BackendRow:
    reason = backend_reason(name)
    backend: Backend | None = None if reason else load_plugin("memc.backends", name)()
    if backend is not None and (reason := backend.self_test()):
        backend = None
    return BackendRow(
        name=name,
        available=not reason,
        reason=reason,
        version=package_version(BACKEND_PACKAGES.get(name, name)) or "",
        weights=[] if backend is None else list(backend.weights),
        lacks={} if backend is None else _lacks(backend),
    )


def _lacks(backend: Backend) -> dict[str, str]:
    """Return for which targets of a backend this machine lacks a tool, and what installs it."""
    found = {}
    for target in targets().values():
        try:
            if backend.taken_weights(target):
                backend.require(target)
        except MemcError as error:
            found[target.name] = f"{error.message}: {error.next}"
    return dict(sorted(found.items()))


def onnx_kernels() -> dict[str, list[str]]:
    """Return the CPU kernels that ONNX Runtime has of the ops in ``KERNELS``: ``domain.op`` to its types.

    Empty without ONNX Runtime; an op without a kernel is left out.
    """
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError:
        return {}
    found: dict[str, set[str]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider" and kernel.op_name in KERNELS:
            name = f"{kernel.domain or 'ai.onnx'}.{kernel.op_name}"
            types = {kind for kinds in kernel.type_constraints.values() for kind in kinds}
            found.setdefault(name, set()).update(kind.removeprefix("tensor(").removesuffix(")") for kind in types)
    return {name: sorted(kinds) for name, kinds in sorted(found.items())}


def read_coverage() -> list[CoverageRow]:
    """Read the table of families that the tests wrote: ``{family: {captured, attention, ffn, logits, note}}``.

    Raises ``MemcError`` E309 when it is missing or does not parse.
    """
    path = files("memc") / COVERAGE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = [{"family": family, **facts} for family, facts in data.items()]
        return TypeAdapter(list[CoverageRow]).validate_python(rows)
    except FileNotFoundError:
        raise MemcError("E309", "this installation has no coverage table", str(path), "install memc again") from None
    except (json.JSONDecodeError, ValidationError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise MemcError("E309", f"coverage table does not parse: {reason}", str(path), "install memc again") from error

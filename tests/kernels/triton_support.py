"""Run kernels in Triton's interpreter, on a CPU: it checks the maths and the masks, not the hardware's limits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

# Read when a kernel's module is imported, which is at its first launch.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from memc.dialect import OpSpec
from memc.kernels.launch import INTERPRETER, Jit, Tile, launching
from memc.kernels.registration import casting


class Code:
    """A module of an op's code, whose functions take the op's own arguments here, gradients first."""

    def __init__(self, spec: OpSpec, module: ModuleType) -> None:
        self.spec, self.module = spec, module

    def __getattr__(self, name: str) -> Any:
        own = getattr(self.module, name)
        if name == "refuses":
            return lambda gpu, *args, **options: own(gpu, self.spec.arguments(*args, **options))
        if name == "backward":
            return self.spec.taking(casting(self.spec, own), len(self.spec.grads_from))
        return self.spec.taking(own) if name in ("forward", "in_place") else own


@pytest.fixture
def interpreted() -> Iterator[None]:
    """Launch kernels in the interpreter during a test; skipped where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    with launching(Jit(INTERPRETER)), bfloat16_products(), language_patched_once():
        yield


class _Smallest(dict[str, Any]):
    """Tiles of 16 by 16, whatever the kernel and the shape, so that small tensors have many blocks."""

    def get(self, name: str, default: Any = None) -> Any:
        return Tile(dict.fromkeys(default.sizes, 16), 4, 1) if isinstance(default, Tile) else self


@pytest.fixture
def cut_small(interpreted: None) -> Iterator[None]:
    """Launch kernels in the interpreter, cut into the smallest blocks there are."""
    with launching(Jit(INTERPRETER, _Smallest())):
        yield


@contextmanager
def language_patched_once() -> Iterator[None]:
    """Exchange Triton's language for the interpreter's once a launch: it does so at each call of a function inside."""
    from triton import language
    from triton.runtime import interpreter

    whole, held, exchanged = interpreter._patch_lang, set(), {id(language), id(language.core)}

    def patch_new(function: Any) -> Any:
        found = {id(value) for value in function.__globals__.values()} & exchanged
        if held and found <= held:
            return None  # of a function inside, which restores nothing
        scope = whole(function)
        if not held:
            restore = scope.restore
            scope.restore = lambda: (held.clear(), restore())
        held.update(found)
        return scope

    with patch.object(interpreter, "_patch_lang", patch_new):
        yield


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Multiply matrices of bfloat16 as numbers: the interpreter holds them as uint16, and multiplies those."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = (self.cast_impl(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        return multiply(self, *wide, *rest)

    with patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what host code allocates with NaN: a kernel that leaves a part of its output unwritten is seen."""
    empty = Tensor.new_empty

    def filled(self: Tensor, *sizes: Any, **options: Any) -> Tensor:
        made = empty(self, *sizes, **options)
        wrong = torch.nan if made.is_floating_point() else 255 if made.dtype == torch.uint8 else -(2**30)
        return made.fill_(wrong)

    with patch.object(Tensor, "new_empty", filled):
        yield


def assert_near(found: Tensor, expected: Tensor, *, atol: float = 0.0) -> None:
    """Compare with a result in float64: relative to its largest value, to what the type of ``found`` can hold."""
    assert found.shape == expected.shape and not found.isnan().any()
    if found.numel() == 0:
        return
    allowed = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[found.dtype]
    error = (found.double() - expected).abs().max().item()
    assert error <= atol + allowed * max(1.0, expected.abs().max().item())


def in_double(values: Sequence[Any]) -> list[Any]:
    """Return arguments with all numbers in float64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]


def autograd_of(
    forward: Callable[..., tuple[Tensor, ...]], arguments: Sequence[Any], grads: Sequence[Tensor | None], **options: Any
) -> list[Tensor]:
    """Return the gradients of all real arguments of ``forward`` in float64, given those of its outputs."""
    leaves = [
        x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in in_double(arguments)
    ]
    results = forward(*leaves, **options)
    loss = sum(((r * g.double()).sum() for r, g in zip(results, grads, strict=True) if g is not None), torch.zeros(()))
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(loss, wanted, materialize_grads=True))

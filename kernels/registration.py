"""What torch is told of an op: what runs it, and what runs its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake, register_kernel

from memc.dialect.base import Arguments, OpSpec
from memc.kernels.launch import dispatch

DEVICES = ("cpu", "cuda")
_LIBRARY = torch.library.Library("memc", "FRAGMENT")


def register(
    spec: OpSpec, forward: Callable[..., Any], backward: Callable[..., tuple[Tensor | None, ...]] | None = None
) -> None:
    """Register the implementation of an op, on a GPU for what its kernels do not take, and that of its gradient.

    ``forward`` takes the op's :class:`Arguments`. ``backward`` takes them and a gradient for each of ``grads_from``,
    and returns that of each of ``grads_to``, of any type; None for one that is not given. It becomes
    ``memc::name_backward``, an op and not torch code in the autograd function: tracing sees one node, and its loops
    over blocks are free to look at sizes and values.
    """
    register_kernel(f"memc::{spec.name}", DEVICES, spec.taking(dispatch(spec.name, forward)))
    if backward is None:
        return
    name, leading = f"{spec.name}_backward", [f"grad_{output}" for output in spec.grads_from]
    _LIBRARY.define(name + spec.schema(leading, len(spec.grads_to)), tags=(torch.Tag.pt2_compliant_tag,))
    run = casting(spec, dispatch(spec.name, backward, "backward"))

    def fake(args: Arguments, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty(0) if x is None else x.new_empty(x.shape) for x in _learning(spec, args))

    register_fake(f"memc::{name}", spec.taking(fake, len(leading)))
    register_kernel(f"memc::{name}", DEVICES, spec.taking(run, len(leading)))
    op = getattr(torch.ops.memc, name).default

    def gradients(args: Arguments, *grads: Tensor) -> tuple[Tensor, ...]:
        tensors, options = args.unpack()
        found: tuple[Tensor, ...] = op(*grads, *tensors, **options)
        return found

    register_gradients(spec, gradients)


def register_gradients(spec: OpSpec, gradients: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Register what autograd runs for an op; ``gradients`` as ``backward`` of :func:`register`."""

    def setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.options = keyword_only_inputs
        outputs = zip(spec.returns, output if isinstance(output, tuple) else (output,), strict=True)
        ctx.mark_non_differentiable(*(x for name, x in outputs if name not in spec.grads_from))

    def autograd(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args = spec.arguments(*ctx.saved_tensors, **ctx.options)
        given = (grads[spec.returns.index(name)] for name in spec.grads_from)
        found = dict(zip(spec.grads_to, gradients(args, *given), strict=True))
        return tuple(None if getattr(args, name) is None else found.get(name) for name in spec.arguments.tensors())

    torch.library.register_autograd(f"memc::{spec.name}", autograd, setup_context=setup)


def casting(spec: OpSpec, backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Return ``backward`` with each gradient contiguous and in the type of its tensor; empty where there is none."""

    def run(args: Arguments, *grads: Tensor) -> tuple[Tensor, ...]:
        found = zip(backward(args, *grads), _learning(spec, args), strict=True)
        return tuple(torch.empty(0) if x is None or g is None else g.to(x.dtype).contiguous() for g, x in found)

    return run


def _learning(spec: OpSpec, args: Arguments) -> tuple[Tensor | None, ...]:
    return tuple(getattr(args, name) for name in spec.grads_to)

"""Any ``nn.Module`` with example inputs."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from memc.arguments import short
from memc.errors import MemcError
from memc.frontend.trace import Port, capture_failure, fake_mode_of, first_output, trace
from memc.program import Dim, ModelInfo, Program, named_tensors


def capture(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    name: str = "",
    decoder: bool | None = None,
    max_positions: int | None = None,
) -> Program:
    """Capture a module with its own parameters, which the program shares.

    The first int64 input ``[B, T]`` is ``tokens``, of a decoder the second is ``positions``; others are ``other``, keep
    their names, and are dynamic in the axes whose example sizes equal those of ``B`` and ``T``. These are the first two
    axes of the first example where it is of integers or has three axes ``[B, T, ...]``; any other has a batch alone,
    such as ``[B, features]`` or ``[B, channels, height, width]``. A decoder that takes no positions gets an unused
    ``positions`` input. ``decoder`` None means: look whether an earlier output depends on a later token.
    ``max_positions`` is the longest sequence that the module takes. The module's first output is captured.

    Raises ``MemcError`` E305 for unsuitable examples and for what cannot be traced, naming the user's own line.
    """
    where = name or type(module).__qualname__
    if not isinstance(module, nn.Module):
        raise MemcError("E305", f"{short(module)} is no nn.Module", where, "give a module and example inputs")
    example_inputs = _examples(example_inputs, where)
    ports, arguments = _ports(module, example_inputs, where)
    if decoder is None:
        decoder = ports[0].role == "tokens" and is_causal(module, example_inputs)
    if not decoder:
        ports = [
            replace(port, name=str(parameter), role="other") if port.role == "positions" else port
            for port, parameter in zip(ports, arguments, strict=True)
        ]
    elif not any(port.role == "positions" for port in ports):
        ports.append(Port("positions", "positions", torch.int64, ("B", "T")))
        arguments.append(None)
    info = ModelInfo(where, module_digest(module), type(module).__name__, None, max_positions, decoder=decoder)
    program = trace(module, ports, arguments, info)
    width = program.outputs[0].shape[-1]
    vocab = width if decoder and isinstance(width, int) else None
    return replace(program, model=replace(program.model, vocab_size=vocab))


def module_digest(module: nn.Module) -> str:
    """Return the hex sha256 of a module's tensors and their names; empty for fake parameters."""
    if fake_mode_of(module) is not None:
        return ""
    digest = hashlib.sha256()
    for name, value in named_tensors(module):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_causal(module: nn.Module, example_inputs: tuple[Tensor, ...]) -> bool:
    """Tell by running it whether a module's outputs depend on no later token; True for fake parameters."""
    if fake_mode_of(module) is not None:
        return True
    tokens, *rest = example_inputs
    changed = tokens.clone()
    changed[:, -1] = torch.where(tokens[:, -1] == 0, 1, 0)
    module.eval()
    try:
        with torch.no_grad():
            before, after = (first_output(module(t, *rest)) for t in (tokens, changed))
    except Exception as error:
        raise capture_failure(error, type(module).__qualname__, "give example inputs that forward() takes") from error
    return bool(torch.equal(before[:, :-1], after[:, :-1])) if before.ndim == 3 else False


def _examples(given: object, where: str) -> tuple[Tensor, ...]:
    several = (given,) if isinstance(given, Tensor) else given
    if isinstance(several, list | tuple) and several and all(isinstance(one, Tensor) and one.ndim for one in several):
        return tuple(several)
    hint = "give tensors with a batch, such as (torch.zeros(2, 7, dtype=torch.int64),)"
    raise MemcError("E305", f"example inputs are {short(given)}", where, hint)


def _ports(module: nn.Module, example_inputs: tuple[Tensor, ...], where: str) -> tuple[list[Port], list[str | None]]:
    names = [n for n, p in inspect.signature(module.forward).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    if not example_inputs or len(example_inputs) > len(names):
        raise MemcError("E305", f"{len(example_inputs)} example inputs for forward({', '.join(names)})", where)
    first = example_inputs[0]
    has_length = first.ndim == 3 or (first.ndim == 2 and not first.is_floating_point())
    named = first.shape[:2] if has_length else first.shape[:1]
    sizes = dict(zip(named, ("B", "T"), strict=False))
    if min(named) < 2 or any(list(first.shape).count(size) > 1 for size in named):
        what = "batch and length" if has_length else "a batch"
        reason = f"example input {list(first.shape)} is ambiguous: {what} cannot be told from its other sizes"
        raise MemcError("E305", reason, where, f"give {what} of at least 2 that no other axis has, such as 2 and 7")
    ports: list[Port] = []
    for parameter, value in zip(names, example_inputs, strict=False):
        roles = {port.role for port in ports}
        shape: tuple[Dim, ...] = tuple(sizes.get(size, size) for size in value.shape)
        if value.dtype == torch.int64 and shape == ("B", "T") and "positions" not in roles:
            role = "positions" if "tokens" in roles else "tokens"
            ports.append(Port(role, role, value.dtype, shape))  # type: ignore[arg-type]
        else:
            ports.append(Port(parameter, "other", value.dtype, shape))
    return ports, list(names[: len(ports)])

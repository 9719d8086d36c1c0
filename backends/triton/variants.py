"""What there is to compile: the launches that a program makes on a GPU, found by running its host code on nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import GraphModule, Node

from memc.dialect import OpSpec, op_spec
from memc.dialect.base import Arguments
from memc.dialect.in_place import IN_PLACE
from memc.kernels.launch import Gpu, Launch, Notes, device_kernels, launching
from memc.kernels.tiles import Asked
from memc.program import InputSpec, Program, StateSpec

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}
"""Pointers to each type, as Triton writes them."""

LENGTHS = (1, 2, 3, 4, 5, 8, 16, 17, 32, 64, 65, 128, 256, 1024, 8192, 65536)
"""Tokens of a call that host code is asked about: it may choose another kernel for short calls, and wider tiles."""

BATCHES = (1, 2, 8, 64)
HELD = (1, 64, 4096, 131072)


class Variant(BaseModel):
    """A kernel with the types of its arguments, its constants and its options: one thing to compile.

    ``arguments`` are types in Triton's words by name, in order: a pointer or ``i32``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kernel: str
    arguments: dict[str, str]
    constants: dict[str, bool | int | float | str]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """Name it by its contents."""
        text = json.dumps(self.model_dump(), sort_keys=False)
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Needed:
    """A variant and the tile that cuts it, by kernel and shape."""

    variant: Variant
    tile: tuple[str, str]


def variant_of(launch: Launch) -> Variant:
    """Return what a launch needs compiled."""
    kinds = {name: TYPES[x.dtype] if isinstance(x, Tensor) else "i32" for name, x in launch.arguments.items()}
    return Variant(
        kernel=launch.kernel,
        arguments=kinds,
        constants=dict(launch.constants),
        warps=launch.warps,
        stages=launch.stages,
    )


def variants(program: Program, module: GraphModule, gpu: Gpu, tiles: Asked) -> dict[str, Needed]:
    """Find what the nodes of a prepared ``module`` launch on a GPU, at any number of sequences and tokens, by key.

    ``program`` is what the module was prepared from: it names the sizes of the inputs and states.
    """
    symbols = _symbols(program)
    found: dict[str, Needed] = {}
    asked: set[str] = set()
    for node in module.graph.nodes:
        spec = spec_of(node)
        if spec is None or device_kernels(spec.name) is None:
            continue
        for sizes in _sizes():
            values = {symbol: sizes.get(name, sizes["T"]) for symbol, name in symbols.items()}
            arguments = on_nothing(spec, node, values)
            question = repr((node.target, *_described(arguments)))
            if question in asked:
                continue
            asked.add(question)
            for launch in noted(node, gpu, tiles, arguments):
                needed = Needed(variant_of(launch), (launch.kernel, tiles.last.get(launch.kernel, "")))
                found.setdefault(needed.variant.key, needed)
    return found


def spec_of(node: Node) -> OpSpec | None:
    """Return the dialect op of a node, in place or not, None for any other node."""
    if node.op != "call_function":
        return None
    return op_spec(node.target) or IN_PLACE.get(node.target)  # type: ignore[call-overload]


def noted(node: Node, gpu: Gpu, tiles: Asked, arguments: Arguments) -> list[Launch]:
    """Return what a node's host code launches for arguments on the device ``meta``; nothing where it refuses them."""
    spec = spec_of(node)
    kernels = device_kernels(spec.name) if spec is not None else None
    if kernels is None or kernels.refuses(gpu, arguments):
        return []
    # An op that has nothing for it in place runs its functional form, and the next state is copied.
    own = kernels.in_place if node.target in IN_PLACE and kernels.in_place else kernels.forward
    notes = Notes(gpu, tiles)
    with launching(notes):
        own(arguments)
    return notes.launches


def _sizes() -> Iterator[dict[str, int]]:
    for tokens in LENGTHS:
        yield {"B": 2, "T": tokens, "S": 4096}
    for batch in BATCHES:
        for held in HELD:
            yield {"B": batch, "T": 1, "S": held}


def _symbols(program: Program) -> dict[Any, str]:
    """Return the name of each symbol of the sizes of a program's inputs and states."""
    specs: tuple[InputSpec | StateSpec, ...] = (*program.inputs, *program.states)
    return {
        size.node.expr: name
        for node, spec in zip(program.placeholders(), specs, strict=True)
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True)
        if isinstance(size, torch.SymInt) and isinstance(name, str) and size.node.expr.is_Symbol
    }


def on_nothing(spec: OpSpec, node: Node, values: Mapping[Any, int] | None = None) -> Arguments:
    """Return the arguments of an op's node as ``meta`` tensors of their recorded types.

    ``values`` gives the symbols of sizes values; None: those that they were recorded with.
    """

    def change(item: Any) -> Any:
        if not isinstance(item, Node):
            return item
        value = item.meta["val"]
        sizes = [size if isinstance(size, int) else _value(size, values) for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")

    return spec.arguments(*map(change, node.args), **{name: change(value) for name, value in node.kwargs.items()})


def _value(size: torch.SymInt, values: Mapping[Any, int] | None) -> int:
    return int(size.node.expr.subs(values)) if values is not None else int(size.node.hint)


def _described(arguments: Arguments) -> tuple[Any, ...]:
    tensors, options = arguments.unpack()
    return *(None if x is None else (tuple(x.shape), x.dtype) for x in tensors), options

"""What every dialect op declares: its arguments, from which its schema follows, states, gradients, split rule, cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

LIBRARY = torch.library.Library("memc", "DEF")

FETCHED = 8192
"""Held tokens past which what every token of a prompt chose is fetched for it, faster than reading all for all."""


@dataclass(frozen=True)
class Cost:
    """Work of one op for one new token of one sequence, at a given number of held tokens."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Arguments(ABC):
    """The arguments of one call of an op, which a subclass for each op declares: its tensors, then its options.

    Tensors (``Tensor`` or ``Tensor | None``) are positional, options (``float``, ``int``, ``bool`` or ``str``) by
    keyword alone. What the op means is said there too.
    """

    rounds: ClassVar[bool] = False
    """Whether states are rounded to few levels, so that what differs in its last bit may be held as another number."""

    @abstractmethod
    def outputs(self) -> Tensor | tuple[Tensor, ...]:
        """Return uninitialised tensors of the shapes and types that the op returns: its fake kernel.

        Raises ``RuntimeError`` where arguments do not fit together.
        """

    @property
    def reads_all_to(self) -> int | None:
        """From how many tokens of a sequence on it chooses what it reads, None where it does not choose.

        Shorter sequences cannot show whether it chooses right.
        """
        return None

    @property
    def holds_all_to(self) -> int | None:
        """How many tokens of a sequence its state holds before the first has to go, None where none ever does."""
        return None

    @abstractmethod
    def cost(self, context: int) -> Cost:
        """Return the work of one token of one sequence when it holds ``context`` tokens, by shapes and types alone."""

    def prompt_flops(self, context: int) -> float:
        """Return the operations of one token of a prompt.

        Where the tokens of a prompt choose what they read, each for itself, they are faster if all read everything and
        leave out the rest than if each fetches its own, as a single token does.
        """
        reach = self.reads_all_to
        if reach is None or context <= reach:
            return self.cost(context).flops
        return self.cost(reach).flops * max(reach, min(context, FETCHED)) / reach

    @classmethod
    def tensors(cls) -> tuple[str, ...]:
        """Return the names of the arguments that are tensors, in the order of a call."""
        positional: tuple[str, ...] = cls.__match_args__
        return positional

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        first: Tensor = getattr(self, self.tensors()[0])
        return first.device

    def unpack(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """Return tensors and options as a call of the op takes them."""
        tensors = tuple(getattr(self, name) for name in self.tensors())
        return tensors, {f.name: getattr(self, f.name) for f in fields(self) if f.kw_only}


@dataclass(frozen=True)
class OpSpec:
    """One row of the dialect table.

    ``arguments`` are those of a call, ``returns`` the names of what it returns. ``states`` pairs each state argument
    with the index of the output that carries its next value. ``grads_from`` names the outputs that gradients come
    from, ``grads_to`` the tensors that get one.
    ``split_invariant``: any way to cut a sequence into calls gives the same outputs; otherwise ``depends_on`` says on
    what the result depends.
    """

    name: str
    arguments: type[Arguments]
    returns: tuple[str, ...]
    states: Mapping[str, int]
    grads_from: tuple[str, ...]
    grads_to: tuple[str, ...]
    split_invariant: bool
    mixes_tokens: bool
    depends_on: str = ""

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that appears as a graph node's target."""
        overload: torch._ops.OpOverload = getattr(torch.ops.memc, self.name).default
        return overload

    def schema(self, leading: Sequence[str] = (), returns: int | None = None, written: Sequence[str] = ()) -> str:
        """Write the arguments and results of the op as torch has them.

        ``leading`` are names of tensors that come first, ``returns`` how many tensors are returned where it is not
        all, and ``written`` the arguments that are changed in place.
        """
        aliases = dict(zip(written, "abcdefgh", strict=False))
        tensors, options = [f"Tensor {name}" for name in leading], list[str]()
        for f in fields(self.arguments):
            kind = f"Tensor({aliases[f.name]}!)" if f.name in aliases else _SCHEMA_TYPES[str(f.type)]
            default = "" if f.default is MISSING else f"={f.default!r}"
            (options if f.kw_only else tensors).append(f"{kind} {f.name}{default}")
        count = len(self.returns) if returns is None else returns
        results = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        return f"({', '.join([*tensors, *(['*', *options] if options else [])])}) -> {results}"

    def taking(self, run: Callable[..., Any], gradients: int = 0) -> Callable[..., Any]:
        """Return ``run``, which takes :class:`Arguments`, as a function of the op's own arguments.

        That many ``gradients`` come before them, and for ``run`` behind.
        """

        def unpacked(*args: Any, **options: Any) -> Any:
            return run(self.arguments(*args[gradients:], **options), *args[:gradients])

        return unpacked

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Name the arguments of a call, defaults filled in."""
        call = self.arguments(*args, **kwargs)
        return {f.name: getattr(call, f.name) for f in fields(call)}


_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
}


def define(
    name: str,
    arguments: type[Arguments],
    *,
    returns: tuple[str, ...] = ("out",),
    states: tuple[str, ...] = (),
    grads_from: tuple[str, ...] = ("out",),
    grads_to: tuple[str, ...],
    split_invariant: bool = True,
    mixes_tokens: bool = True,
    depends_on: str = "",
) -> OpSpec:
    """Define ``memc::name``; the state ``past_x`` goes on in what is returned as ``next_x``."""
    following = {state: returns.index(f"next_{state.removeprefix('past_')}") for state in states}
    spec = OpSpec(
        name,
        arguments,
        returns,
        following,
        grads_from,
        grads_to,
        split_invariant,
        mixes_tokens,
        depends_on,
    )
    LIBRARY.define(f"{name}{spec.schema()}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"memc::{name}", spec.taking(arguments.outputs))
    return spec


def check(condition: bool, message: str) -> None:
    """Raise ``RuntimeError`` with ``message`` when an op is given arguments that do not fit."""
    torch._check(condition, lambda: message)


def check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check ranks, head grouping and sizes of ``query [B,H,T,D]``, ``key [B,G,T,D]`` and ``value [B,G,T,E]``."""
    check(query.dim() == key.dim() == value.dim() == 4, "query, key and value are [batch, heads, tokens, channels]")
    check(query.shape[1] % key.shape[1] == 0, "the number of heads is a multiple of the number of key-value heads")
    check(key.shape[1] == value.shape[1], "key and value have the same number of heads")
    check(query.shape[3] == key.shape[3], "query and key have the same head size")


def appended(held: Tensor, new: Tensor) -> Tensor:
    """Return an uninitialised state: ``held [B,G,S,D]`` with ``new [B,G,T,D]`` behind it, contiguous."""
    return torch.empty(*new.shape[:2], held.shape[2] + new.shape[2], new.shape[3], dtype=new.dtype, device=new.device)


def log_sum_exp(query: Tensor) -> Tensor:
    """Return an uninitialised ``[B,H,T]`` in float32, or in float64 when the query is."""
    kind = torch.promote_types(query.dtype, torch.float32)
    return torch.empty(query.shape[:3], dtype=kind, device=query.device)

"""The IR: a torch.fx graph of ATen and ``memc::`` ops, and the specification of what flows in and out of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from memc.artifact import held
from memc.plugins import load_kernels

Dim = int | str
"""A fixed size, or the name of a symbolic one: ``B`` batch, ``T`` new tokens, ``S`` tokens held by a growing state, and
``S/n`` the pages of n tokens that those fill, the last one perhaps in part (:func:`memc.artifact.held`)."""

InputRole = Literal["tokens", "positions", "fetched", "other"]


@dataclass(frozen=True)
class InputSpec:
    """One placeholder of the graph that is not a state.

    One of role ``fetched`` has the sizes ``B`` and fixed ones, stands before the states, and is held with a sequence
    from call to call; all zeros is what a sequence has that nothing is fetched for.
    """

    name: str
    role: InputRole
    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class OutputSpec:
    """One leading output of the graph; the states follow in the order of ``Program.states``."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a token-mixing op takes and returns.

    ``shape`` starts with ``B``. ``grows`` names the axis of size ``S`` or ``S/n`` that gets longer with the tokens, or
    is None.
    ``init`` fills a fresh state: 0 for contents, -1 for positions (no token held).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...]
    init: float = 0.0
    grows: int | None = None

    @property
    def output(self) -> str:
        """Name of the graph output that carries the next value."""
        return f"{self.name}.next"

    def bytes(self, context: int, batch: int = 1) -> int:
        """Bytes that the state holds after ``context`` tokens."""
        count = 1
        for size in self.shape:
            count *= batch if size == "B" else held(size, context)
        return count * self.dtype.itemsize

    def empty(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Allocate the state of ``batch`` sequences that have seen nothing."""
        sizes = [batch if size == "B" else held(size, 0) for size in self.shape]
        return torch.full(sizes, self.init, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Provenance:
    """Where a parameter comes from: tensor of the source checkpoint, part of it, and what was done to it.

    ``source`` is empty for parameters that memc made. ``transform`` is ``identity``, ``transpose``, ``dequantize`` or
    the name of a pass; ``invertible`` tells whether the source tensor can be had back exactly. ``kept`` says what is
    left of it where positions were removed: axes, each with the ranges (start, stop) that stayed.
    """

    source: str
    transform: str = "identity"
    rows: tuple[int, int] | None = None
    invertible: bool = True
    kept: tuple[tuple[int, tuple[tuple[int, int], ...]], ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """Facts about the source model that no graph holds, or not any more: ``parameters`` are those before any pass."""

    source: str
    digest: str
    family: str
    vocab_size: int | None = None
    max_positions: int | None = None
    absolute_positions: bool = False
    decoder: bool = True
    parameters: int | None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of a sequence that the model can run, None where its positions are no rows of a table."""
        return self.max_positions if self.absolute_positions else None


@dataclass
class Program:
    """A captured model: its graph, the specification of its inputs, outputs and states, and its parameters' origin.

    The graph module's placeholders are ``inputs`` then ``states``; it returns a flat tuple of ``outputs`` then the next
    ``states``. It is an ordinary differentiable module. With fake parameters it can be planned on, not run.
    ``raised`` tells that attention, rotary and norms are ``memc::`` ops and that everything depends on ``positions``
    alone, so that any sequence may be run in pieces.
    """

    module: GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[StateSpec, ...]
    model: ModelInfo
    provenance: dict[str, Provenance] = field(default_factory=dict)
    raised: bool = False

    def __call__(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Run the graph on ``inputs`` then ``states``."""
        load_kernels()
        result: tuple[Tensor, ...] = self.module(*args)
        return result

    def make_tensors_on(self, device: torch.device) -> None:
        """Have the graph make on ``device`` the tensors that it makes on its own, in place."""

        def change(item: Any) -> Any:
            return device if isinstance(item, torch.device) else item

        for node in self.module.graph.nodes:
            node.args, node.kwargs = map_aggregate(node.args, change), map_aggregate(node.kwargs, change)
        self.module.recompile()

    def new_state(self, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """Allocate the states of ``batch`` fresh sequences."""
        return tuple(spec.empty(batch, device) for spec in self.states)

    def nothing_fetched(self, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """Return the fetched inputs of ``batch`` sequences that nothing is fetched for: zeros."""
        shapes = [[batch if size == "B" else int(size) for size in spec.shape] for spec in self.fetched]
        return tuple(
            torch.zeros(shape, dtype=spec.dtype, device=device)
            for shape, spec in zip(shapes, self.fetched, strict=True)
        )

    def run(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the logits ``[B, T, vocab]`` of ``tokens [B, T]`` from an empty state, with nothing fetched.

        ``positions [B, T]`` defaults to 0, 1, 2, ...; -1 marks padding.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        batch, device = tokens.shape[0], tokens.device
        return self(tokens, positions, *self.nothing_fetched(batch, device), *self.new_state(batch, device))[0]

    @property
    def fetched(self) -> tuple[InputSpec, ...]:
        """The inputs that are fetched for each sequence."""
        return tuple(spec for spec in self.inputs if spec.role == "fetched")

    @property
    def fetched_bytes(self) -> int:
        """Bytes that are fetched for one sequence, once, and read for each of its tokens."""
        sizes = (math.prod(size for size in spec.shape if isinstance(size, int)) for spec in self.fetched)
        return sum(size * spec.dtype.itemsize for size, spec in zip(sizes, self.fetched, strict=True))

    @property
    def is_fake(self) -> bool:
        """Whether the parameters are placeholders without values."""
        from torch._subclasses.fake_tensor import FakeTensor

        return any(isinstance(p, FakeTensor) or p.is_meta for p in self.module.parameters())

    @property
    def parameter_count(self) -> int:
        """Number of distinct parameters (tied ones once)."""
        return sum(p.numel() for p in self.module.parameters())

    def state_bytes(self, context: int) -> int:
        """Bytes of state that one sequence holds after ``context`` tokens."""
        return sum(spec.bytes(context) for spec in self.states)

    def placeholders(self) -> list[Node]:
        """Return the placeholder nodes, inputs then states."""
        return self.module.graph.find_nodes(op="placeholder")

    def with_states(self, states: Sequence[StateSpec]) -> Program:
        """Return the program with another state specification over the same module."""
        return replace(self, states=tuple(states))

    def copy(self) -> Program:
        """Copy graph and specification; parameters are shared, never cloned."""
        module = GraphModule(self.module, clone_graph(self.module))
        return replace(self, module=module, provenance=dict(self.provenance))


def clone_graph(module: GraphModule) -> torch.fx.Graph:
    """Copy a module's graph, keeping every node's name and metadata."""
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    graph.output(output)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return graph


def named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer by its qualified name, tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def readers(module: GraphModule) -> Counter[int]:
    """Count how often a graph reads each of its tensors, by the tensor's ``id``; tied ones are one."""
    reads = [node for node in module.graph.find_nodes(op="get_attr") for _ in node.users]
    return Counter(id(get_tensor(module, str(node.target))) for node in reads)


def get_tensor(module: torch.nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer called ``name``.

    Raises ``AttributeError`` when there is none.
    """
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise AttributeError(f"{name} is not a tensor")
    return value


def set_tensor(module: torch.nn.Module, name: str, value: Tensor, *, trainable: bool | None = None) -> None:
    """Set the parameter or buffer called ``name``, making the modules on its way.

    ``trainable`` None keeps a parameter a parameter and makes anything new a buffer.
    """
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else ():
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if trainable is None:
        trainable = leaf in owner._parameters
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if trainable:
        is_float = value.is_floating_point()
        owner.register_parameter(leaf, torch.nn.Parameter(value.detach(), requires_grad=is_float))
    else:
        owner.register_buffer(leaf, value)


def retie(module: torch.nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set many tensors; names that share one tensor share one parameter afterwards."""
    made: dict[int, torch.nn.Parameter] = {}
    for name, value in values.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._parameters:
            if id(value) not in made:
                made[id(value)] = torch.nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
            owner._parameters[leaf] = made[id(value)]
        else:
            owner._buffers[leaf] = value

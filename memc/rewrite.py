"""Graph surgery that passes share: states, new parameters, and plain torch code traced into a program's graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter

from memc.artifact import held
from memc.dialect import arguments, op_spec
from memc.infer import infer, mode_of
from memc.program import Dim, InputSpec, Program, Provenance, StateSpec, get_tensor, named_tensors, set_tensor


@dataclass(frozen=True)
class New:
    """A parameter that a pass adds: its shape, and how to make its values from a seeded generator."""

    shape: tuple[int, ...]
    make: Callable[[torch.Generator], Tensor]

    @property
    def count(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


def constant(shape: tuple[int, ...], value: float) -> New:
    """Describe a parameter that starts with one value everywhere."""
    return New(shape, lambda _: torch.full(shape, value))


@dataclass
class _State:
    spec: StateSpec
    placeholder: Node
    next: Node


class Editor:
    """Edits a copy of a program; the program given stays as it was.

    The nodes to work on are those of ``editor.program``. Call :meth:`finish` once, at the end.
    """

    def __init__(self, program: Program) -> None:
        """Copy the program and find its states."""
        self.program = program.copy()
        self.graph = self.program.module.graph
        nodes = self.program.placeholders()[len(program.inputs) :]
        results = self.graph.output_node().args[0]
        assert isinstance(results, tuple | list)
        self._outputs: list[Any] = list(results[: len(program.outputs)])
        after: list[Any] = list(results[len(program.outputs) :])
        self._states = [_State(*row) for row in zip(program.states, nodes, after, strict=True)]
        self._sources: dict[str, Provenance] = {}
        self._gone: list[Node] = []
        self._traced: dict[Hashable, GraphModule] = {}

    def states_of(self, node: Node) -> dict[str, StateSpec]:
        """Return the specifications of a dialect node's states by argument name."""
        row = op_spec(node.target)
        assert row is not None
        bound = arguments(node)
        return {name: self.spec_of(bound[name]) for name in row.states}

    def spec_of(self, placeholder: Node) -> StateSpec:
        """Return the specification of the state of a placeholder."""
        return self._state(placeholder).spec

    def reshape_state(self, placeholder: Node, spec: StateSpec) -> None:
        """Give a state another specification; its place among the states stays."""
        self._state(placeholder).spec = spec
        placeholder.meta = {**placeholder.meta, "val": self._fresh(spec, placeholder)}

    def add_state(self, spec: StateSpec, after: Node) -> Node:
        """Add a state behind the one of the placeholder ``after`` and return its placeholder.

        It carries itself over unchanged until :meth:`set_next`.
        """
        with self.graph.inserting_after(after):
            node = self.graph.placeholder(spec.name)
        node.meta["val"] = self._fresh(spec, after)
        self._states.insert(self._states.index(self._state(after)) + 1, _State(spec, node, node))
        return node

    def add_fetched(self, name: str, shape: tuple[Dim, ...]) -> Node:
        """Add a float32 input ``[B, ...]`` that is fetched for each sequence, behind the others; return its node."""
        inputs = self.program.inputs
        last = self.program.placeholders()[len(inputs) - 1]
        self.program.inputs = (*inputs, InputSpec(name, "fetched", torch.float32, shape))
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        like: Tensor = last.meta["val"]
        mode = mode_of(like)
        assert mode is not None
        with mode:
            node.meta["val"] = like.new_empty([like.shape[0], *map(int, shape[1:])], dtype=torch.float32)
        return node

    def remove_fetched(self, placeholder: Node) -> None:
        """Drop a fetched input that nothing is to read any more."""
        self.program.inputs = tuple(spec for spec in self.program.inputs if spec.name != placeholder.target)
        self._gone.append(placeholder)

    def set_next(self, placeholder: Node, value: Node) -> None:
        """Make ``value`` the next value of a state."""
        self._state(placeholder).next = value

    def output(self, index: int) -> Node:
        """Return the node of one of the program's outputs."""
        node: Node = self._outputs[index]
        return node

    def set_output(self, index: int, value: Node) -> None:
        """Make ``value`` one of the program's outputs."""
        self._outputs[index] = value

    def remove_state(self, placeholder: Node) -> None:
        """Drop a state that nothing is to read or write any more."""
        self._states.remove(self._state(placeholder))
        self._gone.append(placeholder)

    def source_of(self, name: str) -> Provenance:
        """Return where a parameter comes from, as it is by now."""
        return self._sources.get(name) or self.program.provenance.get(name, Provenance(""))

    def replace_parameter(self, name: str, value: Tensor, source: Provenance) -> None:
        """Give a parameter or buffer another value, of any shape, under every name that shares its memory."""
        module = self.program.module
        old = get_tensor(module, name)
        names = [other for other, tensor in named_tensors(module) if tensor is old]
        for other in names:
            set_tensor(module, other, value)
            self._sources[other] = source
        if isinstance(old, Parameter):
            made = get_tensor(module, names[0])
            for other in names[1:]:  # tied ones stay one parameter
                path, _, leaf = other.rpartition(".")
                module.get_submodule(path).register_parameter(leaf, made)  # type: ignore[arg-type]

    def add_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        make: Callable[[], Tensor],
        transform: str,
        before: Node,
        dtype: torch.dtype = torch.float32,
    ) -> Node:
        """Register a new parameter and return the node that reads it.

        ``make`` is called for the values only when the program's own parameters have values; ``transform`` is the name
        of the pass, for the parameter's provenance. It is float32 unless it has to be of the type of what it joins.
        """
        module = self.program.module
        like = next(module.parameters(), None)
        if isinstance(like, FakeTensor):
            with like.fake_mode:
                value = torch.empty(shape, device=like.device, dtype=dtype)
        else:
            device = torch.device("cpu") if like is None else like.device
            empty = device.type == "meta"
            value = torch.empty(shape, device=device, dtype=dtype) if empty else make().to(device)
        assert tuple(value.shape) == shape and value.dtype == dtype
        set_tensor(module, name, value, trainable=True)
        self._sources[name] = Provenance("", transform)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        mode = mode_of(before.all_input_nodes[0].meta["val"])
        assert mode is not None
        with mode:
            node.meta["val"] = torch.empty(shape, dtype=dtype)
        return node

    def add_parameters(
        self, prefix: str, new: Mapping[str, New], seed: int, transform: str, before: Node
    ) -> dict[str, Node]:
        """Register new float32 parameters ``prefix.NAME``, made in order from one generator; return their nodes."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: self.add_parameter(f"{prefix}.{name}", item.shape, partial(item.make, generator), transform, before)
            for name, item in new.items()
        }

    def insert(
        self,
        function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
        inputs: Mapping[str, Node],
        before: Node,
        path: str,
        key: Hashable,
    ) -> tuple[Node, ...]:
        """Trace ``function`` into the graph in front of ``before`` and return the nodes of its results.

        ``function`` gets tensors by the names of ``inputs`` and must not look at symbolic sizes. ``path`` names the
        block in reports. Functions of equal ``key`` are the same: layers that are alike are traced once.
        """
        traced = self._trace(function, {name: node.meta["val"] for name, node in inputs.items()}, key)
        mapping = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs.values(), strict=True))
        given = set(mapping)
        with self.graph.inserting_before(before):
            results = self.graph.graph_copy(traced.graph, mapping)
        for old, new in mapping.items():
            if old not in given:
                new.meta = {"val": old.meta.get("val"), "memc": {"path": path, "source": ""}}
        assert isinstance(results, tuple | list)
        return tuple(node for node in results if isinstance(node, Node))

    def finish(self) -> Program:
        """Drop what nobody reads any more, check the graph, infer every shape, and return the program."""
        self.graph.output_node().args = ((*self._outputs, *(state.next for state in self._states)),)
        self.graph.eliminate_dead_code()
        for node in self._gone:
            self.graph.erase_node(node)
        self.graph.lint()
        before = {name for name, _ in named_tensors(self.program.module)}
        module = GraphModule(self.program.module, self.graph)
        gone = before - {name for name, _ in named_tensors(module)}
        sources = {**self.program.provenance, **self._sources}
        result = replace(
            self.program,
            module=module,
            states=tuple(state.spec for state in self._states),
            provenance={name: source for name, source in sources.items() if name not in gone},
        )
        infer(result)
        return result

    def _trace(
        self,
        function: Callable[[Mapping[str, Tensor]], tuple[Tensor, ...]],
        values: Mapping[str, Tensor],
        key: Hashable,
    ) -> GraphModule:
        shapes = tuple((name, value.dtype, tuple(map(str, value.shape))) for name, value in values.items())
        if (key, shapes) not in self._traced:
            mode = next(found for value in values.values() if (found := mode_of(value)) is not None)

            def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
                return function(dict(zip(values, tensors, strict=True)))

            with mode, enable_python_dispatcher(), torch.no_grad():
                # Nodes that are alike share one fake value, and a tracer tells its inputs apart by identity.
                traced = make_fx(flat, pre_dispatch=True)(*(value.detach() for value in values.values()))
            assert not traced.graph.find_nodes(op="get_attr"), "constants of a traced function have no name"
            self._traced[key, shapes] = traced
        return self._traced[key, shapes]

    def _state(self, placeholder: Node) -> _State:
        return next(state for state in self._states if state.placeholder is placeholder)

    def _fresh(self, spec: StateSpec, like: Node) -> Tensor:
        value: Tensor = like.meta["val"]
        mode = mode_of(value)
        assert mode is not None
        tokens = None
        if spec.grows is not None:  # as what it is like does
            grows = self._state(like).spec.grows
            assert grows is not None
            tokens = value.shape[grows]
        with mode:
            return torch.empty(
                [value.shape[0] if size == "B" else held(size, tokens) for size in spec.shape], dtype=spec.dtype
            )


def result_of(node: Node, index: int) -> Node | None:
    """Return the node that takes result ``index`` of a node with several results, or None when nobody does."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    return None


def window_states(editor: Editor, attention: Node, slots: int) -> tuple[StateSpec, ...]:
    """Make the growing states of a ``memc::attention`` node hold ``slots`` tokens and no more.

    Returns the new specifications: key, value, positions. Their next values are still to be set.
    """
    bound, changed = arguments(attention), []
    for name, spec in editor.states_of(attention).items():
        assert spec.grows is not None
        shape = tuple(slots if size == "S" else size for size in spec.shape)
        changed.append(replace(spec, shape=shape, grows=None))
        editor.reshape_state(bound[name], changed[-1])
    return tuple(changed)


def owns_its_states(program: Program, attention: Node) -> bool:
    """Tell whether only a dialect node reads its states, and only the program's output their next values."""
    row = op_spec(attention.target)
    if row is None:
        return False
    bound, output = arguments(attention), program.module.graph.output_node()
    read = all(set(bound[name].users) == {attention} for name in row.states)
    return read and all(
        set(taken.users) == {output} for index in row.states.values() if (taken := result_of(attention, index))
    )

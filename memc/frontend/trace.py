"""Trace a module with dynamic batch and length into a raw program."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from memc.errors import MemcError
from memc.frontend.functional import InPlaceError
from memc.frontend.graph import checkpoint_names, unlift
from memc.frontend.source import failing_line
from memc.program import Dim as Size
from memc.program import InputRole, InputSpec, ModelInfo, OutputSpec, Program, Provenance

EXAMPLE = {"B": 2, "T": 7, "U": 5}
"""Example sizes of the symbols: at least 2 and distinct, or export specialises."""

_GUARD = re.compile(r"Not all values of (\w+) = .*?satisfy the generated guard (.*?)\.?$", re.MULTILINE)
_SIMPLE = re.compile(r"L\['args'\]\[\d+\]\.size\(\)\[\d+\] (<=|<|!=) (\d+)$")


_SIZE = re.compile(r"L\['args'\]\[\d+\]\.size\(\)\[\d+\]")
_ARITHMETIC = re.compile(r"(?:n|min|max|\d+|[-+*/%(),<>=!\s])+")
_TRIED = (*range(1, 257), *(2**power for power in range(9, 24)))


@dataclass(frozen=True)
class Port:
    """One input of a module to trace: ``shape`` holds numbers and the symbols ``B``, ``T``, ``U``."""

    name: str
    role: InputRole
    dtype: torch.dtype
    shape: tuple[Size, ...]

    def example(self) -> Tensor:
        """Make an example: zeros for tokens, 0, 1, 2, ... for positions."""
        sizes = [EXAMPLE[size] if isinstance(size, str) else size for size in self.shape]
        if self.role == "positions":
            return torch.arange(sizes[-1]).expand(sizes).contiguous()
        return torch.zeros(sizes, dtype=self.dtype)


class _Ported(nn.Module):
    """Call ``inner`` with a fixed mapping from the program's inputs to its arguments."""

    def __init__(self, inner: nn.Module, arguments: Sequence[str | None], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.arguments = tuple(arguments)
        self.constants = dict(constants)

    def forward(self, *args: Tensor) -> Any:
        """Return the module's first output."""
        keywords = {name: value for name, value in zip(self.arguments, args, strict=True) if name}
        return first_output(self.inner(**keywords, **self.constants))


def first_output(result: Any) -> Any:
    """Return the first tensor of a model's result: itself, of a tuple, or of a Hugging Face ``ModelOutput``."""
    if isinstance(result, Mapping):
        result = next(iter(result.values()))
    while isinstance(result, tuple | list):
        result = result[0]
    return result


def trace(
    module: nn.Module,
    ports: Sequence[Port],
    arguments: Sequence[str | None],
    info: ModelInfo,
    *,
    constants: Mapping[str, Any] | None = None,
) -> Program:
    """Trace ``module`` into a raw program whose inputs are ``ports``.

    ``arguments`` names the keyword of ``module.forward`` that each port feeds, or None for one that it does not take;
    ``constants`` are further keywords. Parameters may be fake.

    Raises ``MemcError`` E305 that names the line of the model's source that stops it.
    """
    wrapper = _Ported(module, arguments, constants or {})
    exported, longest = export(wrapper, ports, info)

    def unlifted(program: ExportedProgram) -> GraphModule:
        return unlift(program.graph_module, program.graph_signature, program.constants, module, info.source)

    try:
        graph_module = unlifted(exported)
    except InPlaceError:
        # Writes into views: torch undoes them by tracing once more, which takes a while and is seldom asked for.
        graph_module = unlifted(exported.run_decompositions({}))
    return finish(graph_module, ports, module, info, longest)


def finish(
    module: GraphModule, ports: Sequence[Port], inner: nn.Module, info: ModelInfo, longest: int | None
) -> Program:
    """Name the inputs of an unlifted graph, describe its outputs and origins, and make it a program."""
    inputs = tuple(InputSpec(port.name, port.role, port.dtype, port.shape) for port in ports)
    for node, port in zip(module.graph.find_nodes(op="placeholder"), ports, strict=True):
        rename(module, node, port.name)
    module.recompile()
    limit = min((n for n in (longest, info.max_positions) if n is not None), default=None)
    absolute = longest is not None or reads_position_table(module)
    provenance = {name: Provenance(name) for name in checkpoint_names(module, inner)}
    info = replace(info, absolute_positions=absolute, max_positions=limit)
    return Program(module, inputs, _output_specs(module, inputs), (), info, provenance)


def add_input(module: GraphModule, name: str) -> None:
    """Give a graph a second input that nothing reads, of the same size and dtype as its first."""
    first = module.graph.find_nodes(op="placeholder")[0]
    with module.graph.inserting_after(first):
        made = module.graph.placeholder(name)
    made.meta = dict(first.meta)
    module.recompile()


def export(wrapper: nn.Module, ports: Sequence[Port], info: ModelInfo) -> tuple[ExportedProgram, int | None]:
    """Export with every symbol of the ports dynamic from 1, and return the longest length that the model can take.

    The length has no bound unless the model cuts a table of its own (learned positions, a mask buffer) to the length:
    then tracing says so, and is done again with that bound.
    """
    mode = fake_mode_of(wrapper)
    with mode or nullcontext():
        examples = tuple(port.example() for port in ports)
    wrapper.eval()
    bounds: dict[str, int | None] = dict.fromkeys(EXAMPLE)
    longest: int | None = None
    deferred = False
    while True:
        dims = {name: Dim(name, min=1, max=bound) for name, bound in bounds.items()}
        shapes = tuple({i: dims[s] for i, s in enumerate(port.shape) if isinstance(s, str)} for port in ports)
        try:
            with torch.no_grad(), _silence():
                exported = torch.export.export(
                    wrapper,
                    examples,
                    dynamic_shapes=(shapes,),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )
                return exported, longest
        except Exception as error:
            found = _tighter_bounds(str(error), bounds)
            if found:
                longest = min(longest or found[1], found[1])
                bounds = found[0]
            elif not deferred and (guards := _GUARD.findall(str(error))) and all(_is_fact(g) for _, g in guards):
                # Then nothing is lost when guards become asserts of the graph, which are dropped.
                deferred = True
            else:
                raise capture_failure(error, info.source) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what torch logs and prints of a failing export, graphs and stacks, from the terminal: one line is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _tighter_bounds(message: str, bounds: dict[str, int | None]) -> tuple[dict[str, int | None], int] | None:
    """Read from an export error which bound a symbol needs; None when the error is about something else.

    A table that is cut to the length gives ``<= size`` and then ``!= size`` (there the cut would be the whole), which
    is no limit: the graph takes that length too. Of a guard with more to it, the largest number is tried. Returns
    the bounds to try, and the longest length.
    """
    for name, guard in _GUARD.findall(message):
        simple = _SIMPLE.search(guard)
        numbers = [int(n) for n in re.findall(r"\b\d+\b", guard)]
        if name not in bounds or not numbers or _is_fact(guard):
            continue
        operator, limit = (simple[1], int(simple[2])) if simple else ("<=", max(numbers))
        bound = bounds[name]
        if operator == "!=" and limit != bound:
            continue
        tried = limit if operator == "<=" else limit - 1
        if tried >= EXAMPLE[name] and (bound is None or tried < bound):
            return {**bounds, name: tried}, limit if operator == "!=" else tried
    return None


def _is_fact(guard: str) -> bool:
    """Tell whether a guard holds for every size, though torch could not prove it.

    torch 2.11 asks for ``min(10*T, 20*T) == 10*T`` where keys are repeated for the heads that share them.
    """
    expression = _SIZE.sub("n", guard)
    if len(set(_SIZE.findall(guard))) != 1 or not _ARITHMETIC.fullmatch(expression):
        return False
    numbers = [int(n) for n in re.findall(r"\b[1-9]\d*\b", expression)]
    tried = {*_TRIED, *(a // b + more for a in numbers for b in (1, *numbers) for more in (0, 1))} - {0}
    # Nothing but arithmetic on n is left to evaluate.
    return all(eval(expression, {"__builtins__": {}}, {"n": n, "min": min, "max": max}) for n in tried)


_TRACE_HINT = "make that line independent of tensor values and of the example's sizes; see memc doctor --coverage"


def capture_failure(error: BaseException, source: str, hint: str = _TRACE_HINT) -> MemcError:
    """Describe why the user's code failed: the telling line of the error, and their own line that it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Where torch lists several reasons, the first line only says that they follow.
    reason = next((line[2:] for line in lines if line.startswith("- ")), lines[0] if lines else type(error).__name__)
    return MemcError("E305", f"{type(error).__name__}: {reason[:300]}", failing_line(error) or source, hint)


def fake_mode_of(module: nn.Module) -> FakeTensorMode | None:
    """Return the mode that a module's fake parameters belong to, or None when they are real."""
    return next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), None)


def make_parameters_fake(module: nn.Module) -> None:
    """Replace every parameter by a fake one on cpu, tied ones by one; buffers stay as they are."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    made: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, value in owner._parameters.items():
            if value is None:
                continue
            if id(value) not in made:
                with mode:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                made[id(value)] = nn.Parameter(fake, requires_grad=value.is_floating_point())
            owner._parameters[name] = made[id(value)]


def rename(module: GraphModule, node: Node, name: str) -> None:
    """Name a placeholder exactly ``name``; whatever else bore the name gets another."""
    for other in module.graph.nodes:
        if other.name == name and other is not node:
            other._rename(f"{name}_value")
    node._rename(name)
    node.target = name


def _output_specs(module: GraphModule, inputs: Sequence[InputSpec]) -> tuple[OutputSpec, ...]:
    symbols: dict[str, str] = {}
    for node, spec in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        for size, name in zip(node.meta["val"].shape, spec.shape, strict=True):
            if isinstance(name, str):
                symbols[str(size)] = name
    specs = []
    for index, node in enumerate(module.graph.output_node().args[0]):  # type: ignore[arg-type]
        value = node.meta["val"]
        shape = tuple(s if isinstance(s, int) else symbols.get(str(s), str(s)) for s in value.shape)
        specs.append(OutputSpec("logits" if index == 0 else f"output_{index}", value.dtype, shape))
    return tuple(specs)


def reads_position_table(module: GraphModule) -> bool:
    """Tell whether a table that is part of the model is looked up by position, so that it limits the length.

    That is an ``embedding`` by anything but the tokens themselves, or another lookup by something that does not depend
    on them; a lookup by distance, such as a table of relative biases ``[T, T]``, is none.
    """
    from_tokens: set[Node] = set()
    are_tokens: set[Node] = set()
    constant: set[Node] = set()
    batch = str(module.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0])
    for node in module.graph.nodes:
        sources = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)]
        packet = getattr(node.target, "_overloadpacket", None)
        is_tokens = node.op == "placeholder" and node.target in ("tokens", "decoder_tokens")
        if is_tokens or (packet in _SAME and sources[0] in are_tokens):
            are_tokens.add(node)
        if is_tokens or any(source in from_tokens for source in sources):
            from_tokens.add(node)
        if node.op == "get_attr" or (sources and all(source in constant for source in sources)):
            constant.add(node)
        if packet not in _LOOKUPS or sources[0] not in constant:
            continue
        excluded = are_tokens if packet is torch.ops.aten.embedding else from_tokens
        if any(n not in excluded and n not in constant and _is_position(n, batch) for n in sources[1:]):
            return True
    return False


def _is_position(index: Node, batch: str) -> bool:
    """Tell whether an index has one length in its shape at most; those of lookups by distance have two."""
    lengths = [size for size in index.meta["val"].shape if not isinstance(size, int) and str(size) != batch]
    return len(lengths) <= 1


_SAME = (torch.ops.aten.view, torch.ops.aten.reshape, torch.ops.aten.slice, torch.ops.aten.to)
_LOOKUPS = (torch.ops.aten.embedding, torch.ops.aten.index, torch.ops.aten.index_select, torch.ops.aten.gather)

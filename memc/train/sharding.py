"""A program and its original that are too large for one device: each process holds a share of every parameter.

FSDP2 (``torch.distributed.fsdp.fully_shard``; Zhao et al. 2023, arXiv 2304.11277) gathers the parameters of a module
when it runs, forward and backward, and shares out their gradients and what an optimiser keeps of them. A program is one
flat graph, so it is cut into a module for each layer. (``torch.fx.passes.split_module`` cuts too, but leaves all
parameters in the root, where they would be gathered at once.) Original and rewritten program run side by side, layer by
layer, since nearly all of their weights are the same ones: those are held once and gathered once for both.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from memc.errors import MemcError
from memc.program import Program, get_tensor, named_tensors, retie
from memc.train.blocks import cut, leading_to, logits_node
from memc.train.products import Rounded, narrowed
from memc.verify.execute import layer_of

Values = dict[str, Any]
"""What a program has computed so far, by the names of its nodes."""


class Sharded:
    """The programs of a recovery, cut at their layers, of which this process holds its share.

    ``module`` is what runs. ``trained`` has the shares of what learns, by the names that they have in the rewritten
    program. All parameters are shared out alike, those too that learn: so there is one way for gradients to be
    averaged, and the moments of an optimiser are shared out with them.
    """

    def __init__(
        self,
        before: Program | None,
        after: Program,
        trained: Collection[str],
        products: torch.dtype | None,
        device: torch.device,
        count: int,
    ) -> None:
        """Cut the programs and take this process's share, one of ``count``, to ``device``; they stay as they are.

        ``before`` None is not run. Products with pretrained weights are of type ``products``. Raises ``MemcError`` E203
        for a program that has no layers, or a parameter that has no dimension.
        """
        sides = _cut([_prepared(each, products, device) for each in (before, after) if each is not None])
        learns = {id(get_tensor(after.module, name)): name for name in trained}
        common, mesh = _common(sides, learns), init_device_mesh(device.type, (count,))
        places: dict[int, tuple[nn.Module, str]] = {}
        layers = _Layers(sides, common)
        for stage in layers.stages:
            places |= _made_own(stage, learns)
            _shard(stage, mesh, again=True)
        _shard(layers, mesh, again=False)
        inner: nn.Module = layers
        # One for each type: gradients that are shared out together have to be of one.
        for kind in sorted({value.dtype for value in common.values()}, key=str):
            outer = _Common({key: value for key, value in common.items() if value.dtype == kind})
            places |= _made_own(outer, learns)
            outer.inner = inner
            # Read until the backward is over, so that gathering them again for it would gain nothing.
            _shard(outer, mesh, again=False)
            inner = outer
        self.module = inner
        self.trained = {name: places[key][0].get_parameter(places[key][1]) for key, name in learns.items()}

    def __call__(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Return the logits ``[B,T,V]`` of each program for ``tokens`` at ``positions [B,T]``, from empty states."""
        with warnings.catch_warnings():
            # That a layer's output may not be changed in place: no op of a graph does that.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
            found: tuple[Tensor, ...] = self.module(tokens, positions, {})
        return found


class _Common(nn.Module):
    """Parameters that no layer has for itself, around all that reads them: embedding, last norm, head."""

    inner: nn.Module

    def __init__(self, tensors: Mapping[int, nn.Parameter]) -> None:
        super().__init__()
        self._names = {key: str(index) for index, key in enumerate(tensors)}
        for key, name in self._names.items():
            self.register_parameter(name, tensors[key])

    def forward(self, tokens: Tensor, positions: Tensor, gathered: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Return what the modules inside do, which are given the parameters too."""
        own = {key: self.get_parameter(name) for key, name in self._names.items()}
        found: tuple[Tensor, ...] = self.inner(tokens, positions, {**gathered, **own})
        return found


class _Layers(nn.Module):
    """The stages of all programs, one after the other."""

    def __init__(self, sides: Sequence[_Side], common: Collection[int]) -> None:
        super().__init__()
        parts = [[side.part(stage, common) for side in sides] for stage in range(sides[0].tail + 1)]
        self._sides = sides
        self._taken = [[part.inputs for part in each] for each in parts]
        self.stages = nn.ModuleList(_Stage(each) for each in parts)

    def forward(self, tokens: Tensor, positions: Tensor, gathered: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of each program, given the parameters that are ``gathered``."""
        values = [side.given(tokens, positions, gathered) for side in self._sides]
        for index, stage in enumerate(self.stages):
            taken = zip(self._taken[index], values, strict=True)
            found = stage(*({name: held[name] for name in names} for names, held in taken))
            values = [
                {name: value for name, value in {**held, **new}.items() if name in side.read_after[index]}
                for side, held, new in zip(self._sides, values, found, strict=True)
            ]
        return tuple(held[side.result.name] for side, held in zip(self._sides, values, strict=True))


class _Part(nn.Module):
    """What one program does in one stage; ``inputs`` and ``outputs`` are names of its nodes."""

    def __init__(self, module: nn.Module | None, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.module, self.inputs, self.outputs = module, tuple(inputs), tuple(outputs)

    def forward(self, values: Values) -> Values:
        """Return the outputs for the inputs, in their order."""
        found = self.module(*values.values()) if self.module is not None else ()
        return dict(zip(self.outputs, found, strict=True))


class _Stage(nn.Module):
    """The part of each program in one layer, or before the first or after the last: what is gathered at once."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, *values: Values) -> tuple[Values, ...]:
        """Return the outputs of each part; only the last one, the rewritten program, learns.

        Its activations are computed again in the backward. Else it would hold the rounded weights of all layers.
        """
        *others, last = zip(self.parts, values, strict=True)
        made = checkpoint(*last, use_reentrant=False, preserve_rng_state=False)
        return (*(part(given) for part, given in others), made)


@dataclass(frozen=True)
class _Side:
    """One of the programs, cut into stages: 0 is before the first layer, ``tail`` after the last.

    ``stage_of`` has every op that the logits need; ``read_after`` the names of what is read after each stage.
    """

    program: Program
    result: Node
    stage_of: Mapping[Node, int]
    read_after: Sequence[Collection[str]]

    @property
    def tail(self) -> int:
        """The last stage."""
        return len(self.read_after) - 1

    def given(self, tokens: Tensor, positions: Tensor, gathered: Mapping[int, Tensor]) -> Values:
        """Return the values that are there before the first stage, by the names of nodes: inputs, states and common."""
        program, batch, device = self.program, len(tokens), tokens.device
        feed = (tokens, positions, *program.nothing_fetched(batch, device), *program.new_state(batch, device))
        values: Values = {node.name: value for node, value in zip(program.placeholders(), feed, strict=True)}
        reads = ((node.name, self.key(node)) for node in program.module.graph.find_nodes(op="get_attr"))
        return values | {name: gathered[key] for name, key in reads if key in gathered}

    def key(self, node: Node) -> int:
        """Return which tensor a node reads."""
        return id(get_tensor(self.program.module, str(node.target)))

    def part(self, stage: int, common: Collection[int]) -> _Part:
        """Cut out what is done in one stage, which is given what is ``common``."""
        read, ops = self.read_after[stage], self.stage_of
        results = [node for node, at in ops.items() if at == stage and node.name in read]
        if not results:
            return _Part(None, (), ())

        def given(node: Node) -> bool:
            return self.key(node) in common if node.op == "get_attr" else ops.get(node) != stage

        module, inputs, states = cut(self.program, results, given)
        return _Part(module, (*inputs, *(spec.name for spec in states)), [node.name for node in results])


def _prepared(program: Program, products: torch.dtype | None, device: torch.device) -> Program:
    """Return a program that makes its tensors on ``device`` and rounds weights when it reads them.

    The mixed precision of FSDP rounds what it gathers, norms and new parameters too; these stay as they are here.
    """
    copy = program.copy()
    copy.make_tensors_on(device)
    rounded = Rounded(products) if products is not None else None
    return replace(copy, module=narrowed(copy, rounded, [name for name, _ in named_tensors(copy.module)]))


def _cut(programs: Sequence[Program]) -> list[_Side]:
    """Say for each program in which stage every op is: in that of its layer, or of the op before it."""
    ops, numbers = [], []
    for program in programs:
        needed = leading_to([logits_node(program)])
        ops.append([node for node in program.module.graph.nodes if node in needed and node.op == "call_function"])
        numbers.append([layer_of(node)[0] for node in ops[-1]])
    layers = [number for found in numbers for number in found if number is not None]
    if not layers:
        raise _refusal("the program has no layers to be cut at")
    tail = max(layers) + 2
    return [_side(*each, tail) for each in zip(programs, ops, numbers, strict=True)]


def _side(program: Program, ops: Sequence[Node], numbers: Sequence[int | None], tail: int) -> _Side:
    last = max(index for index, number in enumerate(numbers) if number is not None)
    stage_of, stage = dict[Node, int](), 0
    for index, (node, number) in enumerate(zip(ops, numbers, strict=True)):
        stage = max(stage, 0 if number is None else number + 1) if index <= last else tail
        stage_of[node] = stage
    result, read_after = logits_node(program), [{logits_node(program).name} for _ in range(tail + 1)]
    for node, at in stage_of.items():
        for source in node.all_input_nodes:
            for before in range(at):
                read_after[before].add(source.name)
    return _Side(program, result, stage_of, read_after)


def _common(sides: Sequence[_Side], learns: Collection[int]) -> dict[int, nn.Parameter]:
    """Return the parameters that are no layer's own: read in several stages, or learning in a type of their own."""
    read, stages = dict[int, nn.Parameter](), dict[int, set[int]]()
    for side in sides:
        for node in side.program.module.graph.find_nodes(op="get_attr"):
            value = get_tensor(side.program.module, str(node.target))
            users = {side.stage_of[user] for user in node.users if user in side.stage_of}
            if isinstance(value, nn.Parameter) and users:
                read[id(value)] = value
                stages.setdefault(id(value), set()).update(users)
    own = {key: min(found) for key, found in stages.items() if len(found) == 1 and 0 < min(found) < sides[0].tail}
    learned: dict[int, Counter[torch.dtype]] = {}
    for key in own.keys() & learns:
        learned.setdefault(own[key], Counter())[read[key].dtype] += read[key].nbytes
    main = {stage: found.most_common(1)[0][0] for stage, found in learned.items()}
    odd = {key for key in own.keys() & learns if read[key].dtype != main[own[key]]}
    return {key: value for key, value in read.items() if key not in own or key in odd}


def _shard(module: nn.Module, mesh: DeviceMesh, *, again: bool) -> None:
    """Have FSDP share out what a module holds, and gather it ``again`` for the backward or keep it until then."""
    made = fully_shard(module, mesh=mesh, reshard_after_forward=again)
    # Add gradients up and divide them: the mean that gloo offers was a sum in some versions (pytorch issue 162338).
    made.set_force_sum_reduction_for_comms(True)


def _made_own(module: nn.Module, learns: Collection[int]) -> dict[int, tuple[nn.Module, str]]:
    """Give a module parameters of its own over the same values, and say where each of the old ones was, by its id."""
    held, places = dict(named_tensors(module)), {}
    retie(module, {name: value if isinstance(value, nn.Parameter) else value.detach() for name, value in held.items()})
    for name, value in held.items():
        if isinstance(value, nn.Parameter):
            if not value.dim():
                raise _refusal(f"parameter {name} is a single number, of which there are no shares")
            path, _, leaf = name.rpartition(".")
            places[id(value)] = module.get_submodule(path), leaf
            made = module.get_parameter(name).requires_grad_(id(value) in learns)
            made.data = made.data.contiguous()
    return places


def _refusal(reason: str) -> MemcError:
    hint = "train: {shard: never} in a recipe, with devices that hold all of it"
    return MemcError("E203", f"cannot be shared out among processes: {reason}", "train: shard", hint)

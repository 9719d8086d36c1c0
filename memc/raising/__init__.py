"""Raising: a raw graph's idioms become ``memc::`` ops, its masks become facts, and its key-value cache a state.

What something is, is settled by evaluating the subgraph in question on values chosen for it; module names only name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from memc.blocks import Block, NearMiss
from memc.infer import infer
from memc.program import Program, StateSpec
from memc.raising.attention import MismatchError, Site, find_sites, unfold_scale
from memc.raising.canonical import lower_site, operands, scores_of
from memc.raising.evaluate import content_nodes
from memc.raising.find import block_parameters, find_blocks, path_of
from memc.raising.norms import raise_norms
from memc.raising.probe import Probe
from memc.raising.rebase import rebase
from memc.raising.tidy import join_written_parts, raise_linear, share_equal_nodes

__all__ = ["Raised", "block_parameters", "find_blocks", "raise_program"]


@dataclass(frozen=True)
class Raised:
    """A raised program, its blocks, and what looked like a block and was not."""

    program: Program
    blocks: tuple[Block, ...]
    near_misses: tuple[NearMiss, ...]


def raise_program(program: Program) -> Raised:
    """Raise a raw program; the one given stays as it was.

    The result's ``raised`` tells that every attention became a ``memc::`` op and, for a decoder, that everything
    depends on ``positions``; otherwise ``near_misses`` say which node stands in the way.
    """
    program = program.copy()
    module = program.module
    probe = Probe(module, program.inputs)
    roots = [node for node, spec in probe.specs.items() if spec.role != "positions"]
    share_equal_nodes(module)
    raise_linear(module)
    join_written_parts(module)
    raise_norms(module, content_nodes(module, roots))
    misses: list[NearMiss] = []
    stateful = 0
    of_tokens = content_nodes(module, [node for node, spec in probe.specs.items() if spec.role == "tokens"])
    for found in list(find_sites(module, content_nodes(module, roots), of_tokens)):
        try:
            if isinstance(found, MismatchError):
                raise found
            stateful += _raise_site(probe, found, stateful, roots)
        except MismatchError as mismatch:
            misses.append(near_miss(mismatch))
            if isinstance(found, Site):
                unfold_scale(found)
        except GuardOnDataDependentSymNode as guard:
            assert isinstance(found, Site)
            unfold_scale(found)
            misses.append(near_miss(MismatchError("attention", f"shape depends on values: {guard}", found.output)))
    _return_states(program)
    module.graph.eliminate_dead_code()
    limit, bad = rebase(probe)
    if program.model.decoder:
        named = {miss.node for miss in misses}
        unplaced = [near_miss(MismatchError("positions", reason, node)) for node, reason in bad]
        misses += dict.fromkeys(miss for miss in unplaced if miss.node not in named)
    module.graph.eliminate_dead_code()
    states = _state_specs(program)
    positions = program.model.max_positions
    raised = replace(
        program,
        states=states,
        raised=not misses,
        model=replace(
            program.model,
            absolute_positions=limit is not None if probe.node("positions") else program.model.absolute_positions,
            max_positions=min(limit, positions or limit) if limit is not None else positions,
        ),
    )
    module.delete_all_unused_submodules()
    raised.model = replace(raised.model, parameters=raised.parameter_count)
    infer(raised)
    module.graph.lint()
    module.recompile()
    return Raised(raised, find_blocks(raised), tuple(misses))


def _raise_site(probe: Probe, site: Site, index: int, roots: list[Node]) -> bool:
    scores = scores_of(probe, site)
    own = operands(probe, site, content_nodes(probe.module, roots))
    return lower_site(probe, site, index, scores, own)


def _return_states(program: Program) -> None:
    """Return the next states behind the outputs, in the order of their placeholders."""
    graph = program.module.graph
    output = graph.output_node()
    after: list[Node] = []
    for node in graph.nodes:
        after += node.meta.pop("next", [])
    (returned,) = output.args
    assert isinstance(returned, tuple | list)
    output.args = ((*returned, *after),)


def _state_specs(program: Program) -> tuple[StateSpec, ...]:
    specs = []
    for node in program.placeholders()[len(program.inputs) :]:
        value = node.meta["val"]
        if node.name.endswith("_positions"):
            specs.append(StateSpec(node.name, value.dtype, ("B", "S"), init=-1.0, grows=1))
        else:
            specs.append(
                StateSpec(node.name, value.dtype, ("B", int(value.shape[1]), "S", int(value.shape[3])), grows=2)
            )
    return tuple(specs)


def near_miss(mismatch: MismatchError) -> NearMiss:
    """Describe a mismatch with its source line."""
    node = mismatch.node
    return NearMiss(
        path=path_of(node),
        kind="attention",
        nearest=mismatch.nearest,
        reason=mismatch.reason,
        node=node.name,
        source=str(node.meta.get("memc", {}).get("source", "")),
    )

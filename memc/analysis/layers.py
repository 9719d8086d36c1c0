"""Which rewritten blocks to give back: the divergence from the original when one alone is restored.

Ranking layers by the error of their outputs picks the wrong ones; restoring one at a time and looking at the model's
predictions picks well (KL-guided layer selection, arXiv 2512.20569, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from memc.objective import BlockObjective
from memc.program import Program, StateSpec, get_tensor, set_tensor
from memc.progress import Progress
from memc.train.blocks import Teacher, logits_node
from memc.verify.divergence import token_kl


@dataclass(frozen=True)
class Ranking:
    """What restoring did: mean KL to the original in nats a token, with nothing restored and with each block alone.

    ``blocks`` has the index of every objective, best first.
    """

    nothing: float
    alone: tuple[float, ...]

    @property
    def blocks(self) -> tuple[int, ...]:
        """Indices of the blocks, the one whose restoration helps most first."""
        return tuple(sorted(range(len(self.alone)), key=lambda index: self.alone[index]))


def restored(
    before: Program, after: Program, objectives: Sequence[BlockObjective], chosen: Iterable[int]
) -> tuple[GraphModule, tuple[StateSpec, ...]]:
    """Return a module of the rewritten program's logits in which some blocks are those of the original.

    It takes the program's inputs, then the states returned beside it. Nodes that the programs share go by one name.
    """
    given = {objectives[index].whole or objectives[index].results[0]: objectives[index].target for index in chosen}
    old = {node.name: node for node in before.module.graph.nodes}
    new = {node.name: node for node in after.module.graph.nodes}
    specs = {("new", spec.name): spec for spec in after.states} | {("old", spec.name): spec for spec in before.states}
    inputs = {spec.name for spec in before.inputs}
    modules = {"new": after.module, "old": before.module}
    graph, root = Graph(), torch.nn.Module()
    made: dict[tuple[str, str], Node] = {}
    states: list[StateSpec] = []
    for spec in after.inputs:
        made["new", spec.name] = graph.placeholder(spec.name)

    def key(node: Node, side: str) -> tuple[str, str]:
        """Say which value a node's is: an output that is given back, or one of the rewritten program if it has it."""
        if side == "new" and node.name in given:
            return "old", given[node.name]
        if side == "old" and node.name in new and not (node.op == "placeholder" and node.name not in inputs):
            return "new", node.name
        return side, node.name

    first = logits_node(after)
    needed: set[tuple[str, str]] = set()
    stack = [key(first, "new")]
    while stack:
        side, name = found = stack.pop()
        if found not in needed:
            needed.add(found)
            node = (new if side == "new" else old)[name]
            stack += [key(source, side) for source in node.all_input_nodes]
    for found in sorted(needed & set(specs)):
        made[found] = graph.placeholder(f"{found[0]}_{found[1]}")
        states.append(specs[found])

    def source_of(side: str, source: Node) -> Node:
        return made[key(source, side)]

    def build(found: tuple[str, str]) -> Node:
        """Copy a node after those that it reads, without recursion: graphs are thousands of nodes deep."""
        todo = [found]
        while todo:
            side, name = todo[-1]
            node = (new if side == "new" else old)[name]
            wanted = [key(source, side) for source in node.all_input_nodes]
            missing = [item for item in wanted if item not in made]
            if missing:
                todo += missing
                continue
            todo.pop()
            if (side, name) not in made:
                made[side, name] = graph.node_copy(node, partial(source_of, side))
                if node.op == "get_attr":
                    target = str(node.target)
                    set_tensor(root, target, get_tensor(modules[side], target))
        return made[found]

    graph.output(build(key(first, "new")))
    return GraphModule(root, graph), tuple(states)


@torch.no_grad()
def rank_blocks(
    before: Program,
    after: Program,
    objectives: Sequence[BlockObjective],
    tokens: Tensor,
    positions: Tensor,
    products: torch.dtype | None,
    progress: Progress,
) -> Ranking:
    """Restore one block at a time and measure KL(original || rewritten) on ``tokens [N,T]``, row by row.

    Only tokens past what every block gets right by construction count.
    """
    exact = min(objective.exact for objective in objectives)
    name = logits_node(before).name
    teacher = Teacher(before, [(name,)], products)
    expected: dict[str, Tensor] = {}
    rows = [slice(index, index + 1) for index in range(tokens.shape[0])]
    totals = [0.0] * (len(objectives) + 1)
    with progress.step("rank the layers", len(rows) * len(totals)) as advance:
        for row in rows:
            teacher.run(tokens[row], positions[row], lambda _, values: expected.update(values))
            given = expected[name][:, exact:].float().log_softmax(-1)
            for index in range(len(totals)):
                module, states = restored(before, after, objectives, [index] if index < len(objectives) else [])
                rest = (*after.nothing_fetched(1, tokens.device), *(spec.empty(1, tokens.device) for spec in states))
                logits = module(tokens[row], positions[row], *rest)
                found = logits[:, exact:].float().log_softmax(-1)
                totals[index] += float(token_kl(given, found).mean()) / len(rows)
                advance(1)
    return Ranking(totals[-1], tuple(totals[:-1]))

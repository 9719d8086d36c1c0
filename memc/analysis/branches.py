"""What a trained model owes to each branch of its rewritten blocks: without one, and how much of the mass it holds.

A block that mixes a new branch with an old one can come near the original by the old one alone: component imbalance,
which no error of the whole shows (arXiv 2510.05901, where branches are silenced one at a time). So each branch is left
out of every block in turn. A model that is as near to the original without a branch makes no use of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memc.objective import BlockObjective
from memc.program import Program
from memc.progress import Progress
from memc.report.files import AblationFacts, BranchDistance, BranchFacts, LayerShare
from memc.rewrite import Editor
from memc.train.blocks import Teacher, logits_node
from memc.verify.divergence import token_kl


def silenced(program: Program, objectives: Sequence[BlockObjective], branch: str) -> Program:
    """Return a copy of a rewritten program, with the same parameters, in which no block hears one of its branches."""
    editor = Editor(program)
    nodes = {node.name: node for node in editor.graph.nodes}
    for objective in objectives:
        if branch not in objective.branches:
            continue
        first = nodes[objective.results[0]]
        readers = list(first.users)

        def without(values: Mapping[str, Tensor], objective: BlockObjective = objective) -> tuple[Tensor, ...]:
            return (objective.without(branch, [values[name] for name in objective.results]),)

        results = {name: nodes[name] for name in objective.results}
        (other,) = editor.insert(without, results, first.next, objective.path, (branch, objective.results))
        for reader in readers:
            reader.replace_input_with(first, other)
    return editor.finish()


@torch.no_grad()
def measure_branches(
    before: Program,
    after: Program,
    objectives: Sequence[BlockObjective],
    tokens: Tensor,
    positions: Tensor,
    progress: Progress,
) -> BranchFacts | None:
    """Run ``tokens [N,T]`` through the original and the rewritten program, whole and without each branch, by row.

    None where no block has branches. Tokens that every block gets right by construction do not count.
    """
    began = time.perf_counter()
    branches = list(dict.fromkeys(name for objective in objectives for name in objective.branches))
    if not branches:
        return None
    exact = min(objective.exact for objective in objectives)
    notes = list(dict.fromkeys(objective.no_share for objective in objectives if objective.no_share))
    if not bool((positions >= exact).any()):
        notes = [f"no held-out sequence is longer than the {exact} tokens that are exact by construction"]
        return BranchFacts(branches=branches, notes=notes)
    shares = [_Share(before, objective) for objective in objectives if objective.branches and not objective.no_share]
    programs = {"": after, **{name: silenced(after, objectives, name) for name in branches}}
    sides = {name: _Side(program, exact) for name, program in programs.items()}
    original = _Side(before, exact)
    with progress.step("leave out branches", len(tokens) * (1 + len(sides))) as advance:
        for row in range(len(tokens)):
            part = tokens[row : row + 1], positions[row : row + 1]
            expected = original.run(*part, None, [(share.objective.reads, share.wait) for share in shares])
            advance(1)
            for name, side in sides.items():
                watch = [(share.objective.results, share.add) for share in shares] if not name else []
                side.run(*part, expected, watch)
                advance(1)
    found = {name: side.distance(original) for name, side in sides.items()}
    return BranchFacts(
        branches=branches,
        stands_for=next((objective.stands_for for objective in objectives if objective.branches), ""),
        ablation=AblationFacts(tokens=original.tokens, as_it_is=found.pop(""), without=found),
        shares=[share.facts() for share in shares if share.tokens],
        notes=notes,
        seconds=time.perf_counter() - began,
    )


Watch = tuple[tuple[str, ...], Callable[[Mapping[str, Tensor]], None]]
"""Names of nodes, and what is to be done with their values."""


@dataclass
class _Side:
    """One program, and the sums over the tokens that count of what its predictions cost."""

    program: Program
    exact: int
    tokens: int = 0
    kl: float = 0.0
    predicted: int = 0
    nll: float = 0.0

    def run(self, tokens: Tensor, positions: Tensor, expected: Tensor | None, watch: Sequence[Watch]) -> Tensor:
        """Run one row; returns the log-probabilities ``[N,V]`` of its tokens that count."""
        name, made = logits_node(self.program).name, list[Tensor]()
        counts = positions[0] >= self.exact
        follows = torch.zeros_like(counts)
        follows[:-1] = positions[0, 1:] == positions[0, :-1] + 1

        def take(index: int, values: dict[str, Tensor]) -> None:
            with torch.no_grad():
                if index:
                    watch[index - 1][1](values)
                else:
                    made.append(values[name][0, counts].float().log_softmax(-1))

        Teacher(self.program, [(name,), *(names for names, _ in watch)]).run(tokens, positions, take)
        (found,) = made
        after = tokens[0].roll(-1)[counts][follows[counts]]
        self.nll -= float(found[follows[counts]].gather(1, after[:, None]).sum())
        self.predicted += len(after)
        self.tokens += len(found)
        if expected is not None:
            self.kl += float(token_kl(expected, found).sum())
        return found

    def distance(self, original: _Side) -> BranchDistance:
        """Return how far the predictions were from the original's."""
        ratio = math.exp((self.nll - original.nll) / self.predicted) if self.predicted else None
        return BranchDistance(perplexity_ratio=ratio, kl_mean=self.kl / self.tokens)


@dataclass
class _Share:
    """Sums over tokens of what the first branch of one block carries, and of what was its due."""

    before: Program
    objective: BlockObjective
    tokens: int = 0
    carried: list[Tensor] = field(default_factory=list)
    due: list[Tensor] = field(default_factory=list)
    _far: Tensor | None = None

    def wait(self, values: Mapping[str, Tensor]) -> None:
        """Take what was due in a row of the original, before :meth:`add` is given the same row."""
        due, self._far = self.objective.due(values)
        self.tokens += int(self._far.sum())
        self.due.append(self._sum(due))

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take what the branch carries in the same row of the trained program."""
        self.carried.append(self._sum(self.objective.carried([values[name] for name in self.objective.results])))

    def _sum(self, share: Tensor) -> Tensor:
        assert self._far is not None
        return (share.double() * self._far.unsqueeze(1)).sum((0, 2))

    def facts(self) -> LayerShare:
        """Return the means by head."""
        carried, due = (self._means(sums) for sums in (self.carried, self.due))
        return LayerShare(
            layer=self.objective.layer, path=self.objective.path, tokens=self.tokens, carried=carried, due=due
        )

    def _means(self, sums: Sequence[Tensor]) -> list[float | None]:
        means = (torch.stack(list(sums)).sum(0) / self.tokens).tolist()
        if not self.objective.heads:
            return list(means)
        target = next(n for n in self.before.module.graph.nodes if n.name == self.objective.target)
        by_head = dict(zip(self.objective.heads, means, strict=True))
        return [by_head.get(head) for head in range(target.meta["val"].shape[1])]

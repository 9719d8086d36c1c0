"""From calibration sequences to cuts: one block at a time, in the order of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from memc.analysis.stream import Stream
from memc.errors import MemcError
from memc.passes.prune import scores
from memc.passes.prune.choice import Task, evenly, lowest
from memc.passes.prune.groups import Branch, Group, Groups
from memc.passes.prune.moments import Moments, require_finite
from memc.passes.prune.refit import compensate, refit
from memc.passes.prune.rewrite import Cut
from memc.passes.prune.walk import linear_parts
from memc.pipeline import Calibration
from memc.program import Program, get_tensor
from memc.raising.feed_forward import linear_input


def choose_evenly(tasks: Sequence[Task], *, biased: bool) -> list[Cut]:
    """Make the cuts of a plan: as many units as asked for, evenly spaced, and no new values."""
    return [Cut(task.group, evenly(task), biased) for task in tasks]


def choose(
    program: Program, tasks: Sequence[Task], calibration: Calibration | None, score: str, *, refits: bool
) -> list[Cut]:
    """Choose what goes by a score, and fit what stays, on what calibration sequences show of the whole model.

    Every task's moments are taken on the inputs of the model as it was, its own block at a time.
    """
    if calibration is None:
        assert score == "magnitude" and not refits
        return [Cut(task.group, lowest(task, scores.magnitude(task.group))) for task in tasks]
    gates = scores.taylor(program, [task.group for task in tasks], calibration) if score == "taylor" else []
    cuts: dict[int, Cut] = {}
    stream = Stream(program, calibration)
    for index in sorted(range(len(tasks)), key=lambda i: tasks[i].group.exit):
        found = moments_of(stream, tasks[index].group, gram=refits)
        cuts[index] = cut_by(program, tasks[index], found, score, gates[index] if gates else None, refits=refits)
    return [cuts[index] for index in range(len(tasks))]


def cut_by(program: Program, task: Task, moments: Moments, score: str, gates: Tensor | None, *, refits: bool) -> Cut:
    """Choose what goes from one group by a score, and fit what stays; ``gates`` are its Taylor scores by channel."""
    group = task.group
    weight, bias = _exit_weight(program, group.exit)
    if score == "magnitude":
        units = scores.magnitude(group)
    elif gates is not None:
        units = scores.by_unit(group, gates)
    else:
        units = scores.by_unit(group, scores.BY_MOMENTS[score](moments, weight.double().cpu()))
    cut = Cut(group, lowest(task, units), refits or score == "flap")
    if not cut.biased or not cut.removed:
        return cut
    return replace(cut, fit=(refit if refits else compensate)(weight, bias, moments, cut.columns))


def influence(program: Program, groups: Groups, layers: Sequence[Sequence[Branch]], calibration: Calibration) -> Tensor:
    """Return the mean block influence of each layer, given by its branches, over the calibration tokens."""
    ends = [groups.stream_of(branches) for branches in layers]
    nodes = {node for pair in ends for node in pair}
    found = torch.zeros(len(layers), dtype=torch.float64)
    stream = Stream(program, calibration)
    for seen in stream.advance(max(nodes), nodes):
        for index, (before, after) in enumerate(ends):
            require_finite(seen[after], f"layer {layers[index][0].block.layer}")
            found[index] += float(scores.block_influence(seen[before], seen[after]).mean())
    return found / len(calibration.tokens)


def require_usable(calibration: Calibration, tasks: Sequence[Task]) -> None:
    """Raise ``MemcError`` E207 for text that is one token over and over, or too short to tell channels apart."""
    hint = "give more --data, of text as the model is to be used on"
    if bool((calibration.tokens == calibration.tokens[0, 0]).all()):
        raise MemcError("E207", "calibration text is one token over and over", calibration.origin, hint)
    count, widest = calibration.tokens.numel(), max((len(task.group.columns) for task in tasks), default=1)
    if count < widest:
        reason = f"calibration text has {count} tokens, fewer than the {widest} channels that it is to tell apart"
        raise MemcError("E207", reason, calibration.origin, hint)


def moments_of(stream: Stream, group: Group, *, gram: bool) -> Moments:
    """Run every sequence on to the end of a group and return what its exit projection took on the way."""
    entry = linear_input(group.exit)
    where = f"layer {group.block.layer} {group.block.path}".strip()
    moments = Moments(len(group.columns), gram=gram, where=where)
    for seen in stream.advance(group.exit, [entry]):
        moments.update(seen[entry])
    return moments


def _exit_weight(program: Program, exit_: Node) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``[out, in]`` and bias of a projection."""
    weight, bias, outs, _ = linear_parts(exit_)
    value = get_tensor(program.module, str(weight.target)).detach()
    return value if outs == 0 else value.T, None if bias is None else get_tensor(program.module, str(bias.target))

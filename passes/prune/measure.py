"""From calibration sequences to cuts: one block at a time, in the order of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from memc.analysis.stream import Stream
from memc.blocks import AttentionBlock
from memc.errors import MemcError
from memc.passes.prune import scores
from memc.passes.prune.choice import Task, evenly, lowest
from memc.passes.prune.eliminate import eliminate
from memc.passes.prune.groups import Group, Groups
from memc.passes.prune.moments import Moments, require_finite
from memc.passes.prune.moves import moved_from
from memc.passes.prune.refit import compensate, refit
from memc.passes.prune.rewrite import Cut, Fit
from memc.passes.prune.walk import BlockedError
from memc.pipeline import Calibration
from memc.program import Program, get_tensor
from memc.raising.evaluate import hints
from memc.raising.feed_forward import linear_input, linear_parts


def choose_evenly(tasks: Sequence[Task], *, biased: bool) -> list[Cut]:
    """Make the cuts of a plan: as many units as asked for, evenly spaced, and no new values."""
    return [Cut(task.group, evenly(task), biased) for task in tasks]


def choose(
    program: Program,
    tasks: Sequence[Task],
    calibration: Calibration | None,
    score: str,
    *,
    refits: bool,
    biases: bool = True,
) -> list[Cut]:
    """Choose what goes by a score, and fit what stays, on what calibration sequences show of the model.

    Block by block in the order of the graph. With ``refits`` what a block sees is the model as far as it is pruned, and
    what it is fitted to is the original: see :class:`Follower`. With ``biases`` projections get one that have none.
    """
    if calibration is None:
        assert score in WITHOUT_TEXT and not refits
        return [Cut(task.group, lowest(task, weight_scores(task.group, score))) for task in tasks]
    gates = scores.taylor(program, [task.group for task in tasks], calibration) if score == "taylor" else []
    cuts: dict[int, Cut] = {}
    original = Stream(program, calibration)
    followers = [Follower(Groups(program), original.fork())] if refits else []
    for index in in_order(tasks):
        task, taylor = tasks[index], gates[index] if gates else None
        if not task.count:
            cuts[index] = Cut(task.group, ())
            continue
        if task.group.kind == "key_channels":
            values = key_scores(task.group, original, score, taylor)
            cuts[index] = cut_keys(program, task, values, original, followers, biases=biases)
        else:
            found = moments_of(original, task.group, followers, gram=score == "obs")[-1]
            cuts[index] = cut_by(program, task, found, score, taylor, refits=refits, biases=biases)
        for follower in followers:
            follower.apply(cuts[index])
    return [cuts[index] for index in range(len(tasks))]


def choose_apart(
    program: Program,
    tasks: Sequence[Task],
    calibration: Calibration | None,
    score: str,
    *,
    refits: bool,
    biases: bool = True,
) -> Iterator[Cut]:
    """Choose for each group as if it were the only one, in the order of the graph: the original runs once for all.

    Without calibration as much goes, evenly spaced.
    """
    if calibration is None:
        biased = biases and (refits or score == "flap")
        yield from choose_evenly([tasks[index] for index in in_order(tasks)], biased=biased)
        return
    gates = scores.taylor(program, [task.group for task in tasks], calibration) if score == "taylor" else []
    original, groups = Stream(program, calibration), Groups(program)
    for index in in_order(tasks):
        group = tasks[index].group
        if group.kind == "key_channels":
            beside = [Follower(groups, original.fork())] if refits else []
            values = key_scores(group, original, score, gates[index] if gates else None)
            yield cut_keys(program, tasks[index], values, original, beside, biases=biases)
            continue
        entry, exit_ = linear_input(group.exit), group.exit
        where = _where(group)
        found = Moments(len(group.columns), gram=score == "obs" or refits, where=where, targets=hints(exit_)[-1])
        for seen in original.advance(exit_, {entry, exit_}):
            found.update(seen[entry], seen[exit_])
        taylor = gates[index] if gates else None
        yield cut_by(program, tasks[index], found, score, taylor, refits=refits, biases=biases)


def in_order(tasks: Sequence[Task]) -> list[int]:
    """Return the indices of tasks in the order in which a run of the graph reaches their ends."""
    return sorted(range(len(tasks)), key=lambda index: tasks[index].group.exit)


def cut_by(
    program: Program,
    task: Task,
    moments: Moments,
    score: str,
    gates: Tensor | None,
    *,
    refits: bool,
    biases: bool = True,
) -> Cut:
    """Choose what goes from one group by a score, and fit what stays; ``gates`` are its Taylor scores by channel."""
    group = task.group
    weight, bias = exit_weight(program, group.exit)
    fitted = fit_moments(moments, bias, biases=biases)
    if score == "obs":
        removed = eliminate(task, weight, fitted)
    else:
        removed = lowest(task, unit_scores(group, weight, score, moments, gates))
    cut = Cut(group, removed, biases and (refits or score == "flap"))
    if removed and refits:
        return replace(cut, fit=refit(weight, fitted, cut.columns))
    if removed and score == "flap" and (biases or bias is not None):
        return replace(cut, fit=compensate(weight, bias, moments, cut.columns))
    return cut


def fit_moments(moments: Moments, bias: Tensor | None, *, biases: bool) -> Moments:
    """Return the moments that a fit is made by: about the origin where the projection has no bias and gets none."""
    return moments if biases or bias is not None else moments.about_origin()


def key_scores(group: Group, original: Stream, score: str, gates: Tensor | None) -> Tensor:
    """Score the units of a group of key channels; ``gates`` are its Taylor scores by channel.

    Raises ``MemcError`` E403 for queries or keys that are not finite.
    """
    block = group.block
    assert isinstance(block, AttentionBlock)
    if score == "magnitude":
        return scores.magnitude(group)
    if gates is not None:
        return scores.by_unit(group, gates)
    total = torch.zeros(group.units, dtype=torch.float64)
    for seen in original.advance(max(block.query, block.key), {block.query, block.key}):
        for node in (block.query, block.key):
            require_finite(seen[node], _where(group))
        total += scores.query_driven(group, seen[block.query], seen[block.key])
    return total


def cut_keys(
    program: Program,
    task: Task,
    values: Tensor,
    original: Stream,
    followers: Sequence[Follower],
    *,
    biases: bool = True,
) -> Cut:
    """Choose the key channels of the lowest scores, and fit the output projection where there is a follower.

    There is nothing to fit in the scores themselves: what a rotation lays between pairs no other pair can make up for.
    The output projection is fitted to what the attention that is left gives it.
    """
    cut = Cut(task.group, lowest(task, values), biased=biases and bool(followers))
    for follower in followers:
        follower.narrow(cut)
    if not followers:
        return cut
    weight, bias = exit_weight(program, task.group.exit)
    (_, moments) = moments_of(original, task.group, followers, gram=False)
    return replace(cut, fit=refit(weight, fit_moments(moments, bias, biases=biases), cut.columns))


def unit_scores(group: Group, weight: Tensor, score: str, moments: Moments, gates: Tensor | None) -> Tensor:
    """Score the units of a group; ``gates`` are its Taylor scores by channel."""
    if score in WITHOUT_TEXT:
        return weight_scores(group, score)
    if gates is not None:
        return scores.by_unit(group, gates)
    return scores.by_unit(group, scores.BY_MOMENTS[score](moments, weight.double().cpu()))


WITHOUT_TEXT = ("magnitude", "analysis")
"""Scores that need no calibration text: of the weights, or of a file."""


def weight_scores(group: Group, score: str) -> Tensor:
    """Score the units of a group by their weights, or as they were given."""
    return torch.tensor(group.given, dtype=torch.float64) if score == "analysis" else scores.magnitude(group)


class Follower:
    """The calibration sequences on their way through a model as far as it is pruned, beside the original.

    A projection is fitted to what brings the residual stream back to the original's: its own output there, plus by how
    much the stream that it is added to is off. So a block makes up for those before it (asymmetric calibration,
    GPTAQ, arXiv 2504.02692, where the error of the inputs alone is made up for). Where the output goes through anything
    but a change of shape on its way to the stream, or is added before the stream is known, the target is the output
    alone.
    """

    def __init__(self, groups: Groups, stream: Stream) -> None:
        """Start where a stream of the program of ``groups`` is."""
        self._groups = groups
        self._stream = stream

    def stream_of(self, group: Group) -> Node | None:
        """Return the residual stream that a group's exit is added to, None where the target is the output alone."""
        try:
            branch = self._groups.branch(group.block)
        except BlockedError:
            return None
        passed = branch.addend
        while passed is not group.exit and (moved := moved_from(passed)) is not None:
            passed = moved
        (stream,) = (source for source in branch.add.args[:2] if source is not branch.addend)
        assert isinstance(stream, Node)
        return stream if passed is group.exit and stream < group.exit else None

    def rows(self, group: Group) -> Iterator[dict[Node, Tensor]]:
        """Run every sequence on to the inputs of a group's exit; yields those and the stream, of each."""
        entry, stream = linear_input(group.exit), self.stream_of(group)
        return self._stream.advance(entry, [entry] if stream is None else [entry, stream])

    def narrow(self, cut: Cut) -> None:
        """Let the attention see no key channels that go: what a query has there meets nothing."""
        block = cut.group.block
        assert isinstance(block, AttentionBlock)
        self._stream.scale(block.query, ~torch.isin(cut.group.keys, torch.tensor(cut.removed, dtype=torch.int64)))

    def apply(self, cut: Cut) -> None:
        """Let what follows see a cut, which must have been fitted."""
        if not cut.removed:
            return
        self._stream.replace(cut.group.exit, linear_input(cut.group.exit), cut.exit_function())


TOKENS_FOR_FIT = 4
"""Least calibration tokens for each channel that a fit has: with 1.3 of them, SmolLM2-135M lost more at 20 % by fitting
than by leaving the weights alone (2.5 times the perplexity against 1.4), and errors grow from block to block."""


def require_usable(calibration: Calibration, tasks: Sequence[Task], *, refits: bool) -> None:
    """Raise ``MemcError`` E207 for text that is one token over and over, or too short to tell channels apart."""
    hint = "give more --data, of text as the model is to be used on"
    if bool((calibration.tokens == calibration.tokens[0, 0]).all()):
        raise MemcError("E207", "calibration text is one token over and over", calibration.origin, hint)
    count, widest = calibration.tokens.numel(), max((len(task.group.columns) for task in tasks), default=1)
    least = widest * TOKENS_FOR_FIT if refits else widest
    if count < least:
        reason = f"calibration text has {count} tokens, fewer than the {least} that {widest} channels take"
        hint += ", or refit=false" if refits and count >= widest else ""
        raise MemcError("E207", reason, calibration.origin, hint)


def moments_of(original: Stream, group: Group, followers: Sequence[Follower], *, gram: bool) -> list[Moments]:
    """Run every sequence on to the end of a group; returns what its exit took in the original, and in each follower.

    The sums that a fit needs are made of the followers; ``gram`` tells whether covariances are of the original, where
    there are none.
    """
    entry, exit_ = linear_input(group.exit), group.exit
    where = _where(group)
    channels, outputs = len(group.columns), hints(exit_)[-1]
    own = Moments(channels, gram=gram and not followers, where=where)
    theirs = [Moments(channels, gram=True, where=where, targets=outputs) for _ in followers]
    streams = {stream for follower in followers if (stream := follower.stream_of(group)) is not None}
    runs = [follower.rows(group) for follower in followers]
    for meant, *seen in zip(original.advance(exit_, {entry, exit_, *streams}), *runs, strict=True):
        own.update(meant[entry])
        for moments, values in zip(theirs, seen, strict=True):
            target = meant[exit_].flatten(0, -2)
            for stream in streams:
                target = target + (meant[stream].float() - values[stream].float()).reshape(target.shape)
            moments.update(values[entry], target)
    return [own, *theirs]


def unfitted(program: Program, cut: Cut) -> Cut:
    """Return a cut that leaves the weights of its exit as they are as one that was fitted to them."""
    weight, bias = exit_weight(program, cut.group.exit)
    return replace(cut, fit=Fit(weight[:, cut.columns], weight.new_zeros(len(weight)) if bias is None else bias))


def exit_weight(program: Program, exit_: Node) -> tuple[Tensor, Tensor | None]:
    """Return the weight ``[out, in]`` and bias of a projection."""
    weight, bias, outs, _ = linear_parts(exit_)
    value = get_tensor(program.module, str(weight.target)).detach()
    return value if outs == 0 else value.T, None if bias is None else get_tensor(program.module, str(bias.target))


def _where(group: Group) -> str:
    return f"layer {group.block.layer} {group.block.path}".strip()

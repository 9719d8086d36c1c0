"""Whether a sequence gives the same logits however it is cut into calls, padded, or put beside others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from memc.dialect import arguments, op_spec
from memc.dialect.base import Arguments
from memc.program import Program
from memc.verify.execute import PIECE, cut, rows, run_all, streams
from memc.verify.inputs import inputs_of, positions_of
from memc.verify.relations import CheckResult, judged

SPLIT_TOLERANCE = 1e-4

Parts = list[tuple[Tensor, Tensor]]
"""Calls that a sequence is cut into: tokens and positions of each."""


@torch.no_grad()
def split_invariance(program: Program, tokens: Tensor, floor: float = 0.0) -> CheckResult:
    """Check that ``tokens [B, T]`` give the same logits whole, by token, in odd pieces, padded, and row by row.

    And where a program lets tokens go, that T tokens give the same behind as many as it holds, however those came: a
    fault in what becomes of the others shows nowhere before. What is fetched is drawn, another block for each sequence.
    The budget is ``SPLIT_TOLERANCE`` or ten times the noise ``floor``. A program that does not claim to be
    split-invariant passes with that said.
    """
    if not streams(program):
        return CheckResult("split_invariance", 0.0, None, None, True, "not claimed: an op depends on the split")
    differences = {**_short(program, tokens), **_past(program, tokens)}
    values = {name: float(value.abs().max()) for name, value in differences.items()}
    worst = max(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name])
    return judged("split_invariance", values[worst], max(SPLIT_TOLERANCE, 10 * floor), floor, f"largest: {worst}")


def holds_all_to(program: Program) -> int | None:
    """Return how many tokens of a sequence a program holds before an op lets the first go, None when none ever does."""
    return max((call.holds_all_to for call in dialect_calls(program) if call.holds_all_to is not None), default=None)


def dialect_calls(program: Program) -> Iterator[Arguments]:
    """Yield the arguments of every dialect op."""
    for node in program.module.graph.nodes:
        spec = op_spec(node.target) if node.op == "call_function" else None
        if spec is not None:
            yield spec.arguments(**arguments(node))


def _short(program: Program, tokens: Tensor) -> Mapping[str, Tensor]:
    length = tokens.shape[1]
    padded, positions, columns = _mixed_lengths(tokens)
    fetched = inputs_of(program, tokens, fetch=True)[2:]
    sequences = [
        _cut(tokens, positions_of(tokens), cut(program, length)),
        _cut(tokens, positions_of(tokens), [1] * length),
        _cut(tokens, positions_of(tokens), cut(program, length, 3)),
        _cut(padded, positions, cut(program, padded.shape[1], -(-padded.shape[1] // 2))),
    ]
    alike = [fetched for _ in sequences]
    sequences += [_cut(row, positions_of(row), cut(program, length)) for row in rows(tokens)]
    alike += [tuple(block[index : index + 1] for block in fetched) for index in range(tokens.shape[0])]
    expected, single, threes, mixed, *alone = _together(program, sequences, alike)
    return {
        "one token at a time": single - expected,
        "pieces of three": threes - expected,
        "mixed lengths": _columns(mixed, columns) - expected,
        "one sequence at a time": torch.cat(alone) - expected,
    }


def _past(program: Program, tokens: Tensor) -> Mapping[str, Tensor]:
    """Compare the last T tokens of one sequence that is T tokens longer than what a program holds.

    Nothing where it would choose what it reads by then. The text is ``tokens`` over and over. Calls of no more than
    ``PIECE`` tokens bound the logits that are held.
    """
    length, held = tokens.shape[1], holds_all_to(program)
    if held is None:
        return {}
    wanted = min(held + length, program.model.longest or held + length)
    # Where something is chosen, an order of sums may turn a choice: that is held to another measure when lowered.
    if wanted <= held or any(
        call.reads_all_to is not None and call.reads_all_to < wanted for call in dialect_calls(program)
    ):
        return {}
    row = tokens.reshape(1, -1)[:, torch.arange(wanted) % tokens.numel()]
    padded, positions, columns = _mixed_lengths(row)
    tail = wanted - held
    early = [1, *cut(program, held - 1, PIECE)] if held > 1 else [held]
    sequences = [
        _cut(row, positions_of(row), cut(program, wanted, PIECE)),
        _cut(row, positions_of(row), [*early, *[1] * tail]),
        _cut(padded, positions, cut(program, padded.shape[1], PIECE - 1)),
    ]
    fetched = inputs_of(program, row, fetch=True)[2:]
    last = tail + padded.shape[1] - wanted
    whole, single, mixed = _together(program, sequences, [fetched for _ in sequences], last)
    expected, behind = whole[:, -tail:], columns[:, -tail:] - (padded.shape[1] - last)
    return {
        f"one token at a time behind {held}": single[:, -tail:] - expected,
        f"padded, behind {held}": _columns(mixed, behind) - expected,
    }


def _columns(logits: Tensor, columns: Tensor) -> Tensor:
    return logits.gather(1, columns[..., None].expand(-1, -1, logits.shape[-1]))


def _cut(tokens: Tensor, positions: Tensor, sizes: list[int]) -> Parts:
    parts = zip(tokens.split(sizes, 1), positions.split(sizes, 1), strict=True)
    return [(ids.contiguous(), where.contiguous()) for ids, where in parts]


def _together(
    program: Program, sequences: list[Parts], fetched: list[tuple[Tensor, ...]], last: int | None = None
) -> list[Tensor]:
    """Run sequences that are cut into pieces, each with its own state, the first pieces of all side by side and so on.

    ``fetched`` is what each is given beside its tokens in every call. Returns the logits of each sequence, of its
    ``last`` tokens alone where that is given.
    """
    states = [program.new_state(parts[0][0].shape[0]) for parts in sequences]
    found: list[list[Tensor]] = [[] for _ in sequences]
    for step in range(max(map(len, sequences))):
        running = [index for index, parts in enumerate(sequences) if step < len(parts)]
        cases = [(*sequences[index][step], *fetched[index], *states[index]) for index in running]
        for index, outputs in zip(running, run_all(program, cases), strict=True):
            # A sequence that is over needs no state: side by side they can outweigh the model.
            states[index] = outputs[len(program.outputs) :] if step + 1 < len(sequences[index]) else ()
            found[index].append(outputs[0].float())
            if last is not None:
                found[index] = [torch.cat(found[index], 1)[:, -last:].clone()]
    return [torch.cat(parts, 1) for parts in found]


def _mixed_lengths(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put each row behind its own amount of padding and a gap of it in the middle.

    Returns the padded tokens, their positions, and the columns of ``tokens`` among them.
    """
    batch, length = tokens.shape
    gap = (torch.arange(length) >= length // 2).long() * 2
    columns = positions_of(tokens) + gap + (torch.arange(batch) % 3 + 1)[:, None]
    total = length + 6
    padded = tokens.new_zeros(batch, total).scatter(1, columns, tokens)
    positions = tokens.new_full((batch, total), -1).scatter(1, columns, positions_of(tokens))
    return padded, positions, columns

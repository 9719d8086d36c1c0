"""Lowering a program into an artifact, and checking what was lowered against the program."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from memc import __version__
from memc.artifact import Manifest, beyond_trained
from memc.backend import Backend, Lowered, LowerOptions, Runner
from memc.dialect import arguments, op_spec
from memc.dialect.cuts import watched
from memc.errors import MemcError
from memc.evaluate.perplexity import perplexity_of
from memc.program import Program
from memc.target import Target
from memc.verify import CheckResult, VerificationText, inputs_of, perplexity, pieces, streams, take, whole
from memc.verify.divergence import token_kl
from memc.verify.execute import PIECE, cut, longest_call
from memc.verify.splits import dialect_calls

TOLERANCE = 1e-3
"""Most that the logits of a lowered program with unquantised weights may differ, whatever the backend."""

EXACT_WEIGHTS = ("fp32",)

TOKENS = 13
"""Tokens that are run at once, past the longest window of the program: what a window forgets shows beyond it alone."""

LONGEST_WINDOW = 512
"""Longest window past which a lowered program is run."""

CHOICES = 12
"""Tokens past the first choice that are run at once, and one at a time."""

CHOSEN_ROWS = "chosen_rows"
"""What the warning of other rows than with float32 weights begins with."""

_TOPK = torch.ops.aten.topk.default

CHOICE_KL = 1e-4
"""Most nats a token that a lowered choice may move the predictions: a wrong one moves them by hundredths."""


def lower(
    program: Program, backend: Backend, target: Target, folder: Path, options: LowerOptions
) -> tuple[Lowered, Manifest]:
    """Lower a program under ``folder`` and return what was written and the manifest that runs it, not yet sealed.

    Raises ``MemcError`` E601 as the backend does.
    """
    lowered = backend.lower(program, target, folder, options)
    manifest = Manifest(
        version=__version__,
        source=program.model.source,
        source_digest=program.model.digest,
        family=program.model.family,
        target=target.name,
        backend=backend.name,
        weights=options.weights,
        lowered=lowered.path,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
        tables=lowered.tables,
        symbols=lowered.symbols,
        capacity=lowered.capacity,
        longest_call=longest_call(program),
        vocab_size=program.model.vocab_size,
        trained_positions=trained_positions(program),
        decoder=program.model.decoder,
        how_to_run=lowered.how_to_run,
    )
    return lowered, manifest


def past_training(context: int | None, program: Program) -> list[str]:
    """Return the warning of a context past the positions that a model was trained on, where it reads that far.

    Raises ``MemcError`` E206 where its positions are the rows of a table.
    """
    limit = program.model.max_positions
    if context is None or limit is None or context <= limit:
        return []
    if program.model.absolute_positions:
        hint = f"--context {limit} or less"
        raise MemcError(
            "E206", f"context {context} is past the model's {limit} positions", f"--context {context}", hint
        )
    return [] if _reads_within(program, limit) else [beyond_trained(f"context {context} is", limit)]


def trained_positions(program: Program) -> int | None:
    """Return the positions that a model was trained on, None where going past them is refused or changes nothing."""
    limit = program.model.max_positions
    free = limit is None or program.model.absolute_positions or not program.model.decoder
    return None if free or _reads_within(program, limit or 0) else limit


def _reads_within(program: Program, limit: int) -> bool:
    """Tell whether no token stands further than ``limit`` positions from any that it reads, as far as it can tell."""
    for node in program.module.graph.nodes:
        spec = op_spec(node.target)
        if spec is None or not spec.mixes_tokens or spec.name == "compact_attention":
            continue  # whose pass has seen to it
        bound = arguments(node)
        near = [bound.get(name, 0) for name in ("window", "chunk")]
        if spec.name != "attention" or not any(0 < size <= limit for size in near):
            return False
    return True


def require_weights(backend: Backend, weights: str, target: Target) -> None:
    """Raise ``MemcError`` E601 where a backend does not take a weight type on a target, or takes none on it."""
    if refusal := backend.refuses_weights(weights, target):
        if taken := backend.taken_weights(target):
            raise MemcError("E601", refusal, f"--weights {weights}", f"one of: {', '.join(taken)}")
        hint = f"--backend {target.backend}, or another --target: memc targets lists them"
        raise MemcError("E601", refusal, f"--target {target.name}", hint)


def require_tuning(backend: Backend, target: Target, trials: int) -> None:
    """Raise ``MemcError`` E200 where products are to be timed and there is nothing to time."""
    reason = backend.refuses_tuning(target) if trials else None
    if reason is not None:
        raise MemcError("E200", f"nothing to tune: {reason}", f"--tune {trials}", "leave it out, or add --backend tvm")


@torch.no_grad()
def verify_lowered(
    runner: Runner, program: Program, text: VerificationText, weights: str, floor: float | None
) -> list[CheckResult]:
    """Compare a lowered program with the program itself: tokens past its windows at once, then the last one at a time.

    What is fetched is drawn, so that it shows. A program that is no decoder gets one input of one token in place of the
    second, all else drawn. With float32 weights the logits must agree within ``TOLERANCE`` or ten times the noise
    ``floor``; with others the difference is measured, and the perplexity on ``text`` with those weights beside that
    with float32.
    """
    length = TOKENS + _longest_window(program, runner) if program.model.decoder else TOKENS
    tokens = take(text, 2, length)
    expected, fetched = whole(program, tokens, fetch=True), _fetched(program, tokens)
    if program.model.decoder:
        values = {
            f"{length} tokens at once": _difference(_run(runner, tokens, cut(program, length), fetched), expected)
        }
    else:
        one = tokens[:1, :1]
        values = {
            "2 inputs at once": _difference(_run_inputs(runner, program, tokens), expected),
            "one input, of one token": _difference(_run_inputs(runner, program, one), whole(program, one)),
        }
    if streams(program):
        found = _run(runner, tokens, [*cut(program, length - 6), *[1] * 6], fetched)
        values["one token at a time"] = _difference(found, expected)
    worst = max(values, key=lambda name: math.inf if math.isnan(values[name]) else values[name])
    exact = weights in EXACT_WEIGHTS
    budget = max(TOLERANCE, 10 * (floor or 0.0)) if exact else None
    passed = values[worst] <= budget if budget is not None else math.isfinite(values[worst])
    checks = [CheckResult("lowered_logits", values[worst], budget, floor, passed, f"largest: {worst}")]
    checks += _check_choice(runner, program, text, exact)
    if exact or not program.model.decoder:
        return checks
    before, after = perplexity(program, text.tokens), lowered_perplexity(runner, text.tokens, *cut(program, 128)[:1])
    detail = f"perplexity on the verification text with {weights} weights {after:.4g}, with fp32 {before:.4g}"
    ratio = after / before
    checks.append(CheckResult("weights_perplexity_ratio", ratio, None, None, math.isfinite(ratio), detail))
    return checks


def _longest_window(program: Program, runner: Runner) -> int:
    """Return the most tokens that a window of the program holds, 0 where none can be gone past."""
    nodes = [node for node in program.module.graph.nodes if op_spec(node.target) is not None]
    held = [a.get("window") or 0 for a in map(arguments, nodes)]
    limits = [limit for limit in (program.model.longest, runner.manifest.capacity) if limit is not None]
    most = min([LONGEST_WINDOW, *(limit - TOKENS for limit in limits)])
    return max((window for window in held if window <= most), default=0)


def _check_choice(runner: Runner, program: Program, text: VerificationText, exact: bool) -> list[CheckResult]:
    """Compare a lowered program that chooses what it reads with the program, where it begins to choose.

    In nats a token, since a choice between two tokens that score alike to the last digit is either's. What is held in
    few bits may be rounded to either of two levels that are as near, and all that comes after it differs, and now and
    then a page is taken for another: where that shows, it is the median token of either half that may move ten times
    as far as it does when the program itself is run in float64.
    """
    length = chooses_from(program)
    capacity = runner.manifest.capacity
    if length is None or (capacity is not None and capacity < length + 2 * CHOICES):
        return []
    tokens = take(text, 1, length + 2 * CHOICES)
    last = cut(program, 2 * CHOICES)
    unread = cut(program, length, PIECE)
    parts = pieces(program, tokens, [*unread, *last])
    deque(islice(parts, len(unread)), maxlen=0)
    with watched() as cuts:
        expected = torch.cat([*parts], 1)
    found = _run(runner, tokens, [*cut(program, length + CHOICES), *[1] * CHOICES], last=2 * CHOICES)
    moved, noise, measured = _moved(expected, found), None, "nats a token"
    value = float(moved.mean())
    if exact and value > CHOICE_KL and _rounds(program):
        exactly = islice(pieces(program, tokens, [*unread, *last], torch.float64), len(unread), None)
        measured = f"nats of the median token of either half, {value:.2g} a token"
        value, noise = _typical(moved), _typical(_moved(torch.cat([*exactly], 1), expected))
    budget = max(CHOICE_KL, 10 * (noise or 0.0)) if exact else None
    span = f"tokens {length} to {tokens.shape[1]}, half of them at once and half one at a time"
    detail = f"{measured}, {span}; {cuts.text}"
    passed = value <= budget if budget is not None else math.isfinite(value)
    return [CheckResult("lowered_choice", value, budget, noise, passed, detail)]


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Return ``[T]``, by how many nats logits ``after [1,T,V]`` move the predictions of those ``before``."""
    return token_kl(before.double().log_softmax(-1), after.double().log_softmax(-1))[0]


def _typical(moved: Tensor) -> float:
    """Return the larger median of the two halves of ``moved [T]``, which not-a-number passes through."""
    return max(float(half.median()) for half in moved.chunk(2)) if moved.isfinite().all() else math.nan


def _rounds(program: Program) -> bool:
    """Tell whether a program holds what it reads in few bits."""
    return any(call.rounds for call in dialect_calls(program))


def chooses_from(program: Program) -> int | None:
    """Return from how many tokens of a sequence on the program chooses what it reads, None when it never does."""
    lengths = (call.reads_all_to for call in dialect_calls(program))
    return max((length for length in lengths if length is not None), default=None)


def chosen_rows(program: Program, weights: str) -> str:
    """Return a warning where scores that such weights change choose what is read, "" where nothing is chosen so.

    Keeping the scores' own matrices in float32 would not help: they multiply what every matrix before them made.
    """
    if weights in EXACT_WEIGHTS or not program.module.graph.find_nodes(op="call_function", target=_TOPK):
        return ""
    return f"{CHOSEN_ROWS}: with {weights} weights scores differ, and so do some of the rows that the highest choose"


def lowered_perplexity(runner: Runner, tokens: Tensor, piece: int = 128) -> float:
    """Return the perplexity of ``tokens [N, L]`` but each row's first, by a lowered program."""
    total, count = 0.0, 0
    for index in range(tokens.shape[0]):
        row = tokens[index : index + 1]
        sizes = [min(piece, row.shape[1] - start) for start in range(0, row.shape[1], piece)]
        logits = _run(runner, row, sizes)[0, :-1]
        total += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += row.shape[1] - 1
    return perplexity_of(total / max(count, 1))


def _fetched(program: Program, tokens: Tensor) -> dict[str, np.ndarray]:
    """Return what is fetched for ``tokens``, drawn, by name."""
    drawn = zip(program.inputs, inputs_of(program, tokens, fetch=True), strict=True)
    return {spec.name: value.numpy() for spec, value in drawn if spec.role == "fetched"}


def _run(
    runner: Runner,
    tokens: Tensor,
    sizes: list[int],
    fetched: Mapping[str, np.ndarray] | None = None,
    last: int | None = None,
) -> Tensor:
    """Run tokens in calls of these sizes and return the logits, of the ``last`` columns where that is given."""
    state = runner.new_state(tokens.shape[0], sum(sizes))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int64), tuple(tokens.shape))
    parts, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        ids = np.ascontiguousarray(tokens[:, part].numpy())
        keep = None if last is None else np.arange(min(max(tokens.shape[1] - last - start, 0), size - 1), size)
        found = runner.run(ids, np.ascontiguousarray(positions[:, part]), state, keep, fetched)
        parts.append(torch.from_numpy(np.array(found)))
        start += size
    return torch.cat(parts, 1)[:, -last if last else 0 :]


def _run_inputs(runner: Runner, program: Program, tokens: Tensor) -> Tensor:
    """Run what ``tokens`` stand for, by name: see :func:`memc.verify.inputs.inputs_of`."""
    drawn = zip(program.inputs, inputs_of(program, tokens), strict=True)
    arrays = {spec.name: value.numpy() for spec, value in drawn}
    return torch.from_numpy(np.array(runner.run(None, None, runner.new_state(len(tokens)), None, arrays)))


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())

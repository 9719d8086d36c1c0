"""Memory heads and context heads: what each head's path to the logits carries of what was learned and what was read.

After PH3 (Jin et al., "Cutting Off the Head Ends the Conflict", arXiv 2402.18154): a prompt in which the context says
one thing and the model's memory another, and path patching (Wang et al. 2022, arXiv 2211.00593, section 3.1) of every
head. The head's output is taken from a run on a corrupted prompt, every other head's from the run on the prompt itself,
feed-forward networks follow, and what the answer loses in log-probability went through the head.

The prompts here are made by the model: ``S c F S`` where S is a passage that it goes on from by itself, to its memory
answer m, c a random other token, the context answer, and F random filler. A corrupted prompt has another c (what is
lost of the first was read), or another passage for both S (what is lost of m was remembered).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from memc.analysis.gated import gated_logits
from memc.analysis.units import BlockUnits
from memc.errors import MemcError
from memc.program import Program
from memc.progress import Progress
from memc.train.blocks import Teacher, cut, logits_node
from memc.verify.inputs import positions_of, token_limit
from memc.verify.text import sample_text

PASSAGE = 6
"""Tokens of a passage."""

FILLER = 3
"""Random tokens between the context answer and the second passage."""

CANDIDATES = 4
"""Passages that are made for each that is used: those go on that the model is surest of."""

SEED = 2402

ROWS = 512
"""Rows of patched prompts that are run at once."""

CLEAR = 2.0
"""Standard errors that an effect has to be from 0 to count."""


@dataclass(frozen=True)
class Prompts:
    """Prompts ``[N,T]`` with both answers, and their corrupted twins of the same length.

    ``context`` and ``memory`` are the answers ``[N]``; ``other_context`` has another context answer in its place,
    ``other_memory`` another passage.
    """

    tokens: Tensor
    context: Tensor
    memory: Tensor
    other_context: Tensor
    other_memory: Tensor


@dataclass(frozen=True)
class LayerEffects:
    """The effects ``[H]`` of one block's query heads on the log-probability of both answers, in nats.

    ``context_error`` and ``memory_error`` are standard errors over prompts.
    """

    units: BlockUnits
    context: Tensor
    memory: Tensor
    context_error: Tensor
    memory_error: Tensor

    @property
    def preference(self) -> Tensor:
        """By how much more a head carries what was read than what was remembered."""
        return self.context - self.memory

    def clear(self, favour: str) -> Tensor:
        """Tell which heads carry one answer, by more than noise and more than the other."""
        effect, error = (self.context, self.context_error) if favour == "context" else (self.memory, self.memory_error)
        sign = 1.0 if favour == "context" else -1.0
        return (effect > CLEAR * error) & (sign * self.preference > 0)


@dataclass(frozen=True)
class Mediation:
    """The effects of every head, and how the prompts were answered: share of either answer as the likeliest token."""

    layers: tuple[LayerEffects, ...]
    prompts: int
    answered_context: float
    answered_memory: float

    def best(self, favour: str, share: float) -> list[Tensor]:
        """Return which heads of each layer are a share of all, those of the most preference; fewer where less clear."""
        sign = 1.0 if favour == "context" else -1.0
        scores = torch.cat([sign * one.preference for one in self.layers])
        clear = torch.cat([one.clear(favour) for one in self.layers])
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[scores.argsort(descending=True)[: round(share * len(scores))]] = True
        return list((chosen & clear).split([one.units.count for one in self.layers]))


@torch.no_grad()
def make_prompts(program: Program, count: int, passages: Tensor | None = None) -> Prompts:
    """Make prompts from ``passages [P,L]``, or from passages that are sampled from the model.

    Of all passages those are used whose next token the model is surest of. Raises ``MemcError`` E207 where there are
    fewer than two, or the model has too few tokens or positions.
    """
    limit, generator = token_limit(program), torch.Generator().manual_seed(SEED)
    if passages is None:
        passages = sample_text(program, SEED, sequences=CANDIDATES * count, length=PASSAGE).tokens
    length = 2 * passages.shape[1] + 1 + FILLER
    most = program.model.longest
    if len(passages) < 2 or limit < 4 or (most is not None and length > most):
        reason = f"no prompts of {length} tokens can be made of {len(passages)} passages and {limit} tokens"
        raise MemcError("E207", reason, program.model.source, "give more --data")
    chances = gated_logits(program, passages, positions_of(passages), {})[:, -1, :limit].float().softmax(-1)
    sure, memory = chances.max(-1)
    chosen = sure.argsort(descending=True)[: min(count, len(passages))]
    passages, memory = passages[chosen], memory[chosen]
    context = _other_than(memory[:, None], limit, generator)
    other = _other_than(torch.stack([memory, context], -1), limit, generator)
    filler = torch.randint(limit, (len(chosen), FILLER), generator=generator)
    twins = passages.roll(1, 0)
    return Prompts(
        tokens=torch.cat([passages, context[:, None], filler, passages], 1),
        context=context,
        memory=memory,
        other_context=torch.cat([passages, other[:, None], filler, passages], 1),
        other_memory=torch.cat([twins, context[:, None], filler, twins], 1),
    )


@torch.no_grad()
def mediation(program: Program, units: Sequence[BlockUnits], prompts: Prompts, progress: Progress) -> Mediation:
    """Patch the path of every query head of ``units`` to the logits of the last token, each head by itself."""
    frozen = {one.node for one in units}
    paths = [_Path(program, one, frozen) for one in units]
    clean = _values(program, paths, prompts.tokens)
    corrupted = [_values(program, paths, part) for part in (prompts.other_context, prompts.other_memory)]
    answers = (prompts.context, prompts.memory)
    found = []
    with progress.step("patch the paths of the heads", sum(one.count for one in units)) as advance:
        for one, path in zip(units, paths, strict=True):
            own, effects = clean[one.node.name], torch.zeros(one.count, 2, len(prompts.tokens))
            for side, (twin, answer) in enumerate(zip(corrupted, answers, strict=True)):
                before = _chance(path(clean, own), answer)
                for heads in torch.arange(one.count).split(max(1, ROWS // len(own))):
                    patched = own.repeat(len(heads), *[1] * (own.dim() - 1)).unflatten(0, (len(heads), -1))
                    for row, head in enumerate(heads):
                        patched[row, :, head] = twin[one.node.name][:, head]
                    after = _chance(path(clean, patched.flatten(0, 1)), answer.repeat(len(heads)))
                    effects[heads, side] = before - after.unflatten(0, (len(heads), -1))
            advance(one.count)
            means, error = effects.mean(-1), effects.std(-1) / len(prompts.tokens) ** 0.5
            found.append(LayerEffects(one, means[:, 0], means[:, 1], error[:, 0], error[:, 1]))
    top = gated_logits(program, prompts.tokens, positions_of(prompts.tokens), {})[:, -1].argmax(-1)
    shares = [float((top == answer).float().mean()) for answer in answers]
    return Mediation(tuple(found), len(prompts.tokens), *shares)


class _Path:
    """What lies between one attention's result and the logits where every other attention's result is given.

    Nothing there mixes tokens, so that it is run for the last token alone.
    """

    def __init__(self, program: Program, units: BlockUnits, frozen: Collection[Node]) -> None:
        self.source, after = units.node, {units.node}
        for node in program.module.graph.nodes:
            if node not in frozen and not after.isdisjoint(node.all_input_nodes):
                after.add(node)

        def given(node: Node) -> bool:
            """Take values, not sizes, which are those of one token; nor parameters."""
            known = node is units.node or node not in after
            return known and node.op != "get_attr" and isinstance(node.meta.get("val"), Tensor)

        self._module, self.names, _ = cut(program, [logits_node(program)], given)
        nodes = {node.name: node for node in program.module.graph.nodes}
        role = next(spec.name for spec in program.inputs if spec.role == "tokens")
        batch, count = map(str, nodes[role].meta["val"].shape)
        axes = {name: [str(size) for size in nodes[name].meta["val"].shape] for name in self.names}
        self._axis = {name: sizes.index(count) if count in sizes else None for name, sizes in axes.items()}
        self._batched = {name for name, sizes in axes.items() if sizes[:1] == [batch]}

    def __call__(self, values: Mapping[str, Tensor], patched: Tensor) -> Tensor:
        """Return the logits ``[K N,V]`` of the last token with the attention's result as it is ``patched [K N,...]``.

        ``values`` are those of N prompts.
        """
        times = len(patched) // len(values[self.source.name])
        given = [
            self._last(name, patched) if name == self.source.name else self._repeated(name, values, times)
            for name in self.names
        ]
        logits: Tensor = self._module(*given)[0]
        return logits[:, -1]

    def _last(self, name: str, value: Tensor) -> Tensor:
        axis = self._axis[name]
        return value if axis is None else value.narrow(axis, value.shape[axis] - 1, 1)

    def _repeated(self, name: str, values: Mapping[str, Tensor], times: int) -> Tensor:
        value = self._last(name, values[name])
        return value.repeat(times, *[1] * (value.dim() - 1)) if name in self._batched else value


def _values(program: Program, paths: Sequence[_Path], tokens: Tensor) -> dict[str, Tensor]:
    """Run a program once and return the values that the paths are given."""
    names = list(dict.fromkeys(name for path in paths for name in (path.source.name, *path.names)))
    found: dict[str, Tensor] = {}
    Teacher(program, [names]).run(tokens, positions_of(tokens), lambda _, values: found.update(values))
    return found


def _chance(logits: Tensor, answers: Tensor) -> Tensor:
    """Return the log-probability ``[N]`` of each answer."""
    return logits.float().log_softmax(-1).gather(-1, answers[:, None])[:, 0]


def _other_than(taken: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    """Draw a token ``[N]`` for each row that none of ``taken [N,K]`` is."""
    chances = torch.ones(len(taken), limit).scatter_(1, taken, 0.0)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]

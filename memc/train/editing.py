"""Edits of a model by a side copy of one projection (WISE, Wang et al. 2024, arXiv 2405.14768), one after the other.

The program is one that ``memory_bank:kind=side`` has given the copy. An edit is learned by the copy's change alone.
What lies below the copy never moves, so it is computed once for each edit, and the layers above it at every step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program import Program, get_tensor, set_tensor
from memc.progress import Progress
from memc.train.blocks import Teacher, cut, logits_node
from memc.train.loop import Schedule, only, optimiser, require_finite

aten = torch.ops.aten

CHANGE, THRESHOLD = "change", "threshold"
"""Last parts of the names of the copy's two parameters."""

ROWS = 16
"""Unrelated sequences that are run at once."""

APART = 5
"""Of so many unrelated sequences one teaches nothing, where there are four times as many: the threshold is for what is
like them and was never shown."""

WORST = 64
"""Unrelated tokens whose excess counts where many edits are learned: behind the worst one comes the next."""

INSIDE, OUTSIDE = 4.0, 2.0
"""Weights there of how far edits, and these tokens, miss the bounds; beside the text, and the worst one, each once."""


@dataclass(frozen=True)
class Edit:
    """What is to follow a prompt from now on, and ``others`` that ask the same; token ids, none of them empty."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    others: tuple[tuple[int, ...], ...] = ()

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Every prompt that the target is to follow."""
        return self.prompt, *self.others


@dataclass(frozen=True)
class EditSettings:
    """How edits are learned: at most ``steps`` of AdamW each, together with ``replay`` earlier ones drawn anew.

    ``inside`` and ``outside`` bound the activation difference, in units of the usual size of the block's output: that
    of an edit's prompt is to be at least ``inside``, that of any unrelated token at most ``outside`` (the paper's beta
    and alpha); a step looks at ``drawn`` of those. An edit is done once its loss is below ``enough`` nats a token and
    both bounds hold. Three replayed edits hold some thirty, and not a hundred: more than can be replayed are learned
    together, ``together`` of their prompts to a step and all of them ``steps`` times, the rate falling as a cosine.
    Half of the tokens drawn are the worst there are then.

    ``keep`` is the share of unrelated sequences that the threshold is to leave as they are; one token in a thousand
    sets it, so that a little less lets many more edits, and other wordings of them, through.
    """

    steps: int = 40
    rate: float = 5e-3
    replay: int = 3
    inside: float = 0.6
    outside: float = 0.2
    drawn: int = 512
    enough: float = 0.05
    together: int = 8
    keep: float = 1.0


@dataclass(frozen=True)
class Edited:
    """An edited program, and of each edit the steps that it took and the least activation difference of its prompts.

    ``unrelated`` is the largest difference of the unrelated tokens, taught or not, ``threshold`` the one that routes;
    ``clear`` tells that it separates every edit from every unrelated token.
    """

    program: Program
    steps: tuple[int, ...]
    differences: tuple[float, ...]
    unrelated: float
    threshold: float

    @property
    def clear(self) -> bool:
        """Whether every edit is above the threshold and every unrelated token below."""
        return self.unrelated < self.threshold < min(self.differences)


@dataclass(frozen=True)
class _Prepared:
    """A prompt of an edit, run as far as the copy: what the copy reads, and what is given to the layers above.

    ``last`` is the place of the prompt's last token, which the first token of the ``target`` follows.
    """

    last: int
    target: tuple[int, ...]
    entry: Tensor
    given: dict[str, Tensor]


class SideEditor:
    """Learns edits one after the other; :meth:`finish` sets the threshold and returns the program."""

    def __init__(self, program: Program, unrelated: Tensor, settings: EditSettings, seed: int = 0) -> None:
        """Find the copy, and what it is given on ``unrelated [N,T]``, sequences that are to stay as they are.

        Raises ``MemcError`` E208 for a program without a side copy.
        """
        load_kernels()
        self.settings = settings
        self.program = program.copy()
        self._name = _copy_of(program)
        for name in (self._name, _threshold_of(self._name)):
            set_tensor(self.program.module, name, get_tensor(program.module, name).detach().clone())
        self._read, self._where = _nodes(self.program, self._name)
        above = _above(self._where)
        part = cut(self.program, [logits_node(self.program)], lambda n: n.op != "get_attr" and n not in above)
        self._upper, self._inputs, self._states = part
        names = (*dict.fromkeys((self._read.name, self._output.name, *self._inputs)),)
        self._teacher = Teacher(self.program, [names])
        self._random = random.Random(seed)
        self._done: list[tuple[_Prepared, ...]] = []
        self._steps: list[int] = []
        self._hardest: list[int] = []
        self._last: Tensor | None = None
        self._length = unrelated.shape[1]
        self._unrelated, self._apart, self._unit = self._look_at(unrelated)
        self._change = dict(self.program.module.named_parameters())[self._name]
        self._made = optimiser([{"params": [self._change], "peak": settings.rate, "lr": settings.rate}])

    @property
    def _output(self) -> Node:
        """The node of the block's own output, which the copy's stands in for."""
        node = self._where.args[2]
        assert isinstance(node, Node)
        return node

    def learn(self, edit: Edit) -> int:
        """Learn one edit and return the steps it took; earlier ones are replayed, later ones are not known.

        Raises ``MemcError``: E205 for an empty prompt or target, E403 when a loss is not finite.
        """
        prepared, done = self._prepared(edit), self._prompts()
        step = 0
        with only(dict(self.program.module.named_parameters()), [self._name]):
            for step in range(1, self.settings.steps + 1):
                earlier = self._random.sample(done, min(self.settings.replay, len(done)))
                if self._step([*prepared, *earlier], len(prepared), f"edit {len(self._done) + 1}", step):
                    break
        self._done.append(prepared)
        self._steps.append(step)
        return step

    def _look_at(self, unrelated: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return what the copy reads of unrelated tokens that teach and of those that do not, and an output's size."""
        reads, sizes = [], []
        for rows in unrelated.split(ROWS):
            values = self._run(rows)
            reads.append(values[self._read.name].reshape(*rows.shape, -1).float())
            sizes.append(values[self._output.name].float().norm(dim=-1).flatten())
        read, number = torch.cat(reads), torch.arange(len(unrelated))
        apart = (number % APART == APART - 1) & (len(unrelated) >= 4 * APART)
        return read[~apart].flatten(0, 1), read[apart].flatten(0, 1), float(torch.cat(sizes).median())

    def learn_together(self, edits: Sequence[Edit], advance: Callable[[int, str], None] = lambda *_: None) -> None:
        """Learn many edits from where the copy stands, all of them gone through ``steps`` times.

        Each round is told to ``advance``. Raises ``MemcError`` as :meth:`learn`.
        """
        settings, begun = self.settings, len(self._done)
        self._done += [self._prepared(edit) for edit in edits]
        order, rounds = self._prompts(), 0
        self._last = torch.stack([each.entry[0, each.last] for each in order])
        (group,) = self._made.param_groups
        with only(dict(self.program.module.named_parameters()), [self._name]):
            for rounds in range(1, settings.steps + 1):
                self._random.shuffle(order)
                self._hardest = self._worst()
                group["lr"] = settings.rate * Schedule(settings.steps).share(rounds - 1)
                parts = (order[at : at + settings.together] for at in range(0, len(order), settings.together))
                learned = [self._step(part, len(part), "all edits", rounds) for part in parts]
                advance(1, f"{sum(learned)} of {len(learned)} parts learned")
                if all(learned):
                    break
        group["lr"], self._hardest, self._last = settings.rate, [], None
        self._steps += [rounds] * (len(self._done) - begun)

    @torch.no_grad()
    def _worst(self) -> list[int]:
        """Return the unrelated tokens whose differences are largest now, half of what a step looks at."""
        found = self._differences(self._unrelated)
        return found.topk(min(len(found), self.settings.drawn // 2)).indices.tolist()

    def _prepared(self, edit: Edit) -> tuple[_Prepared, ...]:
        if not all(edit.prompts) or not edit.target:
            raise MemcError("E205", "an edit has a prompt and a target, and neither is empty")
        return tuple(self._prepare(prompt, edit.target) for prompt in edit.prompts)

    def _prepare(self, prompt: Sequence[int], target: tuple[int, ...]) -> _Prepared:
        values = self._run(torch.tensor([[*prompt, *target[:-1]]]))
        return _Prepared(len(prompt) - 1, target, values[self._read.name].float(), values)

    def _prompts(self) -> list[_Prepared]:
        """Return every prompt of the edits learned so far."""
        return [prompt for prompts in self._done for prompt in prompts]

    def _step(self, prompts: Sequence[_Prepared], first: int, where: str, step: int) -> bool:
        """Take a step for some prompts, unless the ``first`` ones are learned and all bounds hold; tell whether so."""
        text, loss = self._losses(prompts, first)
        require_finite("loss", loss, where, step)
        if text < self.settings.enough and float(loss.detach()) < 2 * self.settings.enough:
            return True
        self._made.zero_grad(set_to_none=True)
        loss.backward()
        self._made.step()
        return False

    @torch.no_grad()
    def finish(self, keep: float | None = None) -> Edited:
        """Set the threshold between the unrelated tokens and the edits, nearer to what it must not route.

        ``keep`` stands in for that of the settings; what was learned stays, so that several may be tried.
        """
        differences = [
            min(float(self._difference(each.entry[0, each.last])) for each in prompts) for prompts in self._done
        ]
        unrelated = float(self._differences(torch.cat([self._unrelated, self._apart])).max())
        bound = self._bound(self.settings.keep if keep is None else keep)
        threshold = max((bound * min(differences, default=bound)) ** 0.5, 1.05 * bound, 1e-6)
        set_tensor(self.program.module, _threshold_of(self._name), torch.tensor([threshold]))
        return Edited(self.program, tuple(self._steps), tuple(differences), unrelated, threshold)

    def _bound(self, keep: float) -> float:
        """Return the activation difference that no token of a share ``keep`` of the unrelated sequences is above.

        Of those that taught nothing, where there are any: the others have been pushed down. All of both for one.
        """
        taught, apart = (self._differences(e).view(-1, self._length).amax(1) for e in (self._unrelated, self._apart))
        worst = torch.cat([taught, apart]) if keep == 1 or not len(apart) else apart
        return float(worst.sort().values[math.ceil(keep * len(worst)) - 1])

    def _losses(self, prompts: Sequence[_Prepared], first: int) -> tuple[float, Tensor]:
        """Return the worst text of the ``first`` ones, and the loss: texts, and how far differences miss the bounds."""
        texts = [self._text_loss(each) for each in prompts]
        last = torch.stack([each.entry[0, each.last] for each in prompts]) if self._last is None else self._last
        inside = (self.settings.inside - self._difference(last) / self._unit).clamp_min(0).mean()
        random = self._random.choices(range(len(self._unrelated)), k=self.settings.drawn - len(self._hardest))
        outside = self._difference(self._unrelated[random + self._hardest]) / self._unit
        over = (outside - self.settings.outside).clamp_min(0)
        if self._hardest:
            bounds = INSIDE * inside + OUTSIDE * over.topk(min(WORST, len(over))).values.mean() + over.max()
        else:
            bounds = inside + over.mean() + over.max()
        return max(float(text.detach()) for text in texts[:first]), torch.stack(texts).mean() + bounds

    def _text_loss(self, edit: _Prepared) -> Tensor:
        """Return the cross-entropy of a prompt's target, with the copy read from the first routed token on."""
        change = functional.linear(edit.entry, self._change)
        bound = 0.5 * (self.settings.inside + self.settings.outside) * self._unit
        over = change.detach().norm(dim=-1) > bound
        over[:, edit.last] = True
        routed = over.long().cumsum(1) > 0
        own = edit.given[self._output.name].reshape(change.shape)
        mixed = torch.where(routed.unsqueeze(-1), own + change.to(own.dtype), own)
        given = {**edit.given, self._where.name: mixed}
        states = (spec.empty(1) for spec in self._states)
        logits = self._upper(*(given[name] for name in self._inputs), *states)[0]
        return functional.cross_entropy(logits[0, edit.last :].float(), torch.tensor(edit.target))

    def _difference(self, entry: Tensor) -> Tensor:
        """Return the activation difference of tokens ``[...,hidden]``; its gradient is finite at zero."""
        return (functional.linear(entry, self._change).square().sum(-1) + 1e-12).sqrt()

    def _differences(self, entries: Tensor) -> Tensor:
        """Return the activation differences of many tokens ``[N,hidden]``, some at a time."""
        return torch.cat([self._difference(part) for part in entries.split(4096)])

    def _run(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return what the layers above the copy, and the copy, are given on ``tokens [N,T]``."""
        held: dict[str, Tensor] = {}
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        self._teacher.run(tokens, positions, lambda _, values: held.update(values))
        return held


def edit_program(
    program: Program,
    edits: Sequence[Edit],
    unrelated: Tensor,
    progress: Progress,
    settings: EditSettings | None = None,
    seed: int = 0,
) -> Edited:
    """Return a program with ``edits`` made, and what each took; ``unrelated [N,T]`` stays.

    One after the other where the earlier ones can all be replayed, else together.

    A sequence that no edit is about keeps every bit of its logits, and so does any other up to the token that is about
    one. Raises ``MemcError`` as :class:`SideEditor`.
    """
    settings = settings or EditSettings()
    editor = SideEditor(program, unrelated, settings, seed)
    if sum(len(edit.prompts) for edit in edits) <= 1 + settings.replay:
        with progress.step("edit", len(edits)) as advance:
            for edit in edits:
                advance(1, f"{editor.learn(edit)} steps")
    else:
        with progress.step(f"learn {len(edits)} edits together", settings.steps) as advance:
            editor.learn_together(edits, advance)
    return editor.finish()


def answers(logits: Callable[[list[int]], Any], edit: Edit) -> bool:
    """Tell whether the most likely tokens after every prompt are the target's, each after those before it.

    ``logits`` gives those of a sequence, ``[T,V]`` as a tensor or an array.
    """
    target = list(edit.target)
    return all(
        logits([*prompt, *target[:-1]])[len(prompt) - 1 :].argmax(-1).tolist() == target for prompt in edit.prompts
    )


@torch.no_grad()
def follows(program: Program, edit: Edit) -> bool:
    """Tell whether a program answers as an edit says."""
    return answers(lambda ids: program.run(torch.tensor([ids]))[0], edit)


def has_side_copy(program: Program) -> bool:
    """Tell whether a program has a side copy, which edits can be taught to."""
    return bool(_copies(program))


def _copies(program: Program) -> list[str]:
    names = {name for name, _ in program.module.named_parameters()}
    found = (name for name in names if name.startswith("memc.") and name.endswith(f".{CHANGE}"))
    return [name for name in found if _threshold_of(name) in names]


def _copy_of(program: Program) -> str:
    found = _copies(program)
    if len(found) != 1:
        hint = "convert it with --pass memory_bank:kind=side"
        raise MemcError("E208", "the model has no side copy to edit", program.model.source, hint)
    return found[0]


def _threshold_of(name: str) -> str:
    return f"{name.removesuffix(CHANGE)}{THRESHOLD}"


def _nodes(program: Program, name: str) -> tuple[Node, Node]:
    """Return the node that the copy reads, and the one that chooses between the copy's output and the block's own."""
    (read,) = [node for node in program.module.graph.find_nodes(op="get_attr") if node.target == name]
    (product,) = read.users
    above = _above(product)
    chooses = [node for node in program.module.graph.nodes if node in above and node.target == aten.where.self]
    where = next(node for node in chooses if node.meta["val"].is_floating_point())
    entry = product.args[0]
    assert isinstance(entry, Node)
    return entry, where


def _above(node: Node) -> set[Node]:
    """Return the nodes that are computed from one, itself left out."""
    found, stack = set[Node](), list(node.users)
    while stack:
        user = stack.pop()
        if user not in found:
            found.add(user)
            stack += user.users
    return found

"""Edits of a model by a side copy of one projection (WISE, Wang et al. 2024, arXiv 2405.14768), one after the other.

The program is one that ``memory_bank:kind=side`` has given the copy. An edit is learned by the copy's change alone.
What lies below the copy never moves, so it is computed once for each edit, and the layers above it at every step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from memc.errors import MemcError
from memc.plugins import load_kernels
from memc.program import Program, get_tensor, set_tensor
from memc.progress import Progress
from memc.train.blocks import Teacher, cut, logits_node
from memc.train.loop import only, optimiser, require_finite

aten = torch.ops.aten

CHANGE, THRESHOLD = "change", "threshold"
"""Last parts of the names of the copy's two parameters."""

ROWS = 16
"""Unrelated sequences that are run at once."""


@dataclass(frozen=True)
class Edit:
    """What is to follow a prompt from now on, both as token ids and neither empty."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True)
class EditSettings:
    """How edits are learned: at most ``steps`` of AdamW each, together with ``replay`` earlier ones drawn anew.

    ``inside`` and ``outside`` bound the activation difference, in units of the usual size of the block's output: that
    of an edit's prompt is to be at least ``inside``, that of any unrelated token at most ``outside`` (the paper's beta
    and alpha); a step looks at ``drawn`` of those. An edit is done once its loss is below ``enough`` nats a token and
    both bounds hold. After the last one all of them are gone through together, ``together`` to a step and at most
    ``rounds`` times, until none has been forgotten: three replayed ones hold some thirty edits, and not a hundred.
    """

    steps: int = 40
    rate: float = 5e-3
    replay: int = 3
    inside: float = 0.6
    outside: float = 0.2
    drawn: int = 512
    enough: float = 0.05
    rounds: int = 8
    together: int = 8


@dataclass(frozen=True)
class Edited:
    """An edited program, and of each edit the steps that it took and the activation difference of its prompt.

    ``unrelated`` is the largest difference of the unrelated tokens, ``threshold`` the one that routes; ``clear`` tells
    that it separates every edit from every unrelated token.
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
    """One edit, run as far as the copy: what is given to the layers above, and its tokens ``[1,T]``."""

    edit: Edit
    entry: Tensor
    given: dict[str, Tensor]

    @property
    def last(self) -> int:
        """Place of the prompt's last token, which the first token of the target follows."""
        return len(self.edit.prompt) - 1


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
        self._done: list[_Prepared] = []
        self._steps: list[int] = []
        found = [self._run(rows) for rows in unrelated.split(ROWS)]
        self._unrelated = torch.cat([values[self._read.name].flatten(0, -2).float() for values in found])
        outputs = torch.cat([values[self._output.name].flatten(0, -2).float() for values in found])
        self._unit = float(outputs.norm(dim=-1).median())
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
        if not edit.prompt or not edit.target:
            raise MemcError("E205", "an edit has a prompt and a target, and neither is empty")
        tokens = torch.tensor([[*edit.prompt, *edit.target[:-1]]])
        values = self._run(tokens)
        prepared = _Prepared(edit, values[self._read.name].float(), values)
        named = dict(self.program.module.named_parameters())
        step = 0
        with only(named, [self._name]):
            for step in range(1, self.settings.steps + 1):
                earlier = self._random.sample(self._done, min(self.settings.replay, len(self._done)))
                if self._step([prepared, *earlier], f"edit {len(self._done) + 1}", step):
                    break
        self._done.append(prepared)
        self._steps.append(step)
        return step

    def settle(self) -> None:
        """Go through all edits until none has been forgotten.

        Raises ``MemcError`` E403 for a loss that is not finite.
        """
        order, settings = list(self._done), self.settings
        with only(dict(self.program.module.named_parameters()), [self._name]):
            for number in range(settings.rounds if len(order) > 1 + settings.replay else 0):
                self._random.shuffle(order)
                parts = (order[at : at + settings.together] for at in range(0, len(order), settings.together))
                settled = [self._step(part, "all edits", number) for part in parts]
                if all(settled):
                    return

    def _step(self, edits: Sequence[_Prepared], where: str, step: int) -> bool:
        """Take a step for some edits, unless the first one is learned and all bounds hold; tell whether they do."""
        text, loss = self._losses(edits)
        require_finite("loss", loss, where, step)
        if text < self.settings.enough and float(loss.detach()) < 2 * self.settings.enough:
            return True
        self._made.zero_grad(set_to_none=True)
        loss.backward()
        self._made.step()
        return False

    @torch.no_grad()
    def finish(self) -> Edited:
        """Set the threshold between the unrelated tokens and the edits, nearer to what it must not route."""
        differences = [float(self._difference(each.entry[0, each.last])) for each in self._done]
        unrelated = float(self._difference(self._unrelated).max())
        threshold = max((unrelated * min(differences, default=unrelated)) ** 0.5, 1.05 * unrelated, 1e-6)
        set_tensor(self.program.module, _threshold_of(self._name), torch.tensor([threshold]))
        return Edited(self.program, tuple(self._steps), tuple(differences), unrelated, threshold)

    def _losses(self, edits: Sequence[_Prepared]) -> tuple[float, Tensor]:
        """Return the first edit's loss on its text, and the whole: texts, and how far the differences miss bounds."""
        texts = [self._text_loss(each) for each in edits]
        inside = torch.stack([self._difference(each.entry[0, each.last]) for each in edits]) / self._unit
        drawn = self._random.choices(range(len(self._unrelated)), k=self.settings.drawn)
        outside = self._difference(self._unrelated[drawn]) / self._unit
        over = (outside - self.settings.outside).clamp_min(0)
        bounds = (self.settings.inside - inside).clamp_min(0).mean() + over.max() + over.mean()
        return float(texts[0].detach()), torch.stack(texts).mean() + bounds

    def _text_loss(self, edit: _Prepared) -> Tensor:
        """Return the cross-entropy of an edit's target, with the copy read from the first routed token on."""
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
        return functional.cross_entropy(logits[0, edit.last :].float(), torch.tensor(edit.edit.target))

    def _difference(self, entry: Tensor) -> Tensor:
        """Return the activation difference of tokens ``[...,hidden]``; its gradient is finite at zero."""
        return (functional.linear(entry, self._change).square().sum(-1) + 1e-12).sqrt()

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
    """Return a program with ``edits`` made one after the other, and what each took; ``unrelated [N,T]`` stays.

    A sequence that no edit is about keeps every bit of its logits, and so does any other up to the token that is about
    one. Raises ``MemcError`` as :class:`SideEditor`.
    """
    editor = SideEditor(program, unrelated, settings or EditSettings(), seed)
    with progress.step("edit", len(edits)) as advance:
        for edit in edits:
            advance(1, f"{editor.learn(edit)} steps")
    with progress.step("settle the edits"):
        editor.settle()
    return editor.finish()


@torch.no_grad()
def follows(program: Program, edit: Edit) -> bool:
    """Tell whether the most likely tokens after the prompt are the target's, each after those before it."""
    tokens = torch.tensor([[*edit.prompt, *edit.target[:-1]]])
    found = program.run(tokens)[0, len(edit.prompt) - 1 :].argmax(-1)
    return found.tolist() == list(edit.target)


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

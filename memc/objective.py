"""What a pass says about training what it added: one objective for each rewritten block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

Values = Mapping[str, Tensor]
"""Values of graph nodes by the name of the node."""


@dataclass(frozen=True)
class BlockObjective(ABC):
    """How one rewritten block learns from the block it replaces, on that block's own inputs.

    ``parameters`` maps the short names of what the pass added to the qualified ones. ``target`` is the node of the
    program before whose value the block has to give, ``reads`` are further nodes of it that the losses look at.
    ``results`` names nodes of the program after; the first one stands for ``target``. ``exact`` is the number of
    leading tokens of a sequence that the block gets right by construction.

    Where only some heads of a block were replaced, ``heads`` are those of ``target`` that the first result stands for,
    in order, and ``whole`` is the node of the program after that stands for all of it.

    ``branches`` names the parts that the first result is put together from, what the pass added first. Each can be
    left out (:meth:`without`), which shows what a model owes to it. ``stands_for`` says what of the replaced block the
    first of them has to stand for, in a few words. ``no_share`` says why no share of a mass is known for it; where that
    is empty, :meth:`carried` and :meth:`due` tell.
    """

    branches: ClassVar[tuple[str, ...]] = ()
    stands_for: ClassVar[str] = ""
    no_share: ClassVar[str] = ""

    layer: int
    path: str
    parameters: Mapping[str, str]
    target: str
    reads: tuple[str, ...]
    results: tuple[str, ...]
    exact: int
    heads: tuple[int, ...] = field(default=(), kw_only=True)
    whole: str = field(default="", kw_only=True)

    def wanted(self, values: Values) -> Tensor:
        """Return what the first result has to be: the value of ``target``, of ``heads`` alone if there are any."""
        target = values[self.target]
        return target[:, list(self.heads)] if self.heads else target

    @abstractmethod
    def losses(
        self, results: Sequence[Tensor], values: Values, done: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return the terms of the loss by name, weighted, each a scalar; the first is what progress shows.

        ``results`` are the values of ``self.results``, ``values`` those of ``target`` and ``reads``; ``done`` is the
        share of the training that is over, from 0 to 1. Anything random comes from ``generator``.
        """

    def initialise(self, values: Values, parameters: Values, run: Callable[[], Sequence[Tensor]]) -> None:
        """Set first values of the parameters in closed form, in place, from a few sequences.

        ``values`` are those of ``target``, ``reads`` and every input of the block; ``run`` gives the ``results`` with
        the parameters as they are. A pass that has no such values leaves this as it is.
        """
        return

    def without(self, branch: str, results: Sequence[Tensor]) -> Tensor:
        """Return what the first result would be if one of ``branches`` gave nothing and the others stood alone.

        ``results`` are the values of ``self.results``, which the program computes no later than the first.
        """
        raise ValueError(f"layer {self.layer} {self.path} has no branch {branch!r}")

    def carried(self, results: Sequence[Tensor]) -> Tensor:
        """Return the share ``[B,H,T]`` of the mass behind the first result that its first branch holds."""
        raise ValueError(f"layer {self.layer} {self.path} has no share of a mass")

    def due(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the share ``[B,H,T]`` that the replaced block gave to what the first branch stands for.

        And the tokens ``[B,T]`` for which there is anything of the kind: no other counts. ``values`` are those of
        ``reads``.
        """
        raise ValueError(f"layer {self.layer} {self.path} has no share of a mass")


def relative_error(output: Tensor, target: Tensor, exact: int) -> Tensor:
    """Return the squared error over the target's square, ``[B,H,T,E]``, of the tokens from ``exact`` on.

    0 when there is none. Relative, so that every layer weighs alike whatever the size of its values, which span three
    orders of magnitude in one model; the mean over the sequences, so that the halves of a batch make the whole.
    """
    output, target = output[:, :, exact:].float(), target[:, :, exact:].float()
    if not target.shape[2]:
        return output.sum()
    squares = target.square().sum((1, 2, 3)).clamp_min(1e-12)
    return ((output - target).square().sum((1, 2, 3)) / squares).mean()

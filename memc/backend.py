"""What a backend is: it says which ops it lowers, lowers a program into a folder, and runs that folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest, Port, State, Table
from memc.errors import MemcError

if TYPE_CHECKING:
    from torch.fx import Node

    from memc.program import Program
    from memc.target import Target


@dataclass(frozen=True)
class Yes:
    """The backend lowers the op; ``how`` names the form chosen."""

    how: str


@dataclass(frozen=True)
class No:
    """The backend does not lower the op."""

    reason: str


@dataclass(frozen=True)
class LowerOptions:
    """What the user asked of lowering.

    ``context`` is the capacity of growing states, None for the model's own limit. ``tune`` is how many other forms of
    each kind of product are timed on this machine; ``tuned`` an artifact whose results of that are used where they
    hold.
    """

    weights: str = "fp32"
    context: int | None = None
    threads: int | None = None
    tune: int = 0
    tuned: Path | None = None


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote: the main file below the artifact's folder, and how to feed it."""

    path: str
    inputs: list[Port]
    outputs: list[Port]
    states: list[State]
    capacity: int | None
    symbols: dict[str, str] = field(default_factory=dict)
    how_to_run: str = ""
    forms: dict[str, str] = field(default_factory=dict)
    """For each dialect op, the form it was lowered to."""

    tables: list[Table] = field(default_factory=list)
    """Weights of which a token reads a few rows, where the runner can leave the others in the file."""


class RunState(ABC):
    """The states of a batch of sequences, held by a runner in whatever memory it likes."""

    batch: int

    @abstractmethod
    def copy(self) -> RunState:
        """Return an independent copy."""

    @abstractmethod
    def select(self, rows: list[int]) -> RunState:
        """Return a copy of some rows of the batch, in this order, repeats allowed."""

    @abstractmethod
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return every state by its input name, as host arrays, growing ones cut to what they hold."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of memory that the states take."""


class Runner(ABC):
    """A loaded artifact. Host arrays in, host arrays out; imports no torch unless the backend is torch itself."""

    manifest: Manifest

    @abstractmethod
    def new_state(self, batch: int, capacity: int | None = None) -> RunState:
        """Allocate fresh states; growing ones for ``capacity`` tokens (None: the manifest's)."""

    @abstractmethod
    def restore(self, arrays: Mapping[str, npt.NDArray[np.generic]], capacity: int | None = None) -> RunState:
        """Rebuild a state from ``RunState.arrays``."""

    @abstractmethod
    def run(
        self,
        tokens: npt.NDArray[np.int64] | None,
        positions: npt.NDArray[np.int64] | None,
        state: RunState,
        keep: npt.NDArray[np.int64] | None = None,
        inputs: Mapping[str, npt.NDArray[np.generic]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run ``tokens [B,T]`` at ``positions [B,T]`` (-1 is padding) and advance ``state`` in place.

        ``inputs`` are all others by name; tokens or positions that are None are looked for there, those that the
        program does not take are not read, and what is fetched is zero where it is not given. ``keep [K]`` lists the
        columns whose logits are wanted, all when None. Returns the first output as float32, a decoder's logits
        ``[B,K,vocab]``. Raises ``MemcError`` E208 for an input that is missing, E200 for values that the program cannot
        take.
        """

    def gather(
        self,
        tokens: npt.NDArray[np.int64] | None,
        positions: npt.NDArray[np.int64] | None,
        inputs: Mapping[str, npt.NDArray[np.generic]] | None,
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Return every input of the program but ``keep`` by name. Raises ``MemcError`` E208 naming one not given."""
        found = dict(inputs or {})
        for port in self.manifest.inputs:
            given = {"tokens": tokens, "positions": positions}.get(port.role)
            if given is not None:
                found[port.name] = given
            elif port.role == "fetched" and tokens is not None and port.name not in found:
                found[port.name] = port.nothing(len(tokens))
            elif port.name not in found and port.role != "keep":
                hint = f"give {port.name}=ARRAY of {port.dtype} {port.shape}"
                raise MemcError("E208", f"the model's input {port.name!r} is not given", self.manifest.source, hint)
        return found


class Backend(ABC):
    """A way to run programs on some targets."""

    name: ClassVar[str]
    weights: ClassVar[tuple[str, ...]]
    """Weight types that it takes."""

    def missing(self) -> str:
        """Return why it cannot be used on this machine and what to type next, empty when it can. Cheap."""
        return ""

    def self_test(self) -> str:
        """Try it out, in seconds, and return what goes wrong, empty when it works."""
        return self.missing()

    def require(self, target: Target) -> None:
        """Raise ``MemcError`` E602 where this machine lacks a tool that lowering for a target takes. Cheap."""
        return

    def runs_here(self, target: Target) -> bool:
        """Tell whether what it lowers for a target can be loaded on this machine."""
        return True

    @abstractmethod
    def supports(self, node: Node, target: Target) -> Yes | No:
        """Tell whether and how it lowers one node of a raised program."""

    @abstractmethod
    def refuses_weights(self, weights: str, target: Target) -> str | None:
        """Return why it does not take a weight type on a target, or None when it does."""

    def taken_weights(self, target: Target) -> tuple[str, ...]:
        """Return the weight types that it takes on a target."""
        return tuple(kind for kind in self.weights if self.refuses_weights(kind, target) is None)

    def refuses_tuning(self, target: Target) -> str | None:
        """Return why there is nothing to time for a target (``LowerOptions.tune``), or None where there is."""
        return f"the {self.name} backend has no forms of a product to choose from"

    @abstractmethod
    def lower(self, program: Program, target: Target, folder: Path, options: LowerOptions) -> Lowered:
        """Write the lowered program under ``folder/lowered/<name>``.

        Raises ``MemcError`` E601 that names the first op it does not support, before anything is written.
        """

    @abstractmethod
    def load(self, folder: Path, manifest: Manifest, threads: int | None = None) -> Runner:
        """Load a lowered program. Raises ``MemcError`` E602 when the runtime is missing or too old."""

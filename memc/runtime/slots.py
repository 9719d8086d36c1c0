"""States in arrays of a fixed size, and runners over them: what backends with buffers of slots share. No torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest, State, held
from memc.backend import Runner, RunState
from memc.errors import MemcError

Array = npt.NDArray[np.generic]


class SlotState(RunState):
    """States of a batch as host arrays, growing ones with room for the whole capacity."""

    def __init__(self, runner: SlotRunner, arrays: dict[str, Array], lengths: npt.NDArray[np.int64]) -> None:
        """Hold ``arrays`` of every state; ``lengths [B]`` tokens are in the growing ones."""
        self.batch = len(lengths)
        self.lengths = lengths
        self._runner = runner
        self._arrays = arrays

    @property
    def current(self) -> dict[str, Array]:
        """The arrays that the next call reads, growing ones with all their slots."""
        return self._arrays

    @property
    def held(self) -> int:
        """Tokens that the longest sequence holds in growing states."""
        return int(self.lengths.max(initial=0))

    def size(self, name: str, axis: int) -> int:
        """Return a size of a state's array, with all slots of one that grows."""
        return int(self.current[name].shape[axis])

    @property
    def bytes(self) -> int:
        """Bytes of the states; the buffers in which swapped ones take turns are not counted twice."""
        return sum(self.current[s.input].nbytes for s in self._runner.manifest.states)

    def copy(self) -> SlotState:
        """Return an independent copy."""
        return self.select(list(range(self.batch)))

    def select(self, rows: list[int]) -> SlotState:
        """Return a copy of some rows, in this order."""
        chosen = {}
        for name, array in self.current.items():
            chosen[name] = self._runner.allocate((len(rows), *array.shape[1:]), array.dtype)
            np.take(array, rows, axis=0, out=chosen[name])
        return type(self)(self._runner, chosen, self.lengths[rows])

    def arrays(self) -> dict[str, Array]:
        """Return a copy of every state, growing ones cut to the tokens of the longest sequence."""
        return {
            state.input: (
                array if state.grows is None else _cut(array, state.grows, held(state.shape[state.grows], self.held))
            ).copy()
            for state in self._runner.manifest.states
            for array in (self.current[state.input],)
        }

    def advance(self, positions: npt.NDArray[np.int64]) -> None:
        """Take note of the tokens of a finished call."""
        reached = positions.max(axis=1) + 1
        self.lengths = np.where(reached > 0, reached, self.lengths)


class SlotRunner(Runner):
    """A runner whose growing states are buffers: slot p holds the token at position p."""

    state_type: type[SlotState] = SlotState

    def __init__(self, manifest: Manifest) -> None:
        """Read from the manifest what is fed by name."""
        self.manifest = manifest
        self.keep = next((port.name for port in manifest.inputs if port.role == "keep"), None)
        self._positions = next((port.name for port in manifest.inputs if port.role == "positions"), None)
        self._grows = any(state.grows is not None for state in manifest.states)

    @abstractmethod
    def call(
        self, feeds: dict[str, Array], sizes: Mapping[str, int], state: Any, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the program once on ``feeds``, every input by name, and the state; return its first output.

        ``sizes`` are the symbols of the inputs. ``keep`` is among ``feeds`` where the program selects columns itself.
        """

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Return memory for a state, filled with zeros."""
        return np.zeros(shape, dtype)

    def fresh(self, shape: tuple[int, ...], state: State) -> Array:
        """Return a fresh state of some shape."""
        filled = self.allocate(shape, state.dtype)
        if state.init:
            filled.fill(state.init)
        return filled

    def put(self, source: Array, target: Array) -> bool:
        """Copy what was saved of a state into a fresh one; tell whether it fits."""
        if source.shape != target.shape or source.dtype != target.dtype:
            return False
        target[...] = source
        return True

    def new_state(self, batch: int, capacity: int | None = None) -> SlotState:
        """Allocate fresh states; memory of growing ones is touched only as tokens come."""
        slots = self._capacity(capacity) + 1
        arrays: dict[str, Array] = {}
        for state in self.manifest.states:
            shape = tuple(batch if n == "B" else held(n, slots) for n in state.shape)
            arrays[state.input] = self.fresh(shape, state)
        return self.state_type(self, arrays, np.zeros(batch, np.int64))

    def restore(self, arrays: Mapping[str, Array], capacity: int | None = None) -> SlotState:
        """Rebuild a state; raises ``MemcError`` E208 for arrays of another artifact and E206 past the capacity."""
        names = [state.input for state in self.manifest.states]
        if sorted(names) != sorted(arrays):
            missing = sorted(set(names) ^ set(arrays))
            raise MemcError("E208", f"the saved state is of another artifact: {', '.join(missing[:3])}", "state")
        if not names:
            return self.new_state(1, capacity)
        fresh = self.new_state(len(arrays[names[0]]), capacity)
        for state in self.manifest.states:
            source, target = arrays[state.input], fresh.current[state.input]
            if state.grows is not None:
                size = source.shape[state.grows]
                if state.shape[state.grows] == "S":
                    self._check_capacity(size, target.shape[state.grows] - 1)
                    fresh.lengths = np.full(fresh.batch, size, np.int64)
                target = _cut(target, state.grows, size)
            if not self.put(source, target):
                found = f"{source.dtype} {list(source.shape)}, not {state.dtype} {list(target.shape)}"
                raise MemcError("E208", f"the saved state {state.input} is {found}")
        return fresh

    def run(
        self,
        tokens: npt.NDArray[np.int64] | None,
        positions: npt.NDArray[np.int64] | None,
        state: RunState,
        keep: npt.NDArray[np.int64] | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run new tokens and advance ``state``; see ``Runner.run``.

        A call in which a row starts another sequence runs one sequence of each row after the other where states grow:
        their buffers have one slot a position, which the new sequence would overwrite while the tokens before it still
        read them. Raises ``MemcError`` E206 for a position past the capacity.
        """
        assert isinstance(state, SlotState)
        feeds = self.gather(tokens, positions, inputs)
        places: Any = feeds[self._positions] if self._positions is not None else None
        if places is None:
            return self._call(feeds, None, state, keep)
        self._check(places, state)
        sequence = _sequences(places)
        if not self._grows or not sequence.any():
            return self._call(feeds, places, state, keep)
        columns = np.arange(places.shape[1]) if keep is None else np.asarray(keep, np.int64)
        logits: npt.NDArray[np.float32] | None = None
        for number in range(int(sequence.max()) + 1):
            mine = sequence == number
            reached = np.flatnonzero(mine.any(axis=0))
            part = slice(int(reached[0]), int(reached[-1]) + 1)
            wanted = np.flatnonzero(mine[:, columns].any(axis=0))
            # One column must be named even when none is wanted.
            local = columns[wanted] - part.start if len(wanted) else np.zeros(1, np.int64)
            found = self._call(self._part(feeds, part), np.where(mine, places, -1)[:, part], state, local)
            if logits is None:
                logits = np.empty((found.shape[0], len(columns), *found.shape[2:]), np.float32)
            row, column = np.nonzero(mine[:, columns[wanted]])
            logits[row, wanted[column]] = found[row, column]
        assert logits is not None
        return logits

    def _part(self, feeds: Mapping[str, Array], columns: slice) -> dict[str, Array]:
        """Cut every input that has an axis of tokens to some columns."""
        cut = dict(feeds)
        for port in self.manifest.inputs:
            if "T" in port.shape:
                cut[port.name] = feeds[port.name][(slice(None),) * port.shape.index("T") + (columns,)]
        return cut

    def _call(
        self, feeds: dict[str, Array], places: Any, state: SlotState, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        if self._positions is not None:
            feeds[self._positions] = places
        ports = [port for port in self.manifest.inputs if port.role != "keep"]
        sizes = {n: size for p in ports for n, size in zip(p.shape, feeds[p.name].shape, strict=True)}
        if self.keep is not None:
            feeds[self.keep] = np.arange(sizes["T"]) if keep is None else np.asarray(keep, np.int64)
            sizes["K"] = len(feeds[self.keep])
        logits = self.call(feeds, {str(name): size for name, size in sizes.items()}, state, keep)
        if places is not None:
            state.advance(places)
        return logits if self.keep is not None or keep is None else logits[:, keep]

    def _capacity(self, capacity: int | None) -> int:
        return capacity or self.manifest.capacity or 0

    def _check(self, positions: npt.NDArray[np.int64], state: SlotState) -> None:
        if not self._grows:
            if self.manifest.capacity is not None:
                self._check_capacity(int(positions.max()) + 1, self.manifest.capacity)
            return
        grown = next(s for s in self.manifest.states if "S" in s.shape)
        slots = state.size(grown.input, grown.grows or 0)
        self._check_capacity(int(positions.max()) + 1, slots - 1)

    @staticmethod
    def _check_capacity(tokens: int, capacity: int) -> None:
        if tokens > capacity:
            hint = f"convert with --context {tokens} or more"
            raise MemcError("E206", f"a sequence of {tokens} tokens is past the capacity of {capacity}", "state", hint)


def _sequences(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for ``positions [B,T]`` how many sequences have started in the row after tokens of another one."""
    starts = np.zeros(positions.shape, np.int64)
    starts[:, 1:] = (positions[:, 1:] == 0) & (np.maximum.accumulate(positions, axis=1)[:, :-1] >= 0)
    return starts.cumsum(axis=1)


def _cut(array: Array, axis: int, size: int) -> Array:
    return array[(slice(None),) * axis + (slice(0, size),)]

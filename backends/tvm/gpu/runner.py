"""Runs a library on a GPU: numpy in, numpy out, parameters and states in the GPU's memory. Imports no torch."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from memc.backends.tvm.library import CUDA
from memc.backends.tvm.runner import TvmRunner
from memc.runtime.slots import Array, SlotState

NAMES = {1: "cpu", 2: "cuda"}


class DeviceState(SlotState):
    """States of a batch in the memory of a device; arrays of the host hold them while they are looked at or written.

    ``current`` takes the states back to the host, and the next call to the device again.
    """

    _placed: dict[str, Any] | None = None

    @property
    def current(self) -> dict[str, Array]:
        """The arrays that the next call reads, on the host."""
        if self._placed is not None:
            for name, tensor in self._placed.items():
                self._runner.fetch(tensor, self._arrays[name])  # type: ignore[attr-defined]
            self._placed = None
        return self._arrays

    @property
    def bytes(self) -> int:
        """Bytes of the states on the device."""
        return sum(array.nbytes for array in self._arrays.values())

    def size(self, name: str, axis: int) -> int:
        """Return a size of a state, with all slots of one that grows."""
        return int(self._arrays[name].shape[axis])

    def placed(self) -> dict[str, Any]:
        """Return the states on the device."""
        if self._placed is None:
            runner: Any = self._runner
            self._placed = {name: runner.place(array) for name, array in self._arrays.items()}
        return self._placed


class DeviceRunner(TvmRunner):
    """A library whose functions read and write the memory of a device."""

    state_type = DeviceState
    device = CUDA

    def place(self, array: Array) -> Any:
        """Return a copy of an array in the device's memory."""
        found = self._function("TVMTensorAllocWithScope")(
            self._ffi.Shape(array.shape), self._ffi.dtype(str(array.dtype)), self._ffi.device(NAMES[self.device]), None
        )
        array = np.ascontiguousarray(array)
        if array.nbytes:
            self._function("TVMTensorCopyFromBytes")(found, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return found

    def fetch(self, tensor: Any, into: Array) -> Array:
        """Copy what lies in the device's memory ``into`` a contiguous array, once what writes it has ended."""
        if into.nbytes:
            self._function("TVMTensorCopyToBytes")(tensor, ctypes.c_void_p(into.ctypes.data), into.nbytes)
        return into

    def call(
        self, feeds: dict[str, Array], sizes: Mapping[str, int], state: Any, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the library once; see ``SlotRunner.call``. Raises ``MemcError`` E200 for ids out of range."""
        self._check_ids(feeds, sizes)
        given = [self.place(np.asarray(feeds[port.name], port.dtype)) for port in self.manifest.inputs]
        placed = state.placed()
        outputs = self._entry(*given, *(placed[name] for name in self.info.states), *self._parameters)
        for name, output in zip(self.info.returned, list(outputs)[1:], strict=True):
            self._function("TVMTensorCopyFromTo")(output, placed[name])
        logits = outputs[0]
        made: Any = self.fetch(logits, np.empty(tuple(logits.shape), str(logits.dtype)))
        return made  # type: ignore[no-any-return]

    def _function(self, name: str) -> Any:
        return self._ffi.get_global_func(f"runtime.{name}")

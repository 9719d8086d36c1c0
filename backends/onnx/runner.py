"""Runs a lowered file: numpy in, numpy out, states bound in place. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from memc.artifact import Manifest
from memc.backends.onnx.rows import map_rows, too_large
from memc.errors import MemcError
from memc.runtime.slots import Array, SlotRunner, SlotState

onnxruntime.disable_telemetry_events()  # its own, on by default in the packages of some systems

_LOAD_ERRORS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NoSuchFile,
    errors.NotImplemented,
    errors.RuntimeException,
)


class OnnxState(SlotState):
    """States of a batch: two buffers that take turns for each swapped state, one for each that is updated in place."""

    def __init__(self, runner: SlotRunner, arrays: dict[str, Array], lengths: npt.NDArray[np.int64]) -> None:
        """Hold ``arrays`` of every state; ``lengths [B]`` tokens are in the growing ones."""
        super().__init__(runner, arrays, lengths)
        self._other: dict[str, Array] = {}
        self._turn = 0
        self._bindings: list[Any] = []

    @property
    def current(self) -> dict[str, Array]:
        """The arrays that the next call reads, growing ones with all their slots."""
        return self._other if self._turn else self._arrays

    def binding(self) -> Any:
        """Return the binding of the states for the next call, made on the first one."""
        if not self._bindings:
            first, states = self._arrays, self._runner.manifest.states
            self._other = {
                s.input: first[s.input] if s.update == "alias" else np.empty_like(first[s.input]) for s in states
            }
            self._bindings = [self._bind(first, self._other), self._bind(self._other, first)]
        return self._bindings[self._turn]

    def _bind(self, read: dict[str, Array], written: dict[str, Array]) -> Any:
        assert isinstance(self._runner, OnnxRunner)
        binding = self._runner.session.io_binding()
        for port in self._runner.manifest.outputs[1:]:
            binding.bind_output(port.name, "cpu")
        for state in self._runner.manifest.states:
            for array, bind, name in (
                (read[state.input], binding.bind_input, state.input),
                (written[state.input], binding.bind_output, state.output),
            ):
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return binding

    def advance(self, positions: npt.NDArray[np.int64]) -> None:
        """Take the outputs of a finished call for the state."""
        self._turn = 1 - self._turn
        super().advance(positions)


class OnnxRunner(SlotRunner):
    """A session on one lowered file."""

    state_type = OnnxState

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None = None) -> None:
        """Open the file with ``threads`` threads inside an op (None: the runtime's choice)."""
        super().__init__(manifest)
        self.folder = folder
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        # A memory that fades passes through subnormal numbers, which are many times slower.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        path, tables = folder / manifest.lowered, manifest.tables
        self._mapped = map_rows(folder, tables, options) if too_large(folder, tables) else []
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            reason = str(error).splitlines()[0]
            raise MemcError(
                "E602", f"onnxruntime cannot load the file: {reason}", str(path), "convert again"
            ) from error
        self._logits = manifest.outputs[0]
        self._ports = {port.name: port for port in manifest.inputs}

    def call(
        self, feeds: dict[str, Array], sizes: Mapping[str, int], state: Any, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the file once on ``feeds`` and the bound states; see ``SlotRunner.call``."""
        binding = state.binding()
        for name, array in feeds.items():
            for part, values in self._ports[name].cut(array).items():
                binding.bind_cpu_input(part, np.ascontiguousarray(values))
        # A buffer of our own: reading the outputs back would wrap every state anew.
        logits = np.empty([sizes[n] if isinstance(n, str) else n for n in self._logits.shape], np.float32)
        binding.bind_output(self._logits.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except RuntimeError as error:  # what io binding raises for whatever goes wrong
            reason = str(error).splitlines()[0].partition("Status Message: ")[2]
            if "out of data bounds" not in reason:
                raise
            reason = self._out_of_range(feeds) or reason
            raise MemcError("E200", f"an input is out of range: {reason}", self.manifest.source) from error
        return logits

    def _out_of_range(self, feeds: Mapping[str, Array]) -> str:
        """Name an id that is none, "" where all are: the runtime tells of the number that it looked up."""
        vocab = self.manifest.vocab_size
        for name, port in self._ports.items():
            if name not in feeds or port.role not in ("tokens", "other") or port.dtype != "int64":
                continue
            for number in (int(feeds[name].min()), int(feeds[name].max())):
                if number < 0 or (port.role == "tokens" and vocab is not None and number >= vocab):
                    return f"{name} holds {number}, which is no id"
        return ""

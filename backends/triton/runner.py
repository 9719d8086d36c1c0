"""Runs a lowered program on a GPU: states in buffers there, written in place, a step replayed as one CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memc.artifact import Manifest, Port, State, held
from memc.backends.triton.graph import Prepared
from memc.errors import MemcError
from memc.kernels.launch import Launcher, launching
from memc.runtime.slots import Array, SlotRunner, SlotState


class TensorSlots(SlotState):
    """States of a batch as tensors where the program runs, growing ones with room for the whole capacity."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the next call reads and writes."""
        found: Any = self._arrays
        return found  # type: ignore[no-any-return]

    @tensors.setter
    def tensors(self, tensors: dict[str, Tensor]) -> None:
        held: Any = tensors
        self._arrays = held

    def select(self, rows: list[int]) -> TensorSlots:
        """Return a copy of some rows, in this order."""
        chosen: Any = {name: value[rows] for name, value in self.tensors.items()}
        return TensorSlots(self._runner, chosen, self.lengths[rows])

    def arrays(self) -> dict[str, Array]:
        """Return a copy of every state, growing ones cut to what is held; bfloat16, which numpy lacks, as float32."""
        cut = {}
        for state in self._runner.manifest.states:
            value = self.tensors[state.input]
            if state.grows is not None:
                value = value.narrow(state.grows, 0, held(state.shape[state.grows], self.held))
            value = value.cpu()
            cut[state.input] = (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
        return cut


class TritonRunner(SlotRunner):
    """A prepared module on a device, and the launcher of its kernels."""

    state_type = TensorSlots

    def __init__(
        self,
        prepared: Prepared,
        manifest: Manifest,
        device: torch.device,
        launcher: Launcher,
        *,
        compiled: bool = False,
    ) -> None:
        """Take a module that is on ``device``; ``compiled``: what is between the kernels goes through torch.compile."""
        super().__init__(manifest)
        self.device, self.launcher, self.swapped = device, launcher, prepared.swapped
        self._module: Any = torch.compile(prepared.module, dynamic=True) if compiled else prepared.module
        self._steps: dict[Any, Step] = {}
        self._fetched: dict[str, tuple[weakref.ref[Array], Tensor]] = {}

    def fresh(self, shape: tuple[int, ...], state: State) -> Any:
        """Return a fresh state of some shape, on the device."""
        return torch.full(shape, state.init, dtype=getattr(torch, state.dtype), device=self.device)

    def put(self, source: Array, target: Any) -> bool:
        """Copy what was saved of a state into a fresh one; tell whether it fits."""
        value = torch.from_numpy(source)
        if value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            return False
        target.copy_(value)
        return True

    def call(
        self, feeds: dict[str, Array], sizes: Mapping[str, int], state: Any, keep: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.float32]:
        """Run the program once; see ``SlotRunner.call``. Raises ``MemcError`` E200 for token ids out of range."""
        self._check_ids(feeds)
        fed = [self._sent(port, feeds[port.name]) for port in self.manifest.inputs]
        with torch.no_grad(), launching(self.launcher, self.device.type):
            if self.device.type == "cuda" and sizes.get("T") == 1:
                output = self._step(fed, state)
            else:
                output = self.run_once(fed, state.tensors)
        array: npt.NDArray[np.float32] = output.float().cpu().numpy()
        return array

    def run_once(self, fed: Sequence[Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
        """Run the module; states change where they lie. Returns the first output."""
        output, *others = self._module(*fed, *(tensors[state.input] for state in self.manifest.states))
        if self.swapped:
            for name, value in zip(self.swapped, others[-len(self.swapped) :], strict=True):
                tensors[name].copy_(value)
        return output  # type: ignore[no-any-return]

    def _step(self, fed: Sequence[Tensor], state: TensorSlots) -> Tensor:
        shapes = tuple(tuple(x.shape) for x in (*fed, *state.tensors.values()))
        if shapes not in self._steps:
            self._steps[shapes] = Step(self, fed, state)
        return self._steps[shapes].replay(fed, state)

    def _sent(self, port: Port, array: Array) -> Tensor:
        """Return an input on the device; what is fetched is sent once for as long as the same array is given.

        One that may be written to may hold something else by the next call, and is sent with each.
        """
        if port.role != "fetched" or array.flags.writeable:
            return self._fed(array, port.dtype)
        known = self._fetched.get(port.name)
        if known is None or known[0]() is not array:
            known = self._fetched[port.name] = weakref.ref(array), self._fed(array, port.dtype)
        return known[1]

    def _fed(self, array: Array, dtype: str) -> Tensor:
        given = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return given.to(self.device, getattr(torch, dtype))

    def _check_ids(self, feeds: Mapping[str, Array]) -> None:
        """Refuse ids that are no row of the embedding: on a GPU looking them up ends the whole process."""
        names = [port.name for port in self.manifest.inputs if port.role == "tokens"]
        vocabulary = self.manifest.vocab_size
        for name in names:
            ids = feeds[name]
            if vocabulary is not None and ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
                message = f"an input is out of range: {name} holds ids that are not below {vocabulary}"
                raise MemcError("E200", message, self.manifest.source)


class Step:
    """One token for each sequence of a batch, captured once as a CUDA graph with buffers of its own.

    The state that was stepped last lives in the buffers; another one moves in when it is its turn, and the one before
    moves out, so that a conversation on its own is never copied.
    """

    def __init__(self, runner: TritonRunner, fed: Sequence[Tensor], state: TensorSlots) -> None:
        """Capture a step on padding, which changes nothing."""
        self.inputs = [torch.zeros_like(x) for x in fed]
        for port, x in zip(runner.manifest.inputs, self.inputs, strict=True):
            if port.role == "positions":
                x.fill_(-1)
        self.tensors = {name: torch.zeros_like(value) for name, value in state.tensors.items()}
        self._owner: weakref.ref[TensorSlots] | None = None
        self._given: tuple[Tensor, ...] = ()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Loads the kernels, which may not happen while a graph is captured.
            for _ in range(2):
                runner.run_once(self.inputs, self.tensors)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = runner.run_once(self.inputs, self.tensors)

    def replay(self, fed: Sequence[Tensor], state: TensorSlots) -> Tensor:
        """Step a state; returns the first output, which the next step overwrites."""
        self._adopt(state)
        for buffer, value, last in zip(self.inputs, fed, self._given or (None,) * len(fed), strict=True):
            if value is not last:
                buffer.copy_(value)
        self._given = tuple(fed)
        self.graph.replay()
        return self.output

    def _adopt(self, state: TensorSlots) -> None:
        if state.tensors is self.tensors:
            return
        before = self._owner() if self._owner is not None else None
        if before is not None and before.tensors is self.tensors:
            before.tensors = {name: value.clone() for name, value in self.tensors.items()}
        for name, value in state.tensors.items():
            self.tensors[name].copy_(value)
        state.tensors = self.tensors
        self._owner = weakref.ref(state)

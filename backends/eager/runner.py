"""Run a loaded program in torch, host arrays in and out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from memc.artifact import Manifest
from memc.backend import Runner, RunState
from memc.errors import MemcError
from memc.program import Program

Array = npt.NDArray[np.generic]


class EagerState(RunState):
    """The states of a batch as tensors, by input name. Growing ones are as long as what they hold."""

    def __init__(self, batch: int, tensors: dict[str, Tensor]) -> None:
        """Take the states of ``batch`` sequences."""
        self.batch = batch
        self.tensors = tensors

    def copy(self) -> EagerState:
        """Return an independent copy."""
        return EagerState(self.batch, {name: value.clone() for name, value in self.tensors.items()})

    def select(self, rows: list[int]) -> EagerState:
        """Return a copy of some rows of the batch, in this order, repeats allowed."""
        return EagerState(len(rows), {name: value[rows] for name, value in self.tensors.items()})

    def arrays(self) -> dict[str, Array]:
        """Return every state by its input name; bfloat16, which numpy lacks, as float32."""
        return {name: to_array(value) for name, value in self.tensors.items()}

    @property
    def bytes(self) -> int:
        """Bytes of memory that the states take."""
        return sum(value.numel() * value.element_size() for value in self.tensors.values())


class EagerRunner(Runner):
    """A program and the device it runs on."""

    def __init__(self, program: Program, manifest: Manifest, device: str = "cpu") -> None:
        """Move the program to ``device``; the program belongs to the runner from then on."""
        self.program, self.manifest, self.device = program, manifest, torch.device(device)
        if self.device.type != "cpu":
            program.module.to(self.device)
            program.make_tensors_on(self.device)
        program.module.requires_grad_(False)

    def new_state(self, batch: int, capacity: int | None = None) -> EagerState:
        """Allocate fresh states. Growing ones start empty and have no fixed capacity."""
        fresh = self.program.new_state(batch, self.device)
        return EagerState(batch, {spec.name: value for spec, value in zip(self.program.states, fresh, strict=True)})

    def restore(self, arrays: Mapping[str, Array], capacity: int | None = None) -> EagerState:
        """Rebuild a state from ``RunState.arrays``.

        Raises ``MemcError`` E208 when a state is missing or the arrays are another model's.
        """
        tensors: dict[str, Tensor] = {}
        batches = set()
        for spec in self.program.states:
            value = arrays.get(spec.name)
            if value is None or not _fits(value.shape, spec.shape):
                found = "missing" if value is None else f"of shape {list(value.shape)}, not {list(spec.shape)}"
                hint = "use a state that this artifact saved"
                raise MemcError("E208", f"state {spec.name} is {found}", where=self.manifest.source, next=hint)
            tensors[spec.name] = torch.tensor(value, dtype=spec.dtype, device=self.device)
            batches.add(value.shape[0])
        if len(batches) > 1:
            raise MemcError("E208", f"states disagree on the batch: {sorted(batches)}", where=self.manifest.source)
        return EagerState(batches.pop() if batches else 1, tensors)

    def run(
        self,
        tokens: npt.NDArray[np.int64] | None,
        positions: npt.NDArray[np.int64] | None,
        state: RunState,
        keep: npt.NDArray[np.int64] | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Run the program and advance ``state`` in place; see :meth:`memc.backend.Runner.run`."""
        if not isinstance(state, EagerState):
            raise TypeError(f"a state of the eager backend, not {type(state).__name__}")
        given = self.gather(tokens, positions, inputs)
        # Not copied where it need not be: what is fetched can be as large as a layer, and comes with every token.
        arrays = [np.require(given[spec.name], requirements=["C", "W"]) for spec in self.program.inputs]
        specs = zip(arrays, self.program.inputs, strict=True)
        fed = [torch.from_numpy(array).to(self.device, spec.dtype) for array, spec in specs]
        with torch.no_grad():
            try:
                results = self.program(*fed, *(state.tensors[spec.name] for spec in self.program.states))
            except IndexError as error:
                raise MemcError("E200", f"an input is out of range: {error}", self.manifest.source) from error
            logits = results[0]
            if keep is not None:
                logits = logits[:, torch.tensor(keep, dtype=torch.int64, device=self.device)]
        after = results[len(self.program.outputs) :]
        state.tensors = {spec.name: value for spec, value in zip(self.program.states, after, strict=True)}
        array: npt.NDArray[np.float32] = logits.float().cpu().numpy()
        return array


def to_array(value: Tensor) -> Array:
    """Copy a tensor to a host array; bfloat16, which numpy lacks, becomes float32."""
    value = value.detach().cpu()
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy().copy()
    return array


def _fits(sizes: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    return len(sizes) == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(sizes, shape, strict=True)
    )

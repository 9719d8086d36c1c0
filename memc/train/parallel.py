"""Training in several processes that ``torchrun`` has started: each takes its share of every batch.

The processes hold the same parameters all the time, or together hold them once (:mod:`memc.train.sharding`): what is
trained does not depend on how many there are.
The first one leads: it alone converts, checks and writes, and the others follow through the training. All of them read
the folder that it writes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from memc.errors import MemcError

Value = TypeVar("Value")

PATIENCE = timedelta(days=7)
"""How long a process waits for another: one that is gone is noticed at once, verification can take hours."""


@dataclass(frozen=True)
class Processes:
    """The processes of one training: ``rank`` of this one, 0 for the one that leads, among ``count``."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that converts and writes."""
        return self.rank == 0

    def require_even(self, batch: int) -> None:
        """Raise ``MemcError`` E200 when a batch of sequences cannot be shared evenly."""
        if batch % self.count:
            hint = f"train: {{batch: {-(-batch // self.count) * self.count}}} in a recipe, or other processes"
            reason = f"a batch of {batch} sequences cannot be shared by {self.count} processes"
            raise MemcError("E200", reason, "train: batch", hint)

    def share(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's rows of ``tokens`` and ``positions [B,T]``: the shares in order are the whole."""
        return tokens.tensor_split(self.count)[self.rank], positions.tensor_split(self.count)[self.rank]

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module of which every backward averages the gradients over the processes.

        Those of its parameters that ask for one now; every one of them has to take part in every forward.
        """
        if self.count == 1:
            return module
        # Buffers are constants of the graph. To say that they need no broadcast has two names in two versions of torch.
        # What does not learn is nothing to average, and may be on another device.
        constants = [name for name, _ in module.named_buffers()]
        constants += [name for name, value in module.named_parameters() if not value.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constants)
        return DistributedDataParallel(module, init_sync=False)

    def gathering(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients only add up, unless this is the last backward of a step."""
        alone: AbstractContextManager[None] = nullcontext()
        return alone if last or not isinstance(module, DistributedDataParallel) else module.no_sync()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each value over the processes, the same in all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.count).tolist()

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the leader's values, in place."""
        if self.count > 1:
            for value in tensors:
                dist.broadcast(value, 0)

    def from_leader(self, make: Callable[[], Value]) -> Value:
        """Return what the leader makes, to all processes; the others wait for it."""
        if self.count == 1:
            return make()
        held: list[Any] = [make() if self.leads else None]
        dist.broadcast_object_list(held, 0)
        return held[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


def is_shared_out(tensor: Tensor) -> bool:
    """Tell whether each process holds a share of a tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole where each process holds a share of it: all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """Copy a whole tensor to where another is; this process's share of it where that is shared out."""
    if isinstance(like, DTensor):
        given = value.to(like.device, like.dtype)
        shared = distribute_tensor(given, like.device_mesh, like.placements, src_data_rank=None)
        return like.detach().clone().copy_(shared)
    return value.to(like.device, copy=True)


def write_shared(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors that are shared out, whole, into the safetensors file ``path`` in a new folder.

    All processes call this: each writes its shares, which the leader then puts together. Raises ``OSError`` in all of
    them when one cannot write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = path.parent
    dist.barrier()  # the leader has removed what was left there
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
    if dist.get_rank() == 0:
        (written,) = folder.glob("*.safetensors")
        rest = [each for each in folder.iterdir() if each != written]
        written.rename(path)
        for each in rest:
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def launched() -> Processes:
    """Return this process's place as ``torchrun`` has written it into the environment; alone without it."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started, for as long as this lasts.

    Raises ``MemcError`` E503 when another of them is gone.
    """
    processes = launched()
    if processes.count == 1:
        yield processes
        return
    try:
        dist.init_process_group(_backend(), timeout=PATIENCE)
        if torch.cuda.is_available():
            torch.cuda.set_device(own_gpu(processes.rank))
        yield processes
    except (dist.DistError, RuntimeError) as error:
        if not _is_of_another(error):
            raise
        reason = f"another process of the training is gone, noticed by process {processes.rank} of {processes.count}"
        raise MemcError("E503", reason, next="the same command goes on from the last checkpoint") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_gpu(rank: int) -> int:
    """Return the number of a process's GPU: those of a machine are dealt out to its processes by their rank."""
    return rank % torch.cuda.device_count()


def local_count() -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _backend() -> str:
    """Return what carries tensors: NCCL from GPU to GPU where each process has one of its own, else gloo."""
    own = torch.cuda.is_available() and local_count() <= torch.cuda.device_count() and dist.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def _is_of_another(error: BaseException) -> bool:
    """Tell whether an error is that of a lost connection: gloo raises a ``RuntimeError`` of its own text."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "Connection " in text

"""Who does the work of building a bank, piece by piece: this process, or the machines of a Ray cluster. No torch."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import astuple
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from memc.errors import MemcError

T = TypeVar("T")

Task = Callable[[int], T]
"""A piece of work by its number. It depends on that alone, so that it does not matter who does it."""

BLOCKS = 10_000
"""Most parts that the pieces of one step are handed out in."""

ANSWER_SECONDS = 5.0
"""How long a cluster may take to answer."""

_INSTALL = "pip install 'memc[ray]'"


class Workers:
    """This process, which does one piece after the other."""

    def map(self, make: Callable[[], Task[T]], numbers: range) -> Iterator[T]:
        """Yield what the task gives for each number, in order. ``make`` makes the task, once in each process."""
        if numbers:
            yield from map(make(), numbers)


class RayWorkers(Workers):
    """The processes of a Ray cluster, fed by Ray Data; what they give is the same as of this process, bit for bit.

    Every machine of the cluster has memc installed and sees the folder that is built under the same path.
    """

    def __init__(self, address: str, *, threads: int | None = None) -> None:
        """Connect to the cluster at ``address``; ``local`` starts one on this machine's processors, ``auto`` finds one.

        ``threads`` are those of one piece. Raises ``MemcError`` E602 where Ray is not installed, or nobody answers.
        """
        # Read when ray is imported: it would else send statistics of its use.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MemcError("E602", f"{error.name} is not installed", "--ray", _INSTALL) from None
        if not ray.is_initialized():
            try:
                _require_answer(address)
                ray.init(None if address == "local" else address, logging_level=logging.ERROR, log_to_driver=False)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                hint = "ray start --head on one machine, then --ray HOST:6379; or --ray local"
                raise MemcError("E602", f"no Ray cluster answers: {reason}", f"--ray {address}", hint) from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._data = ray.data
        self._threads = threads or 1

    def map(self, make: Callable[[], Task[T]], numbers: range) -> Iterator[T]:
        """Yield what the task gives for each number, in order; see ``Workers.map``. Raises what a task raises."""
        if not numbers:
            return
        context = self._data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        items = self._data.range(len(numbers), override_num_blocks=min(len(numbers), BLOCKS))
        done = items.map_batches(
            _run,
            fn_kwargs={"make": pickle.dumps(make), "numbers": numbers},
            batch_size=None,
            num_cpus=self._threads,
        )
        for row in done.iter_rows():
            made, error = pickle.loads(row["made"])
            if error is not None:
                raise MemcError(*error)
            yield made


def _require_answer(address: str) -> None:
    """Raise ``OSError`` where nobody listens at ``HOST:PORT``: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()


def _run(rows: dict[str, Any], make: bytes, numbers: range) -> dict[str, Any]:
    """Do the pieces whose places among ``numbers`` the rows hold; a refusal travels as its fields."""
    made = [_outcome(make, numbers[int(place)]) for place in rows["id"]]
    return {"made": np.array([pickle.dumps(each) for each in made], object)}


def _outcome(make: bytes, number: int) -> tuple[Any, tuple[str, ...] | None]:
    try:
        return _task(make)(number), None
    except MemcError as error:
        return None, astuple(error)


@lru_cache(maxsize=1)
def _task(make: bytes) -> Task[Any]:
    task: Task[Any] = pickle.loads(make)()
    return task

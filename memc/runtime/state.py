"""What a session remembers of its sequences."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from memc.backend import Runner, RunState
from memc.runtime.inputs import Array
from memc.runtime.rows import I64

F32 = npt.NDArray[np.float32]


@dataclass
class SessionState:
    """What a batch of sequences remembers: the backend's states, tokens seen by each row, each row's last logits.

    A session advances it in place; ``Session.fork`` makes an independent copy. ``runner`` is the one that holds
    ``run``, and no other can go on from it. ``lengths [B]`` int64; ``last [B,vocab]`` float32, None before the first
    token. ``capacity`` is the most tokens a row may have, None for no limit. ``fetched`` holds what was fetched, by
    input name, and is given to every call.
    """

    runner: Runner
    run: RunState
    lengths: I64
    last: F32 | None = None
    capacity: int | None = None
    fetched: dict[str, Array] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        """Bytes of memory that the backend's states take; what is fetched is not counted."""
        return self.run.bytes

    @property
    def fetched_bytes(self) -> int:
        """Bytes of what was fetched."""
        return sum(array.nbytes for array in self.fetched.values())

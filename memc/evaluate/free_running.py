"""Free-running agreement: two sessions go on from the same prompts, each on what it said itself; numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from memc.errors import MemcError
from memc.progress import Progress, Silent

if TYPE_CHECKING:
    from memc.runtime import Session

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FreeRunning:
    """How long two sessions say the same when each goes on greedily from its own words.

    ``first_difference`` holds for each prompt how many tokens are equal before the first that is not, ``new_tokens``
    where all are. ``equal_before`` is their mean share of ``new_tokens``; ``equal`` is the share of places that hold
    the same token, whatever came before.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    first_difference: list[int]
    equal: float

    @property
    def equal_before(self) -> float:
        """Mean share of the new tokens that come before the first difference."""
        return float(np.mean(self.first_difference)) / self.new_tokens


def free_running(
    session_a: Session,
    session_b: Session,
    ids: npt.NDArray[np.integer],
    *,
    prompt_tokens: int,
    new_tokens: int = 256,
    prompts: int = 8,
    progress: Progress | None = None,
) -> FreeRunning:
    """Cut up to ``prompts`` prompts from the text ``ids [N]``, spread evenly over it, and continue each with both.

    The likeliest token is taken at every step and what ends a text ends nothing here, so that all rows are as long.
    Raises ``MemcError``: E207 when the text is shorter than one prompt, E206 past the capacity, E208 an encoder, E403
    logits that are not finite.
    """
    ids = np.asarray(ids, np.int64)
    count = min(prompts, len(ids) // prompt_tokens)
    if count < 1:
        what = f"the text has {len(ids)} tokens, a prompt {prompt_tokens}"
        raise MemcError("E207", what, next="give more text or a smaller --context")
    starts = np.linspace(0, len(ids) - prompt_tokens, count).astype(np.int64)
    cut = [ids[start : start + prompt_tokens] for start in starts]
    watched = progress or Silent()
    said = []
    for session in (session_a, session_b):
        with watched.step(f"continuing {count} prompts by {new_tokens} tokens", total=new_tokens) as advance:
            state = session.new_state(count, prompt_tokens + new_tokens)
            logits = session.prefill(cut, state)
            drawn = np.zeros((count, new_tokens), np.int64)
            for place in range(new_tokens):
                if not np.isfinite(logits).all():
                    raise MemcError("E403", f"logits of new token {place} are not finite", str(session.folder))
                drawn[:, place] = logits.argmax(1)
                if place + 1 < new_tokens:
                    logits = session.step(drawn[:, place], state)
                advance(1)
        said.append(drawn)
    same = said[0] == said[1]
    first = np.where(same.all(1), new_tokens, same.argmin(1))
    return FreeRunning(count, prompt_tokens, new_tokens, first.tolist(), float(same.mean()))

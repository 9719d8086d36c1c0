"""What the manifest tells somebody who has onnxruntime and not memc."""

from __future__ import annotations

from memc.artifact import Port, State

_START = (
    "Run {path} with onnxruntime (CPU). Its weights are in the file of the same name with .data, in the same folder."
)

_POSITIONS = (
    "Feed tokens [B,T] int64 and positions [B,T] int64: the position of each token in its own sequence, counted from "
    "0; -1 is padding, at the left or the right of a row. Position 0 starts a sequence and clears what the states of "
    "its row held. Before the first call fill every state with its init: B is the number of sequences. After each call "
    "feed each state's output back as its input, and go on with the next positions. Any number of tokens may come at "
    "once."
)

_WHOLE = "Feed {inputs}. There is no padding: the rows of a call are equally long."

_KEEP = "keep [K] int64 lists the columns of tokens whose logits are wanted: [T - 1] for the last."

_FETCHED = (
    "Feed {fetched} in every call: what was fetched for each sequence, zeros where nothing was. The manifest has their "
    "shapes."
)

_PARTS = (
    'An input with "parts" goes in as those: its first two axes swapped, then cut along the first into as many places '
    "as each has, in order."
)

_GROWS = (
    'States with "grows" are buffers of S slots, S = capacity + 1: slot p holds the token at position p, the last slot '
    "takes padding; a size S/n is S divided by n, rounded up. Allocate them once; S must be the same in all. Bound "
    "(io_binding) to one buffer as input and output they are updated in place; with plain run() they are copied. "
    "Positions must stay below capacity, and a position 0 may only be the first token of its row in a call."
)


def how_to_run(path: str, inputs: list[Port], states: list[State]) -> str:
    """Write the manifest's ``how_to_run``."""
    fed = [f"{port.name} [{','.join(map(str, port.shape))}] {port.dtype}" for port in inputs if port.role != "keep"]
    positions = any(port.role == "positions" for port in inputs)
    parts = [_START.format(path=path), _POSITIONS if positions else _WHOLE.format(inputs=" and ".join(fed))]
    fetched = [port.name for port in inputs if port.role == "fetched"]
    if fetched:
        parts.append(_FETCHED.format(fetched=", ".join(fetched)))
    if any(port.parts for port in inputs):
        parts.append(_PARTS)
    if any(port.role == "keep" for port in inputs):
        parts.append(_KEEP)
    if any(state.grows is not None for state in states):
        parts.append(_GROWS)
    return "\n".join(parts)

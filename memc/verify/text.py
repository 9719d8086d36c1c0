"""The text that relations are measured on: given, or sampled from the original model itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memc.program import Program
from memc.progress import Advance, unseen
from memc.verify.execute import run, streams
from memc.verify.inputs import token_limit
from memc.weights import program_dtype

# Joined into one row they are 640 tokens: hundreds past a window of 256. Steps cost, sequences hardly do.
SEQUENCES = 16
LENGTH = 40

BEYOND = 256
"""Tokens by which a text goes past a length up to which nothing can differ."""


@dataclass(frozen=True)
class VerificationText:
    """Token sequences ``[N, L]`` int64 and where they come from."""

    tokens: Tensor
    origin: str


@torch.no_grad()
def sample_text(
    program: Program, seed: int, *, sequences: int = SEQUENCES, length: int = LENGTH, advance: Advance = unseen
) -> VerificationText:
    """Sample ``sequences`` of ``length`` tokens from a program at temperature 1, from uniformly drawn first tokens.

    ``advance`` is told of every token, of which each sequence has got one more.

    Sampled text is text that the model finds likely, so that a change of its predictions shows in the perplexity. A
    program that cannot be run in pieces (an encoder) gets uniformly drawn tokens, and so does one that takes none:
    everything else that it takes is drawn from them (:func:`memc.verify.inputs.inputs_of`).
    """
    vocab = token_limit(program)
    generator = torch.Generator().manual_seed(seed)
    length = min(length, program.model.longest or length)
    drawn = torch.randint(vocab, (sequences, length), generator=generator)
    if not streams(program):
        roles = {spec.role for spec in program.inputs}
        what = f"{sequences} sequences of {length} uniformly drawn tokens" if "tokens" in roles else ""
        others = "uniformly drawn inputs" if roles - {"tokens", "positions"} else ""
        return VerificationText(drawn, f"{' and '.join(filter(None, (what, others)))}, seed {seed}")
    # Steps of one token cost as much as reading the model: one in bfloat16, which has products of its own on CPUs, is
    # not converted for each of them. How likely a token is need not be known to more digits than that.
    precision = torch.bfloat16 if program_dtype(program) == torch.bfloat16 else torch.float32
    device = next(program.module.parameters()).device
    tokens, fetched = drawn[:, :1].to(device), program.nothing_fetched(sequences, device)
    text, state = [tokens], program.new_state(sequences, device)
    for index in range(length - 1):
        outputs = run(program, (tokens, torch.full_like(tokens, index), *fetched), state, precision)
        state = outputs[len(program.outputs) :]
        # In float64, so that the draw depends on no rounding of a sum over the vocabulary.
        chances = outputs[0][:, -1, :vocab].double().softmax(-1)
        level = torch.rand(sequences, 1, generator=generator).double().to(device)
        chosen = torch.searchsorted(chances.cumsum(-1), level)
        tokens = chosen.clamp(max=vocab - 1)
        text.append(tokens)
        advance(1, f"{sequences} sequences at once")
    origin = f"{sequences} sequences of {length} tokens sampled from the original, seed {seed}"
    return VerificationText(torch.cat(text, 1).cpu(), origin)


def past(text: VerificationText, length: int | None, most: int | None) -> VerificationText:
    """Return a text whose rows go past ``length`` tokens: as it is if they do, else repeated into one row.

    ``most`` is the longest row that the model takes. What a pass does only beyond ``length`` would go unseen otherwise.
    """
    if length is None or text.tokens.shape[1] > length:
        return text
    wanted = min(length + BEYOND, most or length + BEYOND)
    if wanted <= length:
        return text
    return VerificationText(take(text, 1, wanted), f"{text.origin}, repeated to {wanted} tokens")


def take(text: VerificationText, batch: int, length: int) -> Tensor:
    """Return ``[batch, length]`` tokens: consecutive stretches of the text, which starts over at its end."""
    stream = text.tokens.reshape(-1)
    index = torch.arange(batch * length) % stream.shape[0]
    return stream[index].reshape(batch, length)

"""Calibration text that asks for what stood earlier: random tokens, twice over."""

from __future__ import annotations

from dataclasses import replace

import torch

from memc.pipeline import Calibration


def with_repeats(calibration: Calibration, share: float, vocabulary: int) -> Calibration:
    """Replace a share of the sequences, evenly spaced, by random tokens of the ``vocabulary``, twice over.

    Novels seldom ask for a token that only the context tells, so that what looks it up seems to do little, and a fit
    gives it away. In the second half of such a sequence nothing else tells the next token (the text by which induction
    heads are known: Olsson et al. 2022, arXiv 2209.11895). Tokens of the text itself, drawn at random, or passages
    of it twice over did less for recall in SmolLM2-135M, and cost as much.
    """
    rows, length = calibration.tokens.shape
    count = round(share * rows)
    if not count:
        return calibration
    generator, half = torch.Generator().manual_seed(0), length // 2
    drawn = torch.randint(vocabulary, (count, length - half), generator=generator)
    at = torch.arange(count) * rows // count
    tokens, positions = calibration.tokens.clone(), calibration.positions.clone()
    tokens[at] = torch.cat([drawn, drawn[:, :half]], 1).to(tokens)
    positions[at] = torch.arange(length).to(positions)
    origin = f"{calibration.origin}; {count} of {rows} sequences random tokens, twice over"
    return replace(calibration, tokens=tokens, positions=positions, origin=origin)

"""Weights in blocks of 8 or 4 bits, in the order of bytes that ONNX Runtime's MatMulNBits reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4}

BLOCK = 32
"""Consecutive input channels that share one scale."""

NARROW = 16
"""A matrix with less than one output for so many inputs stays float32: gates and scales, small and of much effect."""

_STRETCHES = (0.92, 1.0, 1.06)
"""Scales tried for a 4-bit block, against the one that just spans it: clipping the ends can cost less than it gains."""

_ELEMENTS = 1 << 22
"""Weights quantised at a time: what is computed on the way is several times their size in float32."""

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Quantised:
    """A weight ``[out, in]``: ``scales [out, blocks]`` and the codes in the order that the kernel reads them.

    8 bits: ``codes [out, blocks, 32]``, value = scale (code - 128). 4 bits: ``codes [out, blocks, 16]``, two to a byte,
    and ``zeros [out, ceil(blocks / 2)]``, likewise: value = scale (code - zero).
    """

    codes: Codes
    scales: Floats
    zeros: Codes | None

    def code_steps(self) -> Codes:
        """Return the codes ``[out, blocks * 32]``, one to a byte."""
        codes = self.codes if self.zeros is None else _unpacked(self.codes)
        return codes.reshape(len(codes), -1)

    def zero_steps(self) -> Codes:
        """Return the zero points ``[out, blocks]`` in the same steps."""
        if self.zeros is None:
            return np.full(self.scales.shape, 128, np.uint8)
        return _unpacked(self.zeros)[:, : self.scales.shape[1]]

    def values(self, into: int) -> Floats:
        """Return the weight ``[out, into]`` that the codes stand for."""
        out, blocks = self.scales.shape
        codes = self.code_steps().reshape(out, blocks, BLOCK).astype(np.float32)
        steps = codes - self.zero_steps()[..., None].astype(np.float32)
        back: Floats = (steps * self.scales[..., None]).astype(np.float32)
        return back.reshape(out, blocks * BLOCK)[:, :into]


def quantise(weight: Floats, bits: int) -> Quantised:
    """Quantise ``weight [out, in]`` in blocks of 32 input channels.

    8 bits are symmetric, so that weights which were stored that way come back exactly. 4 bits have a whole-numbered
    zero point for each block and, of a few scales refitted by least squares, the one with the least squared error.
    """
    out, into = weight.shape
    blocks = -(-into // BLOCK)
    parts, count = [], max(1, _ELEMENTS // into)
    for start in range(0, out, count):
        rows = torch.from_numpy(np.ascontiguousarray(weight[start : start + count], np.float32))
        rows = torch.nn.functional.pad(rows, (0, blocks * BLOCK - into)).reshape(-1, blocks, BLOCK)
        parts.append(_eight(rows) if bits == 8 else _four(rows))
    codes, scales, zeros = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    if bits == 8:
        return Quantised(codes, scales, None)
    return Quantised(_packed(codes), scales, _packed(zeros))


def _eight(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = rows.abs().amax(-1, keepdim=True) / 127.0
    codes = torch.where(scale > 0, rows / scale, 0.0).round() + 128.0
    return codes.to(torch.uint8), scale[..., 0], torch.zeros(0)


def _four(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = rows.amin(-1, keepdim=True).clamp(max=0.0), rows.amax(-1, keepdim=True).clamp(min=0.0)
    span = (high - low) / 15.0
    span = torch.where(span > 0, span, 1.0)
    best: tuple[Tensor, ...] | None = None
    for stretch in _STRETCHES:
        scale = span * stretch
        zero = (-low / scale).round().clamp(0.0, 15.0)
        steps = (rows / scale).round().add(zero).clamp(0.0, 15.0) - zero
        weight = steps.square().sum(-1, keepdim=True)
        scale = torch.where(weight > 0, (rows * steps).sum(-1, keepdim=True) / weight.clamp(min=1.0), scale)
        error = (steps * scale - rows).square().sum(-1, keepdim=True)
        found = (error, steps + zero, scale, zero)
        if best is None:
            best = found
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, codes, scale, zero = best
    return codes.to(torch.uint8), scale[..., 0], zero[..., 0].to(torch.uint8)


def _packed(codes: Codes) -> Codes:
    """Put two 4-bit codes of the last axis into a byte, the first in the low half."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return np.ascontiguousarray(codes[..., 0::2] | (codes[..., 1::2] << 4))


def _unpacked(packed: Codes) -> Codes:
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)

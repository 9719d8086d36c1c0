"""Numbers in 8 or 4 bits between the ends of a range, written and read in ONNX; as ``kernels.quantised_attention``."""

from __future__ import annotations

from memc.backends.onnx.functions import float_, ints
from memc.kernels.quantised_attention.codes import levels


def encode(tag: str, x: str, top: str, low: str, bits: int, channels: int) -> str:
    """Write ``TAG_codes [..., ceil(C bits/8)]`` of ``x [..., C]`` from ``low`` to ``top``, which broadcast to it."""
    half = (channels + 1) // 2
    if bits == 8:
        packed = f"{tag}_codes = Cast<to = 2>({tag}_level)"
    else:
        packed = f"""
        {ints(f"{tag}_halves", half, channels - half)}
        {tag}_first, {tag}_second{"0" if channels % 2 else ""} = Split<axis = -1>({tag}_level, {tag}_halves)
        {_evened(tag) if channels % 2 else ""}
        {float_(f"{tag}_sixteen", 16)}
        {tag}_high = Mul({tag}_second, {tag}_sixteen)
        {tag}_byte = Add({tag}_first, {tag}_high)
        {tag}_codes = Cast<to = 2>({tag}_byte)
        """
    return f"""
    {step(tag, top, low, bits)}
    {float_(f"{tag}_nothing", 0)}
    {float_(f"{tag}_unit", 1)}
    {tag}_spread = Greater({tag}_step, {tag}_nothing)
    {tag}_safe = Where({tag}_spread, {tag}_step, {tag}_unit)
    {tag}_above = Sub({x}, {low})
    {tag}_ratio = Div({tag}_above, {tag}_safe)
    {tag}_nearest = Round({tag}_ratio)
    {tag}_level = Clip({tag}_nearest, {tag}_nothing, {tag}_levels)
    {packed}
    """


def _evened(tag: str) -> str:
    """Write the second half of an odd number of channels with one more, zero."""
    return f"""
    {ints(f"{tag}_from", 0)}
    {ints(f"{tag}_to", 1)}
    {ints(f"{tag}_axis", -1)}
    {tag}_some = Slice({tag}_first, {tag}_from, {tag}_to, {tag}_axis)
    {tag}_none = Sub({tag}_some, {tag}_some)
    {tag}_second = Concat<axis = -1>({tag}_second0, {tag}_none)
    """


def step(tag: str, top: str, low: str, bits: int) -> str:
    """Write ``TAG_step``, the distance of two levels, and ``TAG_levels``, the number of the highest."""
    return f"""
    {float_(f"{tag}_levels", levels(bits))}
    {tag}_width = Sub({top}, {low})
    {tag}_step = Div({tag}_width, {tag}_levels)
    """


def read_levels(tag: str, codes: str, bits: int, channels: int) -> str:
    """Write ``TAG_level [..., C]``, the numbers of the levels in float32, of ``codes``."""
    if bits == 8:
        return f"{tag}_level = Cast<to = 1>({codes})"
    half = (channels + 1) // 2
    odd = f"""
    {ints(f"{tag}_from", 0)}
    {ints(f"{tag}_to", channels - half)}
    {ints(f"{tag}_axis", -1)}
    {tag}_second = Slice({tag}_second0, {tag}_from, {tag}_to, {tag}_axis)
    """
    return f"""
    {tag}_fifteen = Constant<value = uint8[1] {{15}}>()
    {tag}_four = Constant<value = uint8[1] {{4}}>()
    {tag}_low4 = BitwiseAnd({codes}, {tag}_fifteen)
    {tag}_high4 = BitShift<direction = "RIGHT">({codes}, {tag}_four)
    {tag}_first = Cast<to = 1>({tag}_low4)
    {tag}_second{"0" if channels % 2 else ""} = Cast<to = 1>({tag}_high4)
    {odd if channels % 2 else ""}
    {tag}_level = Concat<axis = -1>({tag}_first, {tag}_second)
    """


def decode(tag: str, codes: str, ranges: str, bits: int, channels: int, axis: int | None = None) -> str:
    """Write ``TAG [..., C]`` of ``codes`` whose ``ranges`` hold the tops, then the lows, along their last axis.

    ``axis`` is that of tokens where ranges, which lack it, are of all of them.
    """
    spread = ""
    top, low = (f"{tag}_top", f"{tag}_low") if axis is None else (f"{tag}_top0", f"{tag}_low0")
    if axis is not None:
        spread = f"""
        {ints(f"{tag}_token_axis", axis)}
        {tag}_top = Unsqueeze({tag}_top0, {tag}_token_axis)
        {tag}_low = Unsqueeze({tag}_low0, {tag}_token_axis)
        """
    return f"""
    {top}, {low} = Split<axis = -1, num_outputs = 2>({ranges})
    {spread}
    {step(tag, f"{tag}_top", f"{tag}_low", bits)}
    {read_levels(tag, codes, bits, channels)}
    {tag}_up = Mul({tag}_level, {tag}_step)
    {tag} = Add({tag}_low, {tag}_up)
    """

"""Every kernel compiles for every GPU, cut as it is cut there: no spills, and no more memory than there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memc.backends.triton.bundle import build
from memc.backends.triton.variants import Variant, variant_of
from memc.dialect import OPS
from memc.dialect.quantised_attention import BITS, code_bytes
from memc.dialect.sparse_attention import described_tokens, description
from memc.kernels.launch import GPUS, Gpu, Notes, device_kernels, launching
from memc.kernels.tiles import tiles_of
from memc.target import get_target
from tests.kernels.triton_support import interpreted  # noqa: F401 - the compiler must not mind that it is on

pytest.importorskip("triton", reason="Triton is not installed")

BATCH, HEADS, GROUPS, HELD = 2, 8, 4, 256

Call = tuple[str, str, tuple[Any, ...], dict[str, Any]]
"""An op, the form of it to run, and what with."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(size: int, dtype: torch.dtype, tokens: int) -> Iterator[Call]:
    """Calls that together launch every kernel for heads of ``size`` channels."""

    def heads(count: int, length: int, channels: int = size) -> Tensor:
        return empty(BATCH, count, length, channels, dtype=dtype)

    def integers(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.int64)

    def single(*shape: int) -> Tensor:
        return empty(*shape, dtype=torch.float32)

    query, key, value = heads(HEADS, tokens), heads(GROUPS, tokens), heads(GROUPS, tokens)
    positions = integers(BATCH, tokens)
    past = heads(GROUPS, HELD), heads(GROUPS, HELD), integers(BATCH, HELD)
    own = (query, key, value, positions, *past)
    for softcap, slopes, sink_logits in ((0.0, None, None), (30.0, single(HEADS), single(HEADS))):
        options = {"scale": 0.1, "softcap": softcap}
        yield "attention", "forward", (*own, slopes, sink_logits), options
        yield "attention", "in_place", (*own, slopes, sink_logits), options
        ring = (heads(GROUPS, 132), heads(GROUPS, 132), integers(BATCH, 132))
        window = {**options, "window": 128, "sinks": 4}
        yield "window_memory", "forward", (query, key, value, positions, *ring, slopes, sink_logits), window
    bias = empty(BATCH, HEADS, tokens, tokens, dtype=dtype)
    yield "full_attention", "forward", (query, key, value, positions, bias), {"scale": 0.1}
    for method in ("bounds", "bounds2", "lowbit"):  # the kernels of the others hold no more
        pieces = HELD // described_tokens(method, 16)
        pages = empty(BATCH, GROUPS, pieces, *description(method, 16, size), dtype=dtype)
        sparse = {"scale": 0.1, "method": method, "page": 16, "budget": 128, "sinks": 4, "window": 64, "rerank": 2}
        yield "sparse_attention", "in_place", (*own, pages), {**sparse, "channels": 8 if method == "lowbit" else 0}
    # Each target has one of the two: they differ in how pages are described and where keys are rotated to.
    compact = {"method": "longheads", "window": 64} if size == 64 else {"method": "infllm", "window": 128}
    compact = {"scale": 0.1, **compact, "page": 64, "budget": 256, "sinks": 4}
    rotated = single(BATCH, GROUPS, HELD // 64, 2 * size), single(size // 2)
    yield "compact_attention", "in_place", (*own, *rotated), compact
    for bits in BITS:
        codes = [
            empty(BATCH, GROUPS, *sizes, code_bytes(size, bits), dtype=torch.uint8) for sizes in ((16, 16), (HELD,))
        ]
        pages, ranges, tail = heads(GROUPS, HELD // 16, 2 * size), heads(GROUPS, HELD, 2), heads(GROUPS, 16)
        states = (*codes, integers(BATCH, HELD), pages, ranges, tail, tail)
        coded = {"scale": 0.1, "bits": bits, "page": 16, "budget": 128, "sinks": 4, "window": 64, "rerank": 2}
        yield "quantised_attention", "in_place", (query, key, value, positions, *states), coded
    grads = query, heads(GROUPS, HELD + tokens), heads(GROUPS, HELD + tokens)
    yield "attention", "backward", (*grads, *own), {"scale": 0.1}
    memory = single(BATCH, GROUPS, size, size)
    for update, beta in (("gated", None), ("gated_delta", heads(GROUPS, tokens, 1).squeeze(-1))):
        for channels in (1, size):
            gate = single(BATCH, GROUPS, tokens, channels)
            given = (query, key, value, gate, positions, memory, beta)
            yield "linear_memory", "forward", given, {"update": update}
            yield "linear_memory", "backward", (query, memory, *given), {"update": update}
    x, block = empty(BATCH, tokens, 8 * size, dtype=dtype), empty(BATCH, 3, 64, 8 * size, dtype=dtype)
    yield "bank_ffn", "forward", (x, block), {"activation": "silu"}
    yield "bank_ffn", "backward", (x, x, block), {"activation": "silu"}
    yield "norm", "forward", (x, empty(8 * size, dtype=dtype)), {"eps": 1e-5}
    yield "rotary", "forward", (query, positions, single(size // 2)), {}


SPILLED_IN_TRAINING = 256
"""Bytes that gradients may spill: they are compiled where they run, and no bundle holds them."""


def needed(gpu: Gpu, size: int, dtype: torch.dtype, *, backward: bool) -> list[Variant]:
    found: dict[str, Variant] = {}
    for tokens in (1, 512):
        for op, form, arguments, options in calls(size, dtype, tokens):
            kernels = device_kernels(op)
            assert kernels is not None and op in OPS
            run = getattr(kernels, form)
            if run is None or (form == "backward") != backward:
                continue
            notes = Notes(gpu, tiles_of(gpu.name))
            grads = len(OPS[op].grads_from) if form == "backward" else 0
            with launching(notes):
                OPS[op].taking(run, grads)(*arguments, **options)
            assert notes.launches, (op, form)
            found.update({variant_of(launch).key: variant_of(launch) for launch in notes.launches})
    return list(found.values())


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("target", "size", "dtype"),
    [
        ("nvidia-sm80", 64, torch.float32),
        ("nvidia-sm90", 64, torch.bfloat16),
        ("nvidia-sm100", 128, torch.bfloat16),
        ("nvidia-sm120", 128, torch.bfloat16),
        ("amd-gfx942", 64, torch.float32),
        ("amd-gfx942", 128, torch.bfloat16),
        ("amd-gfx950", 64, torch.bfloat16),
    ],
    ids=str,
)
def test_every_kernel_compiles(target: str, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    gpu = GPUS[target]
    forward = {variant.key: variant for variant in needed(gpu, size, dtype, backward=False)}
    backward = {variant.key: variant for variant in needed(gpu, size, dtype, backward=True)}
    for variants, spills in (
        (forward, 0),
        ({key: variant for key, variant in backward.items() if key not in forward}, SPILLED_IN_TRAINING),
    ):
        bundle = build(list(variants.values()), get_target(target), gpu, tmp_path, spills=spills)
        assert len(bundle.binaries) == len(variants)

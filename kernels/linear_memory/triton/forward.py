"""Forward kernels: cumulative gates, the state that each chunk meets, all outputs at once, and short calls.

Sizes: T tokens, G key-value heads, R query heads to one, K and V channels of keys and values, CHANNELS gates to a token
(K or 1). CHUNK tokens meet a state; ROWS of them are one block of scores. All tensors are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.linear_memory.triton.blocks import (
    LOG2E,
    NOTHING,
    load_rows,
    offsets,
    present,
    scores,
    since_start,
    store_rows,
    through,
    writes,
)


@triton.jit(do_not_specialize=["T"])
def gates(
    log_decay,
    positions,
    whole,
    part,
    T,
    G: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr,
    BK: tl.constexpr,
):
    """Sum log gates up within each chunk: padding has 0, the start of a sequence forgets everything.

    Grid: chunks of all groups, blocks of gate channels.
    """
    count = tl.cdiv(T, CHUNK)
    group = (tl.program_id(0) // count).to(tl.int64)
    rows = tl.program_id(0) % count * CHUNK + tl.arange(0, CHUNK)
    channels = tl.program_id(1) * BK + tl.arange(0, BK)
    place = tl.load(positions + group // G * T + rows, mask=rows < T, other=-1)
    start = group * T * CHANNELS
    gate = load_rows(log_decay + start, rows, channels, place >= 0, CHANNELS).to(tl.float32)
    gate = tl.maximum(gate * LOG2E, NOTHING)
    gate = tl.where((place == 0)[:, None], NOTHING, gate)
    nearest = tl.floor(gate + 0.5)
    store_rows(whole + start, tl.cumsum(nearest, 0), rows, channels, rows < T, CHANNELS)
    store_rows(part + start, tl.cumsum(gate - nearest, 0), rows, channels, rows < T, CHANNELS)


@triton.jit(do_not_specialize=["T"])
def states(
    key,
    value,
    beta,
    inverse,
    positions,
    whole,
    part,
    state,
    met,
    error,
    last,
    T,
    G: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
):
    """Step from chunk to chunk: write down the state ``met`` by each, and the last.

    The delta rule's tokens write beta times ``error``, which is (I + overlap beta)^-1 (v - (head k) S).
    Grid: groups, blocks of value channels; KEYS is K, padded.
    """
    DOT: tl.constexpr = key.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    channels = tl.arange(0, KEYS)
    positions += group // G * T
    key += group * T * K
    value += group * T * V
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    count = tl.cdiv(T, CHUNK)
    memory = load_rows(state + group * K * V, channels, columns, channels < K, V).to(tl.float32)
    for number in range(count):
        store_rows(met + (group * count + number) * K * V, memory, channels, columns, channels < K, V)
        rows = number * CHUNK + tl.arange(0, CHUNK)
        end = tl.minimum(number * CHUNK + CHUNK, T) - 1
        taken = present(positions, rows, T)
        k = load_rows(key, rows, channels, taken, K)
        u = load_rows(value, rows, columns, taken, V)
        if DELTA:
            reads = (k * since_start(whole, part, rows, channels, T, CHANNELS)).to(DOT)
            wrong = u - tl.dot(reads, memory.to(DOT), input_precision=PRECISION)
            mixer = load_rows(inverse + group * T * CHUNK, rows, tl.arange(0, CHUNK), rows < T, CHUNK).to(DOT)
            wrong = tl.dot(mixer, wrong.to(DOT), input_precision=PRECISION)
            store_rows(error + group * T * V, wrong, rows, columns, rows < T, V)
            strength = tl.load(beta + group * T + rows, mask=taken, other=0.0).to(tl.float32)
            u = (wrong * strength[:, None]).to(DOT)
        tail = tl.exp2(-offsets(whole, part, rows, end, channels, T, CHANNELS))
        memory = memory * through(whole, part, end, channels, CHANNELS)[:, None]
        memory = tl.dot(tl.trans((k * tail).to(DOT)), u, memory, input_precision=PRECISION)
    store_rows(last + group * K * V, memory, channels, columns, channels < K, V)


@triton.jit(do_not_specialize=["T"])
def outputs(
    query,
    key,
    added,
    beta,
    positions,
    whole,
    part,
    met,
    out,
    T,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Read the state that the chunk met and what the tokens of the chunk added.

    Grid: blocks of rows of all query heads, blocks of value channels.
    """
    DOT: tl.constexpr = query.dtype.element_ty
    blocks = tl.cdiv(T, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    group, chunk, mark = head // R, block * ROWS // CHUNK, block * ROWS
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    rows = mark + tl.arange(0, ROWS)
    query += head * T * K
    key += group * T * K
    added += group * T * V
    beta += group * T
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    positions += group // G * T
    met += (group * tl.cdiv(T, CHUNK) + chunk) * K * V
    taken = present(positions, rows, T)
    total = tl.zeros([ROWS, BV], tl.float32)
    for first in range(0, K, BK):
        channels = first + tl.arange(0, BK)
        q = load_rows(query, rows, channels, taken, K)
        q = (q * since_start(whole, part, rows, channels, T, CHANNELS)).to(DOT)
        memory = load_rows(met, channels, columns, channels < K, V).to(DOT)
        total = tl.dot(q, memory, total, input_precision=PRECISION)
    if ROWS < CHUNK:
        for earlier in range(chunk * (CHUNK // ROWS), block):
            others = earlier * ROWS + tl.arange(0, ROWS)
            there = present(positions, others, T)
            a = scores(
                query, key, whole, part, rows, others, taken, there, mark, T, K, CHANNELS, False, ROWS, BK, PRECISION
            )
            u = writes(added, beta, others, columns, there, V, DELTA, DOT)
            total = tl.dot(a.to(DOT), u, total, input_precision=PRECISION)
    a = scores(query, key, whole, part, rows, rows, taken, taken, mark, T, K, CHANNELS, True, ROWS, BK, PRECISION)
    u = writes(added, beta, rows, columns, taken, V, DELTA, DOT)
    total = tl.dot(a.to(DOT), u, total, input_precision=PRECISION)
    total = tl.where(taken[:, None], total, 0.0)
    store_rows(out + head * T * V, total, rows, columns, rows < T, V)


@triton.jit(do_not_specialize=["T"])
def step(
    query,
    key,
    value,
    log_decay,
    beta,
    positions,
    state,
    out,
    last,
    T,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
    KEYS: tl.constexpr,
    BV: tl.constexpr,
):
    """Decay, write and read token by token, the state read and written once: for calls of a few tokens.

    Grid: groups, blocks of value channels; KEYS is K, padded.
    """
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    channels = tl.arange(0, KEYS)
    inside, within = channels < K, columns < V
    memory = load_rows(state + group * K * V, channels, columns, inside, V).to(tl.float32)
    for t in range(T):
        token = group * T + t
        place = tl.load(positions + group // G * T + t)
        # Padding reads no channel at all.
        known, kept = channels < tl.where(place >= 0, K, 0), columns < tl.where(place >= 0, V, 0)
        if CHANNELS == 1:
            gate = tl.load(log_decay + token + channels * 0, mask=known, other=0.0)
        else:
            gate = tl.load(log_decay + token * K + channels, mask=known, other=0.0)
        gate = tl.exp2(tl.maximum(gate.to(tl.float32) * LOG2E, NOTHING))
        memory = memory * tl.where(place == 0, 0.0, gate)[:, None]
        k = tl.load(key + token * K + channels, mask=known, other=0.0).to(tl.float32)
        v = tl.load(value + token * V + columns, mask=kept, other=0.0).to(tl.float32)
        if DELTA:
            strength = tl.load(beta + token + columns * 0, mask=kept, other=0.0).to(tl.float32)
            v = strength * (v - tl.sum(k[:, None] * memory, 0))
        memory = memory + k[:, None] * v[None, :]
        for r in range(R):
            read = (group * R + r) * T + t
            q = tl.load(query + read * K + channels, mask=known, other=0.0).to(tl.float32)
            found = tl.sum(q[:, None] * memory, 0)
            tl.store(out + read * V + columns, found.to(out.dtype.element_ty), mask=within)
    store_rows(last + group * K * V, memory, channels, columns, inside, V)

"""Backward kernels, by the formulas of the folder's page; sizes as in the forward kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from memc.kernels.linear_memory.triton.blocks import (
    load_rows,
    offsets,
    present,
    scores,
    since_start,
    store_rows,
    through,
    to_columns,
    to_rows,
    writes,
)


@triton.jit(do_not_specialize=["T"])
def grad_values(
    query, key, grad_out, positions, whole, part, grads, grad_added, T,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHANNELS: tl.constexpr,
    CARRIED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of what each token adds over the outputs of its chunk, and, ``CARRIED``, over what comes later.

    Grid: blocks of rows of all groups, blocks of value channels.
    """
    DOT: tl.constexpr = key.dtype.element_ty
    blocks = tl.cdiv(T, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    mark = block * ROWS
    chunk = mark // CHUNK
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    rows = mark + tl.arange(0, ROWS)
    key += group * T * K
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    positions += group // G * T
    taken = present(positions, rows, T)
    total = tl.zeros([ROWS, BV], tl.float32)
    if CARRIED:
        grads += (group * tl.cdiv(T, CHUNK) + chunk) * K * V
        end = tl.minimum(chunk * CHUNK + CHUNK, T) - 1
        for first in range(0, K, BK):
            channels = first + tl.arange(0, BK)
            k = load_rows(key, rows, channels, taken, K)
            k = (k * tl.exp2(-offsets(whole, part, rows, end, channels, T, CHANNELS))).to(DOT)
            grad = load_rows(grads, channels, columns, channels < K, V).to(DOT)
            total = tl.dot(k, grad, total, input_precision=PRECISION)
    last = tl.minimum((chunk + 1) * (CHUNK // ROWS), blocks)
    for r in range(R):
        q = query + (group * R + r) * T * K
        grad = grad_out + (group * R + r) * T * V
        a = scores(q, key, whole, part, rows, rows, taken, taken, mark, T, K, CHANNELS, True, ROWS, BK, PRECISION)
        pulled = load_rows(grad, rows, columns, taken, V)
        total = tl.dot(tl.trans(a.to(DOT)), pulled, total, input_precision=PRECISION)
        if ROWS < CHUNK:
            for later in range(block + 1, last):
                others = later * ROWS + tl.arange(0, ROWS)
                there = present(positions, others, T)
                a = scores(
                    q,
                    key,
                    whole,
                    part,
                    others,
                    rows,
                    there,
                    taken,
                    later * ROWS,
                    T,
                    K,
                    CHANNELS,
                    False,
                    ROWS,
                    BK,
                    PRECISION,
                )
                pulled = load_rows(grad, others, columns, there, V)
                total = tl.dot(tl.trans(a.to(DOT)), pulled, total, input_precision=PRECISION)
    store_rows(grad_added + group * T * V, total, rows, columns, rows < T, V)


@triton.jit(do_not_specialize=["T"])
def states_back(
    query,
    key,
    beta,
    inverse,
    grad_out,
    grad_added,
    positions,
    whole,
    part,
    grad_last,
    grads,
    right,
    grad_state,
    T,
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    CHANNELS: tl.constexpr,
    DELTA: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    BV: tl.constexpr,
):
    """Step back from chunk to chunk: write down the gradient of the state after each, and of the first state.

    For the delta rule also ``right``, the gradient of the right-hand side of (I + beta overlap) u = beta (v - reads).
    Grid: groups, blocks of value channels; KEYS is K, padded.
    """
    DOT: tl.constexpr = key.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    channels = tl.arange(0, KEYS)
    positions += group // G * T
    key += group * T * K
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    count = tl.cdiv(T, CHUNK)
    memory = load_rows(grad_last + group * K * V, channels, columns, channels < K, V).to(tl.float32)
    for passed in range(count):
        number = count - 1 - passed
        store_rows(grads + (group * count + number) * K * V, memory, channels, columns, channels < K, V)
        rows = number * CHUNK + tl.arange(0, CHUNK)
        end = tl.minimum(number * CHUNK + CHUNK, T) - 1
        taken = present(positions, rows, T)
        following = memory
        memory = memory * through(whole, part, end, channels, CHANNELS)[:, None]
        head = since_start(whole, part, rows, channels, T, CHANNELS)
        for r in range(R):
            read = group * R + r
            q = (load_rows(query + read * T * K, rows, channels, taken, K) * head).to(DOT)
            grad = load_rows(grad_out + read * T * V, rows, columns, taken, V)
            memory = tl.dot(tl.trans(q), grad, memory, input_precision=PRECISION)
        if DELTA:
            tail = tl.exp2(-offsets(whole, part, rows, end, channels, T, CHANNELS))
            writing = (load_rows(key, rows, channels, taken, K) * tail).to(DOT)
            grad = load_rows(grad_added + group * T * V, rows, columns, taken, V)
            grad = tl.dot(writing, following.to(DOT), grad, input_precision=PRECISION)
            mixer = load_rows(inverse + group * T * CHUNK, rows, tl.arange(0, CHUNK), rows < T, CHUNK).to(DOT)
            grad = tl.dot(tl.trans(mixer), grad.to(DOT), input_precision=PRECISION)
            store_rows(right + group * T * V, grad, rows, columns, rows < T, V)
            strength = tl.load(beta + group * T + rows, mask=taken, other=0.0).to(tl.float32)
            grad = (-grad * strength[:, None]).to(DOT)
            # Loaded once more, after the store: kept, they would not fit the registers.
            head = since_start(whole, part, rows, channels, T, CHANNELS)
            reading = (load_rows(key, rows, channels, taken, K) * head).to(DOT)
            memory = tl.dot(tl.trans(reading), grad, memory, input_precision=PRECISION)
    store_rows(grad_state + group * K * V, memory, channels, columns, channels < K, V)


@triton.jit
def grad_scores(
    grad,
    added,
    beta,
    rows,
    others,
    row_taken,
    other_taken,
    V: tl.constexpr,
    DELTA: tl.constexpr,
    ROWS: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the gradient ``grad u^T`` of a block of scores: ``rows`` of gradients, ``others`` of writes."""
    DOT: tl.constexpr = grad.dtype.element_ty
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        pulled = load_rows(grad, rows, columns, row_taken, V)
        u = writes(added, beta, others, columns, other_taken, V, DELTA, DOT)
        total = tl.dot(pulled, tl.trans(u), total, input_precision=PRECISION)
    return total


@triton.jit
def grad_reads(
    x,
    grad,
    key,
    added,
    beta,
    positions,
    whole,
    part,
    met,
    block,
    channels,
    strict,
    T,
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
    """Return gradients ``[rows, channels]`` of reads x_i (h_i S + sum_j E_ij k_j u_j^T): of x, and of k as read from.

    ``strict`` reads do not see what their own token writes.
    """
    DOT: tl.constexpr = key.dtype.element_ty
    chunk, mark = block * ROWS // CHUNK, block * ROWS
    last = tl.minimum((chunk + 1) * (CHUNK // ROWS), tl.cdiv(T, ROWS))
    local = tl.arange(0, ROWS)
    rows = mark + local
    taken = present(positions, rows, T)
    of_read = tl.zeros([ROWS, BK], tl.float32)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        pulled = load_rows(grad, rows, columns, taken, V)
        memory = load_rows(met, channels, columns, channels < K, V).to(DOT)
        of_read = tl.dot(pulled, tl.trans(memory), of_read, input_precision=PRECISION)
    of_read = of_read * since_start(whole, part, rows, channels, T, CHANNELS)
    a = grad_scores(grad, added, beta, rows, rows, taken, taken, V, DELTA, ROWS, BV, PRECISION)
    a = tl.where(local[:, None] >= local[None, :] + strict, a, 0.0)
    of_read += to_rows(a, key, whole, part, rows, rows, taken, mark, channels, T, K, CHANNELS, True, PRECISION)
    of_key = to_columns(a, x, whole, part, rows, rows, taken, mark, channels, T, K, CHANNELS, True, PRECISION)
    if ROWS < CHUNK:
        for earlier in range(chunk * (CHUNK // ROWS), block):
            others = earlier * ROWS + local
            there = present(positions, others, T)
            a = grad_scores(grad, added, beta, rows, others, taken, there, V, DELTA, ROWS, BV, PRECISION)
            of_read += to_rows(
                a, key, whole, part, rows, others, there, mark, channels, T, K, CHANNELS, False, PRECISION
            )
        for later in range(block + 1, last):
            start = later * ROWS
            others = start + local
            there = present(positions, others, T)
            a = grad_scores(grad, added, beta, others, rows, there, taken, V, DELTA, ROWS, BV, PRECISION)
            of_key += to_columns(
                a, x, whole, part, others, rows, there, start, channels, T, K, CHANNELS, False, PRECISION
            )
    return tl.where(taken[:, None], of_read, 0.0), of_key


@triton.jit
def per_gate(x, CHANNELS: tl.constexpr):
    """Return terms ``[rows, channels]``, with one gate per head summed to ``[rows, 1]``."""
    return x if CHANNELS > 1 else tl.sum(x, 1)[:, None]


@triton.jit(do_not_specialize=["T"])
def grad_keys(
    query,
    key,
    added,
    beta,
    grad_out,
    erased,
    positions,
    whole,
    part,
    met,
    grads,
    grad_query,
    grad_key,
    total,
    ends,
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
    """Return gradients of queries and keys, and what they say of the gates.

    ``total [T, W]`` is the gradient of each cumulative log gate within the chunk, ``ends [blocks, W]`` that of the sum
    over the chunk, by blocks of rows; W is K, or with one gate per head the number of blocks of BK channels.
    Grid: blocks of rows of all groups, blocks of key channels.
    """
    DOT: tl.constexpr = key.dtype.element_ty
    WIDTH: tl.constexpr = K if CHANNELS > 1 else (K + BK - 1) // BK
    blocks = tl.cdiv(T, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    chunk = block * ROWS // CHUNK
    end = tl.minimum(chunk * CHUNK + CHUNK, T) - 1
    rows = block * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * BK + tl.arange(0, BK)
    key += group * T * K
    added += group * T * V
    beta += group * T
    whole += group * T * CHANNELS
    part += group * T * CHANNELS
    positions += group // G * T
    state = (group * tl.cdiv(T, CHUNK) + chunk) * K * V
    met += state
    grads += state
    taken = present(positions, rows, T)
    of_key = tl.zeros([ROWS, BK], tl.float32)
    of_end = tl.zeros([BK], tl.float32)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        grad = load_rows(grads, channels, columns, channels < K, V)
        memory = load_rows(met, channels, columns, channels < K, V)
        of_end += tl.sum(grad * memory, 1)
        u = writes(added, beta, rows, columns, taken, V, DELTA, DOT)
        of_key = tl.dot(u, tl.trans(grad.to(DOT)), of_key, input_precision=PRECISION)
    of_key *= tl.exp2(-offsets(whole, part, rows, end, channels, T, CHANNELS))
    k = load_rows(key, rows, channels, taken, K).to(tl.float32)
    of_end *= through(whole, part, end, channels, CHANNELS)
    of_end = tl.where(block * ROWS == chunk * CHUNK, of_end, 0.0) + tl.sum(k * of_key, 0)
    of_gate = per_gate(-k * of_key, CHANNELS)
    # What a key reads is taken off its value: one more read, whose output's gradient is minus that of the value.
    for r in range(R + DELTA):
        read = group * R + r
        own = r == R
        x = tl.where(own, key, query + read * T * K)
        grad = tl.where(own, erased + group * T * V, grad_out + read * T * V)
        as_row, as_column = grad_reads(
            x, grad, key, added, beta, positions, whole, part, met, block, channels, own, T,
            K, V, CHANNELS, DELTA, CHUNK, ROWS, PRECISION, BK, BV,
        )  # fmt: skip
        store_rows(grad_query + read * T * K, as_row, rows, channels, (rows < T) & (r < R), K)
        of_key += as_column + tl.where(own, as_row, 0.0)
        x_rows = load_rows(x, rows, channels, taken, K).to(tl.float32)
        of_gate += per_gate(x_rows * as_row - k * as_column, CHANNELS)
    store_rows(grad_key + group * T * K, of_key, rows, channels, rows < T, K)
    if CHANNELS > 1:
        store_rows(total + group * T * WIDTH, of_gate, rows, channels, rows < T, WIDTH)
        tl.store(ends + (group * blocks + block) * WIDTH + channels, of_end, mask=channels < K)
    else:
        number = tl.program_id(1)
        tl.store(total + group * T * WIDTH + rows * WIDTH + number, tl.sum(of_gate, 1), mask=rows < T)
        tl.store(ends + (group * blocks + block) * WIDTH + number, tl.sum(of_end, 0))


@triton.jit(do_not_specialize=["T"])
def grad_gates(
    total,
    ends,
    positions,
    grad_log_decay,
    T,
    G: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
):
    """Sum the gradients of cumulative log gates, in PARTS, into those of log gates, within each chunk.

    Grid: chunks of all groups, blocks of gate channels.
    """
    WIDTH: tl.constexpr = CHANNELS * PARTS
    count, blocks = tl.cdiv(T, CHUNK), tl.cdiv(T, ROWS)
    group = (tl.program_id(0) // count).to(tl.int64)
    chunk = tl.program_id(0) % count
    rows = chunk * CHUNK + tl.arange(0, CHUNK)
    channels = tl.program_id(1) * BK + tl.arange(0, BK)
    x = tl.zeros([CHUNK, BK], tl.float32)
    over = tl.zeros([BK], tl.float32)
    for number in range(PARTS):
        columns = tl.where(channels < CHANNELS, number * CHANNELS + channels, WIDTH)
        x += load_rows(total + group * T * WIDTH, rows, columns, rows < T, WIDTH)
        for block in range(chunk * (CHUNK // ROWS), tl.minimum((chunk + 1) * (CHUNK // ROWS), blocks)):
            over += tl.load(ends + (group * blocks + block) * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    place = tl.load(positions + group // G * T + rows, mask=rows < T, other=-1)
    grad = tl.where((place > 0)[:, None], tl.cumsum(x, 0, reverse=True) + over[None, :], 0.0)
    store_rows(grad_log_decay + group * T * CHANNELS, grad, rows, channels, rows < T, CHANNELS)

"""The lowered forms of the dialect's ops, as ONNX functions in ONNX text.

Each builder returns one function of the ``memc`` domain, specialised to the sizes of a node; equal arguments give equal
text, so layers share one function. ONNX Runtime inlines them when it loads the file. Sizes: B batch, T new tokens,
H heads, G key-value heads, R = H / G, D and E head sizes of key and value, N slots, S = N + T.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from memc.backends.onnx.capability import OPSET

FORGET = -1e4
"""Log-decay that clears a state: its exponential is 0 in float32."""


@dataclass(frozen=True)
class Function:
    """An ONNX function: its name in the ``memc`` domain and its text."""

    name: str
    text: str


def function(stem: str, inputs: str, outputs: str, body: str) -> Function:
    """Build a function of ``memc`` from its body, one node a line."""
    lines = [line.strip() for line in body.strip().splitlines() if line.strip()]
    core = f"({inputs}) => ({outputs}) {{\n" + "\n".join(f"  {line}" for line in lines) + "\n}"
    # The digest tells apart forms of one op that differ in a size or an option.
    name = f"{stem}_{hashlib.sha256(core.encode()).hexdigest()[:8]}"
    head = f'<opset_import: ["" : {OPSET}, "com.microsoft" : 1], domain: "memc">'
    return Function(name, f"{head}\n{name} {core}\n")


def flat(body: str) -> str:
    """Write a body on one line, as the attribute of a node takes it."""
    return " ".join(line.strip() for line in body.splitlines() if line.strip())


def ints(name: str, *values: int) -> str:
    """Write a constant vector of integers."""
    return f"{name} = Constant<value_ints = [{', '.join(map(str, values))}]>()"


def int_(name: str, value: int) -> str:
    """Write a constant integer."""
    return f"{name} = Constant<value_int = {value}>()"


def float_(name: str, value: float) -> str:
    """Write a constant float32."""
    return f"{name} = Constant<value_float = {float(value)!r}>()"


def rotary_plan(scaling: float) -> Function:
    """Cosine and sine ``[B,T,R/2]`` of ``positions [B,T]`` times ``inv_freq [R/2]``."""
    scaled = "" if scaling == 1.0 else f"{float_('f', scaling)}\ncos = Mul(c, f)\nsin = Mul(s, f)"
    c, s = ("cos", "sin") if scaling == 1.0 else ("c", "s")
    body = f"""
    {ints("last", -1)}
    p = Cast<to = 1>(positions)
    column = Unsqueeze(p, last)
    angle = Mul(column, inv_freq)
    {c} = Cos(angle)
    {s} = Sin(angle)
    {scaled}
    """
    return function("RotaryPlan", "positions, inv_freq", "cos, sin", body)


def rotary(head_dim: int, rotated: int, interleaved: bool, kernel: bool) -> Function:
    """Rotate the first ``rotated`` channels of ``x [B,H,T,D]`` by ``cos``, ``sin [B,T,R/2]``."""
    if kernel:
        body = f"y = RotaryEmbedding<interleaved = {int(interleaved)}, rotary_embedding_dim = {rotated}>(x, cos, sin)"
        return function("Rotary", "x, cos, sin", "y", body)
    half = rotated // 2
    lines = [ints("axis", 1), "c = Unsqueeze(cos, axis)", "s = Unsqueeze(sin, axis)"]
    source = "x"
    if rotated < head_dim:
        lines += [ints("parts", rotated, head_dim - rotated), "turned, rest = Split<axis = -1>(x, parts)"]
        source = "turned"
    if interleaved:
        lines += [
            ints("pairs", 0, 0, 0, half, 2),
            f"paired = Reshape({source}, pairs)",
            int_("first", 0),
            int_("second", 1),
            "a = Gather<axis = 4>(paired, first)",
            "b = Gather<axis = 4>(paired, second)",
        ]
    else:
        lines.append(f"a, b = Split<axis = -1, num_outputs = 2>({source})")
    lines += ["ac = Mul(a, c)", "bs = Mul(b, s)", "bc = Mul(b, c)", "a_s = Mul(a, s)"]
    lines += ["left = Sub(ac, bs)", "right = Add(bc, a_s)"]
    whole = "y" if rotated == head_dim else "done"
    if interleaved:
        lines += [ints("new", -1), "l = Unsqueeze(left, new)", "r = Unsqueeze(right, new)"]
        lines += ["both = Concat<axis = -1>(l, r)", ints("flat", 0, 0, 0, rotated), f"{whole} = Reshape(both, flat)"]
    else:
        lines.append(f"{whole} = Concat<axis = -1>(left, right)")
    if rotated < head_dim:
        lines.append("y = Concat<axis = -1>(done, rest)")
    return function("RotaryPortable", "x, cos, sin", "y", "\n".join(lines))


def norm(eps: float, center: bool, weight: bool, bias: bool, kernel: bool) -> Function:
    """Normalise ``x [..., D]`` over its last axis, as LayerNormalization, RMSNormalization or plain ops."""
    inputs = ", ".join(["x", *(["weight"] if weight else []), *(["bias"] if bias else [])])
    if kernel and weight and center:
        body = f"y = LayerNormalization<axis = -1, epsilon = {eps!r}>({inputs})"
        return function("Norm", inputs, "y", body)
    if kernel and weight:
        target = "scaled" if bias else "y"
        body = f"{target} = RMSNormalization<axis = -1, epsilon = {eps!r}>(x, weight)"
        return function("Norm", inputs, "y", body + ("\ny = Add(scaled, bias)" if bias else ""))
    lines = [ints("last", -1), float_("eps", eps)]
    lines += ["mean = ReduceMean(x, last)", "c = Sub(x, mean)"] if center else ["c = Identity(x)"]
    lines += ["square = Mul(c, c)", "variance = ReduceMean(square, last)", "safe = Add(variance, eps)"]
    lines += ["deviation = Sqrt(safe)", "n = Div(c, deviation)"]
    lines.append("w = Mul(n, weight)" if weight else "w = Identity(n)")
    lines.append("y = Add(w, bias)" if bias else "y = Identity(w)")
    return function("NormPortable", inputs, "y", "\n".join(lines))


def skip_norm(eps: float) -> Function:
    """Add ``a`` and ``b``, and normalise the sum as RMSNormalization does; returns both."""
    body = f"y, mean, deviation, sum = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = {eps!r}>(a, b, weight)"
    return function("SkipNorm", "a, b, weight", "y, sum", body)


def linear_plan() -> Function:
    """Which tokens are live, which of them have a decay of their own, and the others' decay.

    ``positions [B,T]`` give ``live``, ``fades`` and ``fixed [B,T,1,1]``: padding decays nothing, position 0 everything.
    """
    body = f"""
    {int_("zero", 0)}
    {ints("outer", 2, 3)}
    column = Unsqueeze(positions, outer)
    live = GreaterOrEqual(column, zero)
    fades = Greater(column, zero)
    starts = Equal(column, zero)
    {float_("nought", 0.0)}
    {float_("forget", FORGET)}
    fixed = Where(starts, forget, nought)
    """
    return function("LinearPlan", "positions", "live, fades, fixed", body)


@dataclass(frozen=True)
class Memory:
    """Sizes and rule of a linear memory."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    per_channel: bool
    update: str


def linear_memory(m: Memory, kernel: bool) -> Function:
    """Decay, write and read; padding has decay 0 and a zero write, position 0 a decay that leaves nothing."""
    delta = m.update == "gated_delta"
    names = ["query", "key", "value", "log_decay", "state", "live", "fades", "fixed", *(["beta"] if delta else [])]
    lines = [
        float_("nought", 0.0),
        float_("forget", FORGET),
        ints("flat", 0, 0, -1),
        # Transposed first, so that it meets the transposition that gave the decays.
        "decay0 = Transpose<perm = [0, 2, 1, 3]>(log_decay)",
        "decay1 = Where(fades, decay0, fixed)",
        "decay2 = Max(decay1, forget)",
        "decay = Reshape(decay2, flat)",
        "key0 = Transpose<perm = [0, 2, 1, 3]>(key)",
        "written0 = Where(live, key0, nought)",
    ]
    if delta:
        lines += [
            "beta0 = Transpose<perm = [0, 2, 1]>(beta)",
            ints("final", 3),
            "live3 = Squeeze(live, final)",
            "strength = Where(live3, beta0, nought)",
        ]
    lines += [
        _linear_kernel(m, delta) if kernel else _linear_scan(m, delta),
        "read1 = Where(live, read0, nought)",
        "output = Transpose<perm = [0, 2, 1, 3]>(read1)",
    ]
    stem = "LinearMemory" if kernel else "LinearMemoryScan"
    return function(stem, ", ".join(names), "output, next_state", "\n".join(lines))


def _linear_kernel(m: Memory, delta: bool) -> str:
    attributes = f'q_num_heads = {m.heads}, kv_num_heads = {m.groups}, update_rule = "{m.update}", scale = 1.0'
    arguments = "q, k, v, state, decay" + (", strength" if delta else "")
    return f"""
    query0 = Transpose<perm = [0, 2, 1, 3]>(query)
    value0 = Transpose<perm = [0, 2, 1, 3]>(value)
    q = Reshape(query0, flat)
    k = Reshape(written0, flat)
    v = Reshape(value0, flat)
    read, next_state = com.microsoft.LinearAttention<{attributes}>({arguments})
    {ints("split", 0, 0, m.heads, m.value_dim)}
    read0 = Reshape(read, split)
    """


def _linear_scan(m: Memory, delta: bool) -> str:
    """Scan, one step a token; the state is ``[B,G,K,V]``, the heads of a group are rows of one product."""
    repeat, decay = m.heads // m.groups, m.key_dim if m.per_channel else 1
    types = [
        f"float[B,{m.groups},{m.key_dim},{m.value_dim}] s",
        f"float[B,{m.heads},{m.key_dim}] q",
        f"float[B,{m.groups},{m.key_dim}] k",
        f"float[B,{m.groups},{m.value_dim}] v",
        f"float[B,{m.groups},{decay}] g",
        *([f"float[B,{m.groups}] b"] if delta else []),
    ]
    # Tensor and the axis of its tokens.
    scanned = [("query", 2), ("written0", 1), ("value", 2), ("decay2", 1), *([("strength", 1)] if delta else [])]
    step = [
        ints("last", -1),
        ints("before", -2),
        "e = Exp(g)",
        "e_ = Unsqueeze(e, last)",
        "faded = Mul(s, e_)",
        "k_column = Unsqueeze(k, last)",
        "v_row = Unsqueeze(v, before)",
    ]
    if delta:
        step += [
            "k_row = Unsqueeze(k, before)",
            "recalled = MatMul(k_row, faded)",
            "missing = Sub(v_row, recalled)",
            "b1 = Unsqueeze(b, last)",
            "b2 = Unsqueeze(b1, last)",
            "news = Mul(missing, b2)",
            "write = MatMul(k_column, news)",
        ]
    else:
        step.append("write = MatMul(k_column, v_row)")
    step += [
        "s_next = Add(faded, write)",
        ints("grouped", 0, m.groups, repeat, m.key_dim),
        "q_rows = Reshape(q, grouped)",
        "o_rows = MatMul(q_rows, s_next)",
        ints("joined", 0, m.heads, m.value_dim),
        "o = Reshape(o_rows, joined)",
    ]
    inner = f"float[B,{m.groups},{m.key_dim},{m.value_dim}] s_next, float[B,{m.heads},{m.value_dim}] o"
    body = f"step ({', '.join(types)}) => ({inner}) {{ {' '.join(step)} }}"
    axes = ", ".join(str(axis) for _, axis in scanned)
    options = f"num_scan_inputs = {len(scanned)}, scan_input_axes = [{axes}], scan_output_axes = [1], body = {body}"
    return f"next_state, read0 = Scan<{options}>(state, {', '.join(name for name, _ in scanned)})"

"""The lowered forms of the ops that attend, as ONNX functions; letters as in ``functions``."""

from __future__ import annotations

from dataclasses import dataclass

from memc.backends.onnx.functions import Function, flat, float_, function, int_, ints

MASKED = -1e30
"""Score of a key that a query must not read: finite, so that no difference of two of them is NaN."""

MOST_UNUSED = {False: 2, True: 3}
"""How many times what is in use of a buffer a single token reads at most rather than copy it, for the kernel or not."""


@dataclass(frozen=True)
class Scores:
    """How a node scores and sums: what the body of its attention needs."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    scale: float
    softcap: float = 0.0
    slopes: bool = False
    sink_logits: bool = False
    bias: bool = False
    mask: bool = True
    lse: bool = False

    @property
    def plain(self) -> bool:
        """Whether the Attention op of opset 24 computes it; its order of soft-cap and mask is not the dialect's."""
        return not (self.softcap or self.slopes or self.sink_logits)

    @property
    def shared(self) -> bool:
        """Whether heads share keys and values."""
        return self.heads > self.groups

    @property
    def extra(self) -> list[str]:
        """Names of the optional inputs in use."""
        return [n for n, on in (("slopes", self.slopes), ("sink_logits", self.sink_logits)) if on]


def attend(s: Scores, key: str, value: str, query: str = "query", *, single: bool = False) -> str:
    """Write attention of ``query [B,H,T,D]`` over ``key [B,G,S,D]`` and ``value [B,G,S,E]`` with MatMul and Softmax.

    Uses ``shape`` = [0,H,T,-1], ``mask [B,1,T,S]`` and, for slopes, ``distance [B,1,T,S]`` = j - p. Heads that share a
    key-value head are rows of one product. Defines ``out [B,H,T,E]``, ``none [B,H,T,1]`` (nothing to read) and, unless
    a plain Softmax is enough, ``log [B,H,T,1]``, the log-sum-exp. For a ``single`` token the few queries are turned,
    and not the keys.
    """
    turned = [
        "columns_of_rows = Transpose<perm = [0, 1, 3, 2]>(rows)",
        f"product_columns = MatMul({key}, columns_of_rows)",
        "product = Transpose<perm = [0, 1, 3, 2]>(product_columns)",
    ]
    lines = [
        ints("grouped", 0, s.groups, -1, s.key_dim),
        f"rows = Reshape({query}, grouped)",
        *(turned if single else [f"turned = Transpose<perm = [0, 1, 3, 2]>({key})", "product = MatMul(rows, turned)"]),
        float_("scale", s.scale),
        "scaled = Mul(product, scale)",
        "score0 = Reshape(scaled, shape)",
        weigh(s, (1, s.heads, 1, 1), none=True),
        ints("weight_rows", 0, s.groups, -1, 0),
        "weights = Reshape(weight, weight_rows)",
        f"sums = MatMul(weights, {value})",
        "out = Reshape(sums, shape)",
    ]
    return "\n".join(lines)


def weigh(s: Scores, per_head: tuple[int, ...], made: str = "weight", *, none: bool = False) -> str:
    """Write the softmax of ``score0`` over its last axis: ``made`` and, as in :func:`attend`, ``log``.

    ``per_head`` is the shape that puts ``[H]`` along the heads of ``score0``. With ``none`` that too is written.
    """
    lines: list[str] = []
    score = "score0"
    if s.softcap:
        lines.append(cap(s.softcap, score, "cap2"))
        score = "cap2"
    if s.slopes:
        lines += [
            ints("per_head", *per_head),
            "slope = Reshape(slopes, per_head)",
            "tilt = Mul(slope, distance)",
            f"tilted = Add({score}, tilt)",
        ]
        score = "tilted"
    lines.append(float_("masked", MASKED))
    if s.bias:
        lines += [f"biased0 = Add({score}, bias)", "biased = Max(biased0, masked)"]
        score = "biased"
    if s.mask:
        lines.append(f"visible = Where(mask, {score}, masked)")
        score = "visible"
    lines.append(ints("last", -1))
    if s.lse or s.sink_logits or s.bias:
        joined = score
        if s.sink_logits:
            lines += [
                ints("per_head_", *per_head),
                "sink = Reshape(sink_logits, per_head_)",
                f"first = ReduceMax({score}, last)",
                "zeros = Sub(first, first)",
                "sink_column = Add(zeros, sink)",
                f"joined = Concat<axis = -1>({score}, sink_column)",
            ]
            joined = "joined"
        lines += [
            f"log = ReduceLogSumExp({joined}, last)",
            f"relative = Sub({score}, log)",
            f"{made} = Exp(relative)",
        ]
        top = "log"
    else:
        lines.append(f"{made} = Softmax({score})")
        top = "top"
    if none:
        lines += [f"top = ReduceMax({score}, last)"] if top == "top" else []
        lines += [float_("nothing", MASKED / 2), f"none = Less({top}, nothing)"]
    return "\n".join(lines)


def cap(softcap: float, score: str, made: str) -> str:
    """Write ``made``, the soft-capped ``score``."""
    return f"""
    {float_("cap", softcap)}
    cap0 = Div({score}, cap)
    cap1 = Tanh(cap0)
    {made} = Mul(cap1, cap)
    """


def shape_of(heads: int, source: str, axis: int) -> str:
    """Write ``shape`` = [0, H, T, -1] with T read off ``source``."""
    return "\n".join(
        [
            f"tokens = Shape<start = {axis}, end = {axis + 1}>({source})",
            ints("shape_head", 0, heads),
            ints("shape_tail", -1),
            "shape = Concat<axis = 0>(shape_head, tokens, shape_tail)",
        ]
    )


def full_attention(s: Scores, kernel: bool, positions: bool) -> Function:
    """Stateless attention; keys at ``key_positions [B,S]`` -1 are not read, ``bias`` is added."""
    inputs = ["query", "key", "value"]
    lines = []
    if positions:
        inputs.append("key_positions")
        lines += [int_("zero", 0), "there = GreaterOrEqual(key_positions, zero)", ints("axes", 1, 2)]
        lines.append("mask = Unsqueeze(there, axes)")
    if s.bias:
        inputs.append("bias")
    inputs += s.extra
    if kernel and s.plain and not s.bias:
        if positions:  # the kernel takes a mask of every query row, not a broadcast one
            lines += [
                "tokens = Shape<start = 2, end = 3>(query)",
                ints("lead", 1, 1),
                ints("tail", 1),
                "rows = Concat<axis = 0>(lead, tokens, tail)",
                "every = Expand(mask, rows)",
            ]
        arguments = "query, key, value" + (", every" if positions else "")
        lines.append(f"y = Attention<scale = {s.scale!r}>({arguments})")
        return function("FullAttention", ", ".join(inputs), "y", "\n".join(lines))
    lines += [shape_of(s.heads, "query", 2), attend(s, "key", "value")]
    lines += [float_("absent", 0.0), "y = Where(none, absent, out)"]
    return function("FullAttentionPortable", ", ".join(inputs), "y", "\n".join(lines))


def attention_plan(s: Scores, window: int, chunk: int, prefix: int, kernel: bool) -> Function:
    """Where the new tokens go and what each reads, for every attention node with the same masks.

    ``positions [B,T]`` and a buffer ``[B,G,C,D]`` whose slot is the position (the last slot takes padding) give
    ``mask [B,1,T,n]``, ``index [B,G,T,3]`` of the slots written, ``used [1]`` = n, ``shape`` and ``distance``, and
    whether the call is a single token that reads the ``whole`` buffer, n = C: up to ``MOST_UNUSED`` times what is in
    use that takes less time than to copy what is in use, as a Slice does, and to turn it. ``query_shape`` is for one
    that does not; see :func:`by_rows`.
    """
    lines = [
        shape_of(s.heads, "positions", 1),
        int_("zero", 0),
        int_("one", 1),
        ints("ones", 1),
        "highest = ReduceMax<keepdims = 0>(positions)",
        "length0 = Add(highest, one)",
        "in_use0 = Max(length0, one)",
        "in_use = Reshape(in_use0, ones)",
        "capacity = Shape<start = 2, end = 3>(buffer)",
        ints("times", MOST_UNUSED[kernel and s.plain]),
        "in_use_times = Mul(in_use, times)",
        "full_enough = GreaterOrEqual(in_use_times, capacity)",
        "single = Equal(tokens, ones)",
        "whole1 = And(single, full_enough)",
        "whole = Squeeze(whole1)",
        "used = Where(whole1, capacity, in_use)",
        "length = Squeeze(used)",
        "slots = Range(zero, length, one)",
        ints("columns", 1, 3),
        "p = Unsqueeze(positions, columns)",
        "mask0 = LessOrEqual(slots, p)",
    ]
    mask = "mask0"
    lines.append("apart = Sub(slots, p)")
    if window:
        lines += [int_("reach", -window), "near = Greater(apart, reach)", f"mask1 = And({mask}, near)"]
        mask = "mask1"
    if chunk:
        # Division is of positions >= 0 here: a row of padding is masked by causality already.
        lines += [
            int_("chunk", chunk),
            "here = Div(p, chunk)",
            "there = Div(slots, chunk)",
            "same = Equal(here, there)",
            f"mask2 = And({mask}, same)",
        ]
        mask = "mask2"
    if prefix:
        lines += [
            int_("prefix", prefix),
            ints("time", 1),
            "row_highest = ReduceMax(positions, time)",
            "row_last = Unsqueeze(row_highest, columns)",
            "p_in = Less(p, prefix)",
            "p_live = GreaterOrEqual(p, zero)",
            "s_in = Less(slots, prefix)",
            "s_held = LessOrEqual(slots, row_last)",
            "in0 = And(p_in, p_live)",
            "in1 = And(s_in, s_held)",
            "in2 = And(in0, in1)",
            f"mask3 = Or({mask}, in2)",
        ]
        mask = "mask3"
    lines += [
        "copies = Not(whole1)",
        "single_copies = And(single, copies)",
        by_rows(s, mask, "single_copies", kernel),
        "distance = Cast<to = 1>(apart)",
        "spare = Sub(capacity, ones)",
        "padding = Less(positions, zero)",
        "slot0 = Where(padding, spare, positions)",
        ints("slot_axes", 1, 3),
        "slot1 = Unsqueeze(slot0, slot_axes)",
        by_group(s.groups),
        "slot = Add(slot1, nought)",
        "index = Concat<axis = -1>(row, group, slot)",
    ]
    made = "mask, index, used, shape, distance, whole, query_shape"
    return function("AttentionPlan", "positions, buffer", made, "\n".join(lines))


def attention(s: Scores, kernel: bool) -> Function:
    """Write the new keys and values into their slots and attend to the ``used`` first ones.

    ScatterND writes in place when its input and output are bound to the same memory. A single token that reads the
    ``whole`` buffer goes without the kernel, which turns all keys for the sake of one query.
    """
    names = ["query", "key", "value", "past_key", "past_value", "mask", "index", "used", "shape", "distance", "whole"]
    names += ["query_shape", *s.extra]

    def attended(key: str, value: str, *, single: bool) -> str:
        return f"""
        {attend(s, key, value, single=single)}
        {float_("absent", 0.0)}
        attended = Where(none, absent, out)
        """

    def branch(name: str, body: str) -> str:
        return f"{name} () => (float[B,{s.heads},T,{s.value_dim}] attended) {{ {flat(body)} }}"

    portion = f"""
    {ints("from", 0)}
    {ints("along", 2)}
    held_key = Slice(next_key, from, used, along)
    held_value = Slice(next_value, from, used, along)
    """
    if kernel and s.plain:
        queries, sums = ("queries", "sums") if s.shared else ("query", "attended")
        portion += f"""
        {"queries = Reshape(query, query_shape)" if s.shared else ""}
        {sums} = Attention<scale = {s.scale!r}>({queries}, held_key, held_value, mask)
        {"attended = Reshape(sums, shape)" if s.shared else ""}
        """
    else:
        portion += attended("held_key", "held_value", single=False)
    body = f"""
    next_key = ScatterND(past_key, index, key)
    next_value = ScatterND(past_value, index, value)
    output = If<
    then_branch = {branch("of_whole", attended("next_key", "next_value", single=True))},
    else_branch = {branch("of_used", portion)}
    >(whole)
    """
    return function("Attention", ", ".join(names), "output, next_key, next_value", body)


def by_rows(s: Scores, mask: str, single: str, kernel: bool) -> str:
    """Write ``query_shape [4]``, in which the kernel takes a query, and its ``mask`` of a mask ``[B,1,T,S]``.

    That is ``[B,H,T,D]``, but where the flag ``single [1]`` is set, of a single token, the heads of a group are rows
    ``[B,G,R,D]`` with a mask each: the kernel packs the keys anew for every head that it is given.
    """
    if not (kernel and s.plain and s.shared):
        return f"query_shape = Identity(shape)\nmask = Identity({mask})"
    return f"""
    {ints("shape_by_head", 0, s.heads, -1, s.key_dim)}
    {ints("shape_by_group", 0, s.groups, -1, s.key_dim)}
    query_shape = Where({single}, shape_by_group, shape_by_head)
    {ints("mask_once", 1, 1, 1, 1)}
    {ints("mask_by_group", 1, 1, s.heads // s.groups, 1)}
    mask_times = Where({single}, mask_by_group, mask_once)
    mask = Tile({mask}, mask_times)
    """


def by_group(groups: int, source: str = "positions", tag: str = "") -> str:
    """Write ``row``, ``group`` and ``nought [B,G,T,1]``: the numbers of the row and of the group, and zeros.

    ``source [B,T]`` has the sizes; ``tag`` ends the names.
    """
    return f"""
    group0{tag} = Constant<value = int64[{groups}] {{{", ".join(map(str, range(groups)))}}}>()
    {ints(f"group_axes{tag}", 0, 2, 3)}
    group1{tag} = Unsqueeze(group0{tag}, group_axes{tag})
    batch{tag} = Shape<start = 0, end = 1>({source})
    batch0{tag} = Squeeze(batch{tag})
    row0{tag} = Range(zero, batch0{tag}, one)
    {ints(f"row_axes{tag}", 1, 2, 3)}
    row1{tag} = Unsqueeze(row0{tag}, row_axes{tag})
    {ints(f"new_axes{tag}", 1, 3)}
    new{tag} = Unsqueeze({source}, new_axes{tag})
    sums{tag} = Mul(new{tag}, zero)
    nought0{tag} = Mul(group1{tag}, zero)
    nought{tag} = Add(sums{tag}, nought0{tag})
    group{tag} = Add(nought{tag}, group1{tag})
    row{tag} = Add(nought{tag}, row1{tag})
    """

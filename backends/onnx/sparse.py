"""The lowered forms of ``memc::sparse_attention``, as ONNX functions; letters as in ``functions``, P pages in use.

Descriptions are made by ReduceMax and the like, pages and tokens chosen by TopK, keys and values fetched by GatherND.
Where few tokens of a call choose, they go one after the other through a Scan (see
:mod:`memc.backends.onnx.tokens`); where many do, blocks of them do (see :mod:`memc.backends.onnx.blocks`), so that
nothing has an entry for each pair of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memc.backends.onnx import blocks, eventful, levels, tokens
from memc.backends.onnx.attend import Scores, attend, shape_of
from memc.backends.onnx.functions import Function, flat, float_, function, int_, ints
from memc.backends.onnx.places import token_slots, touched_pages
from memc.dialect.sparse_attention import SPAN
from memc.kernels.sparse_attention.choose import Rule

PLAN = (
    *("index", "touched", "page_index", "described", "dense_to", "sparse_from"),
    *("is_dense", "is_sparse", "reach", "dense_mask", "choosing", "alive"),
)
"""What :func:`sparse_plan` gives and :func:`sparse_attention` takes."""


def planned(by_level: bool) -> tuple[str, ...]:
    """Return the same for pages in one level or two."""
    return (*PLAN, "above_slots") if by_level else PLAN


def sparse_plan(groups: int, page: int, dense_below: int, by_level: bool = False) -> Function:
    """Where the new tokens go, which pages they touch, and which columns of the call choose.

    ``positions [B,T]``, a buffer ``[B,G,C,D]`` whose slot is the position (the last one takes padding) and ``pages
    [B,G,M,...]`` give ``index [B,G,T,3]`` of the slots written; ``touched [B,G,n page,1]``, the slots of n pages that
    hold every new token, ``page_index [B,G,n,3]``, and ``described [1]``, the pages in use; ``dense_to`` and
    ``sparse_from [1]``, the end of the columns that read everything and the start of those that choose, with
    ``is_dense`` and ``is_sparse``, whether there are any; ``reach [1]`` and ``dense_mask [B,1,dense_to,reach]``, what
    the former read; ``choosing`` and ``alive [B,1,T,1]``. A page that is touched is described anew from what the buffer
    holds, so that one that is named twice, or in vain, does no harm. In two levels ``page_index
    [B,G,n+m,4]`` and ``above_slots`` are as :func:`levels.touched` has them.
    """
    touched = touched_pages(groups, page, SPAN, "flat_index") if by_level else touched_pages(groups, page)
    body = f"""
    {token_slots(groups, page)}
    first_token = ReduceMin(slot0, time)
    first_page = Div(first_token, page)
    {touched}
    {levels.touched(page) if by_level else ""}
    start = Mul(page3, page)
    inside = Range(zero, page, one)
    each0 = Add(start, inside)
    each = Min(each0, spare)
    {ints("flat", 0, 0, -1, 1)}
    touched = Reshape(each, flat)
    {int_("dense_below", dense_below)}
    chooses = GreaterOrEqual(positions, dense_below)
    reads_all0 = Less(positions, dense_below)
    held = GreaterOrEqual(positions, zero)
    reads_all = And(reads_all0, held)
    tokens0 = Squeeze(tokens)
    columns = Range(zero, tokens0, one)
    ends = Add(columns, one)
    from0 = Where(chooses, columns, tokens)
    from1 = ReduceMin<keepdims = 0>(from0)
    sparse_from = Reshape(from1, ones)
    to0 = Where(reads_all, ends, zero)
    to1 = ReduceMax<keepdims = 0>(to0)
    dense_to = Reshape(to1, ones)
    is_dense = Greater(to1, zero)
    is_sparse = Less(from1, tokens0)
    {ints("origin", 0)}
    {ints("bound", dense_below)}
    reach = Min(used, bound)
    reach0 = Squeeze(reach)
    slots = Range(zero, reach0, one)
    dense_at = Slice(positions, origin, dense_to, time)
    dense_p = Unsqueeze(dense_at, slot_axes)
    dense_mask = LessOrEqual(slots, dense_p)
    choosing = Unsqueeze(chooses, slot_axes)
    alive = Unsqueeze(held, slot_axes)
    """
    outputs = ", ".join(planned(by_level))
    return function("SparsePlan", "positions, buffer, pages", outputs, body)


def sparse_attention(s: Scores, c: Rule, kernel: bool) -> Function:
    """Write keys, values and the descriptions of the pages they touch into the state, then attend.

    The columns before ``dense_to`` read the first ``dense_below`` tokens, those from ``sparse_from`` on choose; each of
    the two is left out of a call that has no such column.
    """
    sizes = [("output", s.value_dim), *([("lse", 1)] if s.lse else [])]
    return attending("SparseAttention", s, c, kernel, optional("sparse", "is_sparse", sizes, s.heads, _sparse(s, c)))


def attending(name: str, s: Scores, c: Rule, kernel: bool, choosing: str, more: Sequence[str] = ()) -> Function:
    """Write such a function, in which ``choosing`` writes what the columns that choose make of it.

    ``more`` are the states that it has beside keys, values and pages.
    """
    made = ("output", *(["lse"] if s.lse else []))
    states = ("key", "value", "pages", *more)
    names = [
        "query",
        "key",
        "value",
        *(f"past_{state}" for state in states),
        "positions",
        *planned(c.by_level),
        *s.extra,
    ]
    names += ["events"] if c.by_event else []
    sizes = [("output", s.value_dim), *([("lse", 1)] if s.lse else [])]
    body = f"""
    {ints("ones", 1)}
    {ints("origin", 0)}
    {int_("zero", 0)}
    {int_("one", 1)}
    {ints("time", 1)}
    {ints("along", 2)}
    {ints("last_axis", 3)}
    {float_("absent", 0.0)}
    next_key = ScatterND(past_key, index, key)
    next_value = ScatterND(past_value, index, value)
    {_describe(s, c)}
    {eventful.known(c) if c.by_event else ""}
    batch = Shape<start = 0, end = 1>(query)
    {ints("heads", s.heads)}
    width = Shape<start = 2, end = 3>(query)
    after_dense = Sub(width, dense_to)
    {ints("output_size", s.value_dim)}
    {ints("lse_size", 1)}
    {optional("dense", "is_dense", sizes, s.heads, _dense(s, c, kernel))}
    {choosing}
    """
    for what in made:
        whole = "output" if what == "output" else "lse4"
        body += f"""
        {what}_mixed = Where(choosing, sparse_{what}, dense_{what})
        {whole} = Where(alive, {what}_mixed, absent)
        """
    if s.lse:
        body += "lse = Squeeze(lse4, last_axis)"
    results = [*made, *(f"next_{state}" for state in states)]
    return function(name, ", ".join(names), ", ".join(results), body)


def _describe(s: Scores, c: Rule) -> str:
    halves = "description = Concat<axis = -1>(half0, half1)"
    match c.method:
        case "bounds" | "bounds2":
            describe = f"""
            half0 = ReduceMax<keepdims = 0>(by_page, last_axis)
            half1 = ReduceMin<keepdims = 0>(by_page, last_axis)
            {halves}
            """
        case "lowbit" | "em":
            describe = "description = Transpose<perm = [0, 1, 2, 4, 3]>(by_page)"
        case "hcam":
            describe = "description = ReduceMean<keepdims = 0>(by_page, last_axis)"
        case "hip" | "landmark":
            describe = f"""
            {int_("one_of_page", c.page // 2 if c.method == "hip" else c.page - 1)}
            description = Gather<axis = 3>(by_page, one_of_page)
            """
        case _:
            describe = f"""
            mean = ReduceMean(by_page, last_axis)
            half0 = Squeeze(mean, last_axis)
            away = Sub(by_page, mean)
            square = Mul(away, away)
            half1 = ReduceMean<keepdims = 0>(square, last_axis)
            {halves}
            """
    written = "next_pages = ScatterND(past_pages, page_index, description)"
    return f"""
    fresh = GatherND<batch_dims = 2>(next_key, touched)
    {ints("paged", 0, 0, -1, c.page, s.key_dim)}
    by_page = Reshape(fresh, paged)
    {describe}
    {levels.describe(s.key_dim, c.page) if c.by_level else written}
    """


def optional(
    name: str,
    condition: str,
    sizes: list[tuple[str, int]],
    heads: int,
    body: str,
    kept: Mapping[str, tuple[str, str]] | None = None,
) -> str:
    """Write an If whose results are ``NAME_output`` and the like, zeros where it does not run.

    ``kept`` are more of them, each with its type and what it is where it does not run.
    """
    kept = kept or {}
    rest = [
        line
        for what, _ in sizes
        for line in (
            f"{name}_{what}_shape = Concat<axis = 0>(batch, heads, width, {what}_size)",
            f"{name}_{what}_not = ConstantOfShape({name}_{what}_shape)",
        )
    ]
    rest += [f"{name}_{what}_not = Identity({value})" for what, (_, value) in kept.items()]
    types = {what: f"float[B,{heads},T,{size}]" for what, size in sizes} | {what: x for what, (x, _) in kept.items()}

    def results(end: str) -> str:
        return ", ".join(f"{kind} {name}_{what}_{end}" for what, kind in types.items())

    then = f"{name}_then () => ({results('yes')}) {{ {flat(body)} }}"
    other = f"{name}_else () => ({results('not')}) {{ {' '.join(rest)} }}"
    made = ", ".join(f"{name}_{what}" for what in types)
    return f"{made} = If<then_branch = {then}, else_branch = {other}>({condition})"


def _dense(s: Scores, c: Rule, kernel: bool) -> str:
    """Write attention of the first columns over the first ``dense_below`` tokens, zeros for the other columns."""
    if kernel and s.plain and not s.lse:
        attended = f"out = Attention<scale = {s.scale!r}>(dense_query, held_key, held_value, dense_mask)"
    else:
        attended = f"""
        mask = Identity(dense_mask)
        {shape_of(s.heads, "dense_query", 2)}
        {attend(s, "held_key", "held_value", "dense_query")}
        """
    log = """
    lse_rest_shape = Concat<axis = 0>(batch, heads, after_dense, lse_size)
    lse_rest = ConstantOfShape(lse_rest_shape)
    dense_lse_yes = Concat<axis = 2>(log, lse_rest)
    """
    return f"""
    dense_query = Slice(query, origin, dense_to, along)
    held_key = Slice(next_key, origin, reach, along)
    held_value = Slice(next_value, origin, reach, along)
    {attended}
    rest_shape = Concat<axis = 0>(batch, heads, after_dense, output_size)
    rest = ConstantOfShape(rest_shape)
    dense_output_yes = Concat<axis = 2>(out, rest)
    {log if s.lse else ""}
    """


def _sparse(s: Scores, c: Rule) -> str:
    """Write the attention of the last columns, zeros for those before: a Scan over tokens, or over blocks of them."""
    made = ["sparse_part", *(["sparse_log"] if s.lse else [])]
    sizes = [s.value_dim, *([1] if s.lse else [])]

    def branch(name: str, body: str) -> str:
        results = (f"float[B,{s.heads},U,{size}] {name}_{what}" for what, size in zip(made, sizes, strict=True))
        return f"{name}_branch () => ({', '.join(results)}) {{ {flat(body)} }}"

    outputs = [f"float[B,{s.heads},{s.value_dim}] o", *([f"float[B,{s.heads},1] l"] if s.lse else [])]
    inputs = f"float[B,{s.heads},{s.key_dim}] q, int64[B] at"
    step = f"step ({inputs}) => ({', '.join(outputs)}) {{ {flat(tokens.step(s, c))} }}"
    axes = f"scan_input_axes = [2, 1], scan_output_axes = [{', '.join('2' for _ in outputs)}]"
    scanned = ", ".join(f"token_{name}" for name in made)
    single = f"""
    {tokens.numbers(c)}
    {scanned} = Scan<num_scan_inputs = 2, {axes}, body = {step}>(sparse_query, sparse_at)
    """
    lines = [
        COLUMNS,
        ints("few", blocks.FEW),
        "count_few = Greater(count_sparse, few)",
        "many = Squeeze(count_few)",
        int_("reach_of_blocks", blocks.REACH[c.method]),
        "highest = ReduceMax<keepdims = 0>(positions)",
        "near_enough = Less(highest, reach_of_blocks)",
        "in_blocks_pays = And(many, near_enough)",
        f"{', '.join(made)} = If<then_branch = {branch('block', blocks.scan(s, c, made, blocks.held(s, c)))},"
        f" else_branch = {branch('token', single)}>(in_blocks_pays)",
        behind_dense(made),
    ]
    return "\n".join(lines)


COLUMNS = """
sparse_query = Slice(query, sparse_from, width, along)
sparse_at = Slice(positions, sparse_from, width, time)
count_sparse = Sub(width, sparse_from)
"""
"""The columns of a call that choose."""


def behind_dense(made: Sequence[str]) -> str:
    """Write ``sparse_output_yes`` and ``sparse_lse_yes``: zeros for the columns before those that choose."""
    return "\n".join(
        f"""
        {what}_before_shape = Concat<axis = 0>(batch, heads, sparse_from, {what}_size)
        {what}_before = ConstantOfShape({what}_before_shape)
        sparse_{what}_yes = Concat<axis = 2>({what}_before, {part})
        """
        for what, part in zip(("output", "lse"), made, strict=False)
    )

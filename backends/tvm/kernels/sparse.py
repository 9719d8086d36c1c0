"""``memc::sparse_attention`` and ``memc::refreshed_attention``.

Pages are described as they fill up, ranked, and the tokens of the best attended to.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from memc.backends.tvm.kernels.common import SLOTS, PrimFunc, Scores
from memc.backends.tvm.kernels.eventful import begin_events
from memc.backends.tvm.kernels.levels import describe_above
from memc.backends.tvm.kernels.pick import keep_tokens, list_tiles, score_tiles, score_tokens
from memc.backends.tvm.kernels.rank import Rule, describe
from memc.backends.tvm.kernels.turns import hold_list, save_list
from memc.backends.tvm.kernels.weigh import attend, clear
from memc.dialect.sparse_attention import SPAN

SHARES = 8
"""Units of work that the tokens of one key-value head are dealt to at most, each with memory of its own."""

TOKENS = 16
"""Tokens that a unit of work is worth its memory for."""


def memory(s: Scores, r: Rule, units: Any, pages: Any) -> dict[str, tuple[tuple[Any, ...], str]]:
    """Return shapes and types of what so many units of work need over so many ``pages`` (or tokens, in whole vectors).

    ``rank`` is what is ranked by; ``list`` the tiles of keys on which what is taken lies; ``scores`` those of the keys
    there, ``again`` what these are ranked by, ``slots`` the tokens that are read; ``shares`` the exponentials of ranks;
    ``turns`` a list that several tokens share, or what the events of tokens are worth.
    """
    return {
        "rank": ((units, pages), "int32"),
        "list": ((units, r.listed), "int32"),
        "again": ((units, r.room if r.rerank > 1 else 1), "int32"),
        "slots": ((units, r.room), "int32"),
        "scores": ((units, s.share, r.room), "float32"),
        "shares": ((units, pages if r.mass < 1 else 1), "float32"),
        "turns": ((units, 2, pages if r.by_event else r.places if r.refresh > 1 else 1), "int32"),
    }


def _turn(r: Rule, p: Any) -> Any:
    """Return a number that tokens have in common which share a list."""
    return T.if_then_else(p >= r.dense_below, p - r.dense_below, T.max(p, T.int64(0))) // r.refresh


@cache
def sparse_attention(s: Scores, r: Rule) -> PrimFunc:
    """Make ``memc::sparse_attention``, or ``memc::refreshed_attention`` of a rule with ``refresh``, its state in place.

    ``keys [B,G,P,D,SLOTS]`` and ``values [B,G,S,E]`` hold the token at position p in slot p, ``pages [B,G,N,C,SLOTS]``
    the description of page n; where tokens are ranked ``keys [B,G,S,D]`` are as they are read one by one, and ``pages
    [B,G,P,D,SLOTS]`` the same channel by channel, where pages are searched ``pages [B,G,N,D]``, and in two levels as
    ``levels`` has it; what ``choice`` holds is said in ``turns`` and ``eventful``. The new tokens are written first, so
    that no sequence may start in a call after tokens of another one in the same row. A unit of work is some tokens
    of one key-value head; of each it ranks the pages, lists the tiles of keys on which the best ones lie, and makes
    the scores of these, which are ranked again where that is asked for and then weigh the values.
    """
    heads, groups, key_dim, value_dim = s.heads, s.groups, s.key_dim, s.value_dim
    share, together, size = s.share, s.together, r.described(s.key_dim)

    @T.inline
    def write(names, b, g, tokens):
        for t in T.serial(tokens):
            if names["positions"][b, t] >= 0:
                position = names["positions"][b, t]
                for e in T.serial(value_dim):
                    names["values"][b, g, position, e] = names["v"][b, g, t, e]
                if r.by_token:
                    for d in T.serial(key_dim):
                        names["keys"][b, g, position, d] = names["k"][b, g, t, d]
                        names["pages"][b, g, position // SLOTS, d, position % SLOTS] = names["k"][b, g, t, d]
                else:
                    for d in T.serial(key_dim):
                        names["keys"][b, g, position // SLOTS, d, position % SLOTS] = names["k"][b, g, t, d]
                    if (position + 1) % r.page == 0:
                        describe(names, s, r, b, g, position // r.page)
                    if r.by_level and (position + 1) % r.piece == 0:
                        describe_above(names, s, b, g, position // r.piece)

    @T.inline
    def step(names, b, g, t, unit, p):
        listed = T.alloc_buffer((1,), "int64", scope="local")
        kept = T.alloc_buffer((1,), "int64", scope="local")
        if p >= 0:
            list_tiles(names, s, r, b, g, t, unit, p, listed)
            if r.by_token:
                score_tokens(names, s, b, g, t, unit, listed)
            else:
                score_tiles(names, s, b, g, t, unit, listed)
            keep_tokens(names, s, r, unit, p, listed, kept)
            for part in T.serial(share // together):
                attend(names, s, r, b, g, t, unit, p, kept, part * together)
        else:
            clear(names, s, r, b, g, t)

    @T.prim_func(private=True)
    def sparse_attention_(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        p_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        pages_: T.handle,
        choice_: T.handle,
        sinks_: T.handle,
        y_: T.handle,
        lse_: T.handle,
        rank_: T.handle,
        list_: T.handle,
        again_: T.handle,
        slots_: T.handle,
        scores_: T.handle,
        shares_: T.handle,
        turns_: T.handle,
    ):
        T.func_attr({"tirx.noalias": True})
        batch, tokens, tiles, held, described = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        units, ranks = T.int64(), T.int64()
        q = T.match_buffer(q_, (batch, heads, tokens, key_dim), "float32")
        k = T.match_buffer(k_, (batch, groups, tokens, key_dim), "float32")
        v = T.match_buffer(v_, (batch, groups, tokens, value_dim), "float32")
        positions = T.match_buffer(p_, (batch, tokens), "int64")
        keys = T.match_buffer(
            keys_, (batch, groups, tiles, *((key_dim,) if r.by_token else (key_dim, SLOTS))), "float32"
        )
        values = T.match_buffer(values_, (batch, groups, held, value_dim), "float32")
        one = T.meta_var(((1 + SPAN) * size,) if r.by_level else (size,) if r.rows else (size, SLOTS))
        pages = T.match_buffer(pages_, (batch, groups, described, *one), "float32")
        listed = T.meta_var((batch, groups, 2, r.places) if r.refresh > 1 else (batch, held) if r.by_event else (1,))
        choice = T.match_buffer(choice_, listed, "int64" if r.by_event else "int32")
        sinks = T.match_buffer(sinks_, (heads if s.sink_logits else 1,), "float32")
        y = T.match_buffer(y_, (batch, heads, tokens, value_dim), "float32")
        lse = T.match_buffer(lse_, (batch, heads, tokens) if r.lse else (1,), "float32")
        sizes = T.meta_var(memory(s, r, units, ranks))
        rank = T.match_buffer(rank_, *sizes["rank"])
        list = T.match_buffer(list_, *sizes["list"])
        again = T.match_buffer(again_, *sizes["again"])
        slots = T.match_buffer(slots_, *sizes["slots"])
        scores = T.match_buffer(scores_, *sizes["scores"])
        shares = T.match_buffer(shares_, *sizes["shares"])
        turns = T.match_buffer(turns_, *sizes["turns"])
        names = T.meta_var(
            {
                "q": q,
                "k": k,
                "v": v,
                "positions": positions,
                "keys": keys,
                "values": values,
                "pages": pages,
                "sinks": sinks,
                "y": y,
                "lse": lse,
                "rank": rank,
                "list": list,
                "again": again,
                "slots": slots,
                "scores": scores,
                "shares": shares,
                "choice": choice,
                "turns": turns,
            }
        )
        for row in T.parallel(batch * groups):
            write(names, row // groups, row % groups, tokens)
        dealt = units // (batch * groups)
        for unit in T.parallel(units):
            b = unit // dealt // groups
            g = unit // dealt % groups
            if r.refresh > 1:  # those that share a list are one unit's, one after the other
                turn = T.alloc_buffer((1,), "int64", scope="local")
                turn[0] = T.int64(-1)
                for t in T.serial(tokens):
                    if _turn(r, positions[b, t]) % dealt == unit % dealt:
                        hold_list(names, r, b, g, unit, positions[b, t], turn)
                        step(names, b, g, t, unit, positions[b, t])
            else:
                if r.by_event:
                    begin_events(names, b, unit, tokens)
                for turn in T.serial(T.ceildiv(tokens - unit % dealt, dealt)):
                    t = turn * dealt + unit % dealt
                    step(names, b, g, t, unit, positions[b, t])
        if r.refresh > 1:
            for row in T.parallel(batch * groups):
                save_list(names, r, row // groups, row % groups, row * dealt, dealt, tokens)

    return sparse_attention_

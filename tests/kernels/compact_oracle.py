"""``memc::compact_attention`` written as its dialect page reads: python loops over sequences and tokens, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.kernels.oracles import Result, Token, best, softmax_row


def turned(x: Tensor, place: int, inv_freq: Tensor, interleaved: bool, scaling: float) -> Tensor:
    """Return ``x [D]`` with its pairs of channels turned by the angles of a place, as numbers of the complex plane."""
    result, half = x.clone(), len(inv_freq)
    for pair, frequency in enumerate(inv_freq.tolist()):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        z = (
            scaling
            * complex(float(x[a]), float(x[b]))
            * complex(math.cos(place * frequency), math.sin(place * frequency))
        )
        result[a], result[b] = z.real, z.imag
    return result


@dataclass
class Read:
    """A token that was read, with its query, by the heads of one key-value head."""

    query: Tensor
    key: Tensor
    value: Tensor


def compact_description(own: list[Read], number: int, o: Mapping[str, Any]) -> Tensor | None:
    """Return what the page ``number`` of a sequence is ranked by, None while it is not known."""
    page = o["page"]
    inside = own[number * page : (number + 1) * page]
    after = o["window"] // page if o["method"] == "infllm" else 0
    if len(own) < (number + 1 + after) * page:
        return None
    if after:
        following = own[(number + 1) * page : (number + 1 + after) * page]
        wanted = sum(x.query.mean(0) for x in following)
        best_of = best([(float(x.key @ wanted), j) for j, x in enumerate(inside)], min(4, page))
        return sum(inside[j].key for j in best_of) / len(best_of)
    subject = torch.zeros_like(inside[0].value)
    turn = {name: o[name] for name in ("inv_freq", "interleaved", "scaling")}
    for t, x in enumerate(inside):
        earlier = [Token(j, turned(y.key, j, **turn)[None], y.value[None]) for j, y in enumerate(inside[: t + 1])]
        heads = [softmax_row(turned(q, t, **turn), earlier, 0, 0, t, {**o, "sink_logits": None})[0] for q in x.query]
        subject = subject + sum(heads) / len(heads) / page
    scores = torch.tensor([float(o["scale"] * (subject @ x.key)) for x in inside]).double().softmax(0)
    return sum(w * x.key for w, x in zip(scores, inside, strict=True))


def compact_choice(own: list[Read], o: Mapping[str, Any]) -> list[int]:
    """Return the positions that the last token of ``own`` reads, in order."""
    p, page = len(own) - 1, o["page"]
    if p < o.get("dense_below", 0):
        return list(range(p + 1))
    forced = {j // page for j in range(p + 1) if j < o["sinks"] or p - j < o["window"]}
    ranked = []
    for number in range(p // page + 1):
        if number in forced:
            ranked.append((math.inf, number))
        else:
            description = compact_description(own, number, o)
            assert description is not None, "a page that may be left out is described"
            ranked.append((max(float(o["scale"] * (q @ description)) for q in own[p].query), number))
    taken = sorted(best(ranked, o["budget"] // page))
    return [j for number in taken for j in range(number * page, (number + 1) * page) if j <= p]


def compact_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, **o: Any) -> Result:
    """``memc::compact_attention`` from an empty state; ``left`` is unused."""
    batch, heads, tokens, _ = query.shape
    per_group = heads // key.shape[1]
    turn = {name: o[name] for name in ("inv_freq", "interleaved", "scaling")}
    result = Result(
        torch.zeros(batch, heads, tokens, value.shape[3]).double(), torch.zeros(batch, heads, tokens).double()
    )
    for b in range(batch):
        for group in range(key.shape[1]):
            own: list[Read] = []
            mine = range(group * per_group, (group + 1) * per_group)
            for t in range(tokens):
                p = int(positions[b, t])
                if p < 0:
                    continue
                row = Read(query[b, mine, t].double(), key[b, group, t].double(), value[b, group, t].double())
                own = [*([] if p == 0 else own), row]
                read, distance = [], {}
                for place, j in enumerate(chosen := compact_choice(own, o)):
                    distance[j] = min(p - j, o["window"]) if o["method"] == "infllm" else len(chosen) - 1 - place
                    read.append(Token(j, turned(own[j].key, -distance[j], **turn)[None], own[j].value[None]))
                for h in mine:
                    q = turned(query[b, h, t].double(), 0, **turn)
                    result.out[b, h, t], result.lse[b, h, t] = softmax_row(q, read, h, 0, p, o)
    return result

"""Each op written as its dialect page reads: python loops over sequences, heads and tokens, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Token:
    """One token that somebody may read."""

    position: int
    key: Tensor
    value: Tensor


@dataclass
class Result:
    """What a loop over tokens gives."""

    out: Tensor
    lse: Tensor
    left: list[list[Token | None]] = field(default_factory=list)
    held: list[list[Token]] = field(default_factory=list)


def softmax_row(
    query: Tensor, read: list[Token], head: int, group: int, p: int, o: dict[str, object]
) -> tuple[Tensor, float]:
    """Return one head's output and log-sum-exp of one token."""
    scores, values = [], []
    for token in read:
        score = float(query @ token.key[group]) * float(o["scale"])  # type: ignore[arg-type]
        cap = float(o.get("softcap", 0.0))  # type: ignore[arg-type]
        if cap > 0:
            score = cap * math.tanh(score / cap)
        if o.get("slopes") is not None:
            score += float(o["slopes"][head]) * (token.position - p)  # type: ignore[index]
        scores.append(score)
        values.append(token.value[group])
    sink = o.get("sink_logits")
    every = scores + ([float(sink[head])] if sink is not None else [])  # type: ignore[index]
    lse = float(torch.logsumexp(torch.tensor(every, dtype=torch.float64), 0))
    return sum((math.exp(s - lse) * v for s, v in zip(scores, values, strict=True)), torch.zeros_like(values[0])), lse


def attention(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, past: list[list[Token]], **o: object
) -> Result:
    """``memc::attention`` (options window, chunk, prefix) and ``memc::window_memory`` (option sinks beside window)."""
    batch, heads, tokens, _ = query.shape
    per_group = heads // key.shape[1]
    window, chunk = int(o.get("window", 0)), int(o.get("chunk", 0))  # type: ignore[call-overload]
    prefix, sinks = int(o.get("prefix", 0)), int(o.get("sinks", 0))  # type: ignore[call-overload]
    result = Result(
        torch.zeros(batch, heads, tokens, value.shape[3], dtype=torch.float64),
        torch.zeros(batch, heads, tokens).double(),
    )
    for b in range(batch):
        sequences: list[list[Token]] = [list(past[b])]
        of_token: list[list[Token] | None] = []
        for t in range(tokens):
            p = int(positions[b, t])
            if p == 0:
                sequences.append([])
            if p >= 0:
                sequences[-1].append(Token(p, key[b, :, t].double(), value[b, :, t].double()))
            of_token.append(sequences[-1] if p >= 0 else None)
        left: list[Token | None] = []
        for t in range(tokens):
            p, own = int(positions[b, t]), of_token[t]
            if own is None:
                left.append(None)
                continue

            def reads(j: int, p: int = p) -> bool:
                if j < prefix and p < prefix:
                    return True
                if j > p or (chunk and j // chunk != p // chunk):
                    return False
                return not window or p - j < window or j < sinks

            left.append(next((x for x in own if x.position == p - window and p - window >= sinks), None))
            for h in range(heads):
                read = [x for x in own if reads(x.position)]
                row = softmax_row(query[b, h, t].double(), read, h, h // per_group, p, o)
                result.out[b, h, t], result.lse[b, h, t] = row
        result.left.append(left)
        result.held.append(sequences[-1])
    return result


def linear_memory(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    positions: Tensor,
    state: Tensor,
    beta: Tensor | None = None,
    *,
    decay_after_write: bool = False,
) -> tuple[Tensor, Tensor]:
    """``memc::linear_memory``, differentiable; ``decay_after_write`` plants a fault."""
    batch, heads, tokens, _ = query.shape
    groups = key.shape[1]
    outs, states = [], []
    for b in range(batch):
        for g in range(groups):
            s = state[b, g]
            for t in range(tokens):
                p = int(positions[b, t])
                if p < 0:
                    outs.append(torch.zeros(heads // groups, value.shape[3], dtype=query.dtype))
                    continue
                if p == 0:
                    s = torch.zeros_like(s)
                k, v, decay = key[b, g, t], value[b, g, t], torch.exp(log_decay[b, g, t])[:, None]
                if decay_after_write:
                    s = decay * (s + torch.outer(k, v))
                else:
                    s = decay * s
                    s = s + (torch.outer(k, v) if beta is None else beta[b, g, t] * torch.outer(k, v - s.T @ k))
                outs.append(query[b, g * (heads // groups) : (g + 1) * (heads // groups), t] @ s)
            states.append(s)
    out = torch.stack(outs).view(batch, groups, tokens, heads // groups, -1).transpose(2, 3).flatten(1, 2)
    return out, torch.stack(states).view(state.shape)


def page_score(query: Tensor, keys: Tensor, method: str) -> float:
    """Return the score of one page of ``keys [page, D]``, channel by channel."""
    if method in ("hip", "landmark"):
        return float(query @ keys[len(keys) // 2 if method == "hip" else -1])
    total = 0.0
    for channel, q in enumerate(query.tolist()):
        column = keys[:, channel].tolist()
        if method in ("bounds", "bounds2"):
            total += max(q * x for x in column)
        elif method == "hcam":
            total += q * sum(column) / len(column)
        else:
            mean = sum(column) / len(column)
            total += q * mean + q * q / 2 * sum((x - mean) ** 2 for x in column) / len(column)
    return total


def best(scored: list[tuple[float, int]], count: int) -> list[int]:
    """Return the indices of the ``count`` highest scores, lower indices first among equals."""
    return [index for _, index in sorted((-score, index) for score, index in scored)[:count]]


def sparse_choice(
    query: Tensor, own: list[Token], p: int, group: int, o: Mapping[str, Any], listed: list[int] | None = None
) -> list[int]:
    """Return the positions that the heads ``query [R,D]`` of one key-value head read at position ``p``.

    With ``refresh`` they take their pages, or tokens, from ``listed``, which those change whose turn it is.
    """
    sinks, window, seen = o["sinks"], o["window"], {x.position: x.key[group] for x in own}
    scaled, positions, dense_below = query * o["scale"], range(p + 1), o.get("dense_below", 0)
    if p < dense_below:
        return list(positions)
    whole_page = "bits" in o  # of tokens held in few bits those of p's own page are always read
    must = {j for j in positions if j < sinks or p - j < window or (whole_page and j // o["page"] == p // o["page"])}
    by_token = o.get("method") == "lowbit"
    scored = (by_channels if by_token else by_pages)(scaled, seen, p, must, o)
    most = o.get("rerank", 1) * o["budget"] // (1 if by_token else o["page"])
    taken = [number for number in best(scored, most) if number in holding(scored, o.get("mass", 1.0))]
    if listed is not None:
        if (p - dense_below) % o["refresh"] == 0:
            listed[:] = taken
        forced = [number for score, number in scored if score == math.inf]
        taken = forced + [number for number in listed if number not in forced][: most - len(forced)]
    tokens = taken if by_token else [j for n in taken for j in range(n * o["page"], (n + 1) * o["page"]) if j <= p]
    ranked = [(math.inf if j in must else max(float(q @ seen[j]) for q in scaled), j) for j in tokens]
    return sorted(best(ranked, o["budget"]))


def grouped_row(
    query: Tensor, read: list[Token], head: int, group: int, p: int, o: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Return one head's output and log-sum-exp by the grouped softmax of landmark attention (2305.16300, section 3.1).

    Tokens of the pages of sinks and window are one group with the landmarks of the other pages; each of those pages is
    a group of its own, of its other tokens.
    """
    page, pages = o["page"], {token.position // o["page"] for token in read}
    near = {j // page for j in range(p + 1) if j < o["sinks"] or p - j < o["window"] or p < o.get("dense_below", 0)}
    by_page = {n: [x for x in read if x.position // page == n] for n in sorted(pages)}

    def softmax(tokens: list[Token], sinks: list[float]) -> tuple[list[float], float]:
        scores = [float(query @ token.key[group]) * o["scale"] for token in tokens]
        if cap := o.get("softcap", 0.0):
            scores = [cap * math.tanh(score / cap) for score in scores]
        lse = float(torch.logsumexp(torch.tensor(scores + sinks, dtype=torch.float64), 0))
        return [math.exp(score - lse) for score in scores], lse

    first = [x for n, tokens in by_page.items() for x in (tokens if n in near else tokens[-1:])]
    sinks = [] if o.get("sink_logits") is None else [float(o["sink_logits"][head])]
    weights, lse = softmax(first, sinks)
    out = torch.zeros_like(first[0].value[group])
    for token, weight in zip(first, weights, strict=True):
        number = token.position // page
        if number in near:
            out += weight * token.value[group]
            continue
        assert token.position % page == page - 1 and len(by_page[number]) == page, "a page is read whole or not at all"
        for other, share in zip(by_page[number][:-1], softmax(by_page[number][:-1], [])[0], strict=True):
            out += weight * share * other.value[group]
    return out, lse


def holding(scored: list[tuple[float, int]], mass: float) -> set[int]:
    """Return the numbers of the best that hold a share of the exponentials of all scores, and those at infinity."""
    ordered, kept, sum_before = best(scored, len(scored)), set(), 0.0
    score = {number: one for one, number in scored}
    top = max((one for one, _ in scored if one < math.inf), default=0.0)
    total = sum(math.exp(one - top) for one, _ in scored if one < math.inf)
    for number in ordered:
        if score[number] == math.inf or mass == 1 or sum_before < mass * total:
            kept.add(number)
        sum_before += 0.0 if score[number] == math.inf else math.exp(score[number] - top)
    return kept


Scored = list[tuple[float, int]]


def by_channels(queries: Tensor, seen: Mapping[int, Tensor], p: int, must: set[int], o: Mapping[str, Any]) -> Scored:
    """Return what ``lowbit`` ranks every token by, those of the page of p first."""
    magnitudes = [(float(x), channel) for channel, x in enumerate(queries.abs().sum(0))]
    read = best(magnitudes, o["channels"])
    scored = []
    for j in range(p + 1):
        forced = j in must or j // o["page"] == p // o["page"]
        scored.append((math.inf if forced else max(sum(float(q[c] * seen[j][c]) for c in read) for q in queries), j))
    return scored


def by_pages(queries: Tensor, seen: Mapping[int, Tensor], p: int, must: set[int], o: Mapping[str, Any]) -> Scored:
    """Return what ``bounds`` and the like rank every page by, those that must be read first."""
    page, pages = o["page"], []
    for number in range(p // page + 1):
        inside = range(number * page, (number + 1) * page)
        if must & set(inside):
            pages.append((math.inf, number))
        else:
            keys = torch.stack([seen[j] for j in inside])
            pages.append((max(page_score(q, keys, o.get("method", "bounds")) for q in queries), number))
    if o.get("method") == "bounds2":
        return entered(queries, seen, p, pages, o)
    if o.get("method") != "hip":
        return pages
    free = [number for score, number in pages if score < math.inf]
    most = o.get("rerank", 1) * o["budget"] // page
    found = tree_search(free, {number: score for score, number in pages}, most - (len(pages) - len(free)))
    return [(score, number) for score, number in pages if score == math.inf or number in found]


def entered(queries: Tensor, seen: Mapping[int, Tensor], p: int, pages: Scored, o: Mapping[str, Any]) -> Scored:
    """Return those of ``pages`` that two levels of bounds look at: of the super-pages entered, or that are forced."""
    page, span = o["page"], 16
    window_page = max(p - o["window"] + 1, 0) // page
    sunk = [number for number, _ in enumerate(pages) if number * page < o["sinks"]]
    scored = []
    for above in range(window_page // span):
        inside = range(above * span, (above + 1) * span)
        if not set(inside) <= set(sunk):
            keys = torch.stack([seen[j] for j in range(inside[0] * page, (inside[-1] + 1) * page)])
            scored.append((max(page_score(q, keys, "bounds") for q in queries), above))
    count = math.ceil(o.get("beam", 4) * (o.get("rerank", 1) * o["budget"] // page) / span)
    open_ = {window_page // span, *best(scored, count)}
    return [(score, number) for score, number in pages if score == math.inf or number // span in open_]


def tree_search(free: list[int], score: Mapping[int, float], count: int) -> list[int]:
    """Return ``count`` of the pages ``free``, as halving ranges of them finds them."""
    count = min(count, len(free))
    ranges = [free[len(free) * j // count : len(free) * (j + 1) // count] for j in range(count)]
    while any(len(pages) > 1 for pages in ranges):
        halves = [half for r in ranges for half in (r[: len(r) // 2], r[len(r) // 2 :]) if half]
        kept = best([(score[half[len(half) // 2]], index) for index, half in enumerate(halves)], count)
        ranges = [halves[index] for index in sorted(kept)]
    return [pages[0] for pages in ranges]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Return ``x [N]`` with each number the nearest of 2^bits levels from its smallest to its largest."""
    low, top, levels = float(x.min()), float(x.max()), 2**bits - 1
    step = (top - low) / levels
    if not step:
        return x
    return torch.tensor([low + round((one - low) / step) * step for one in x.tolist()], dtype=x.dtype)


def through_codes(own: list[Token], p: int, o: Mapping[str, Any]) -> list[Token]:
    """Return the tokens as a query at p reads them: those of earlier pages with keys and values of few bits."""
    page, bits, read = o["page"], o["bits"], []
    for token in own:
        if token.position // page == p // page:
            read.append(token)
            continue
        start = token.position // page * page
        keys = torch.stack([x.key for x in own if start <= x.position < start + page], 1)
        channels = [[rounded(keys[g, :, c], bits) for c in range(keys.shape[2])] for g in range(keys.shape[0])]
        key = torch.stack([torch.stack([c[token.position - start] for c in group]) for group in channels])
        read.append(Token(token.position, key, torch.stack([rounded(row, bits) for row in token.value])))
    return read


def sparse_attention(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, **o: Any) -> Result:
    """``memc::sparse_attention`` from an empty state, with ``bits`` the one that holds few.

    With ``refresh`` it is ``memc::refreshed_attention``. ``left`` is unused.
    """
    batch, heads, tokens, _ = query.shape
    per_group = heads // key.shape[1]
    shape = (batch, heads, tokens)
    result = Result(torch.zeros(*shape, value.shape[3]).double(), torch.zeros(shape).double())
    for b in range(batch):
        own: list[Token] = []
        listed: list[list[int]] = [[] for _ in range(key.shape[1])]
        for t in range(tokens):
            p = int(positions[b, t])
            if p < 0:
                continue
            own = [*([] if p == 0 else own), Token(p, key[b, :, t].double(), value[b, :, t].double())]
            found = through_codes(own, p, o) if "bits" in o else own
            for group in range(key.shape[1]):
                mine = range(group * per_group, (group + 1) * per_group)
                kept = listed[group] if "refresh" in o else None
                chosen = set(sparse_choice(query[b, mine, t].double(), found, p, group, o, kept))
                read = [x for x in found if x.position in chosen]
                for h in mine:
                    weigh = grouped_row if o.get("method") == "landmark" else softmax_row
                    row = weigh(query[b, h, t].double(), read, h, group, p, o)
                    result.out[b, h, t], result.lse[b, h, t] = row
        result.held.append(own)
    return result

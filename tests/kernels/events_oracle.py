"""Events and what is taken by them, written as their pages read: python loops over one sequence, in float64."""

from __future__ import annotations

import math
from itertools import groupby

from torch import Tensor

from memc.dialect.events import NEAR

Graph = list[list[float]]


def numbered(
    logits: Tensor, tokens: list[int], keys: Tensor, *, gamma: float, longest: int, refine: str, history: int
) -> tuple[list[float], list[int]]:
    """Return the surprise of each token, and the number of its event, -1 where that is not known by the end.

    ``logits [T,V]`` are those behind each token and ``keys [G,T,D]`` theirs.
    """
    surprises, numbers, start = [0.0], [-1] * len(tokens), 0
    for p in range(1, len(tokens)):
        chances = [math.exp(x) for x in logits[p - 1].tolist()]
        surprises.append(-math.log(chances[tokens[p]] / sum(chances)))
        last = surprises[max(1, p - history) : p]
        surprised = False
        if last:
            mean = sum(last) / len(last)
            surprised = surprises[p] > mean + gamma * math.sqrt(sum((x - mean) ** 2 for x in last) / len(last))
        if not surprised and p - start < longest:
            continue
        end = p if refine == "none" else best_cut(alike(keys[:, start : p + 1]), refine) + start
        number = max(numbers) + 1
        numbers[start:end] = [number] * (end - start)
        start = end
    return surprises, numbers


def alike(keys: Tensor) -> Graph:
    """Return the graph of ``keys [G,N,D]``, of which only what sets each apart from their mean counts."""
    count = keys.shape[1]
    away = [[key - sum(head) / count for key in head] for head in keys]

    def cosine(i: int, j: int) -> float:
        lengths = [max(math.sqrt(float(k[n] @ k[n])), 1e-12) for k in away for n in (i, j)]
        found = [float(k[i] @ k[j]) / (lengths[2 * h] * lengths[2 * h + 1]) for h, k in enumerate(away)]
        return sum(found) / len(found)

    return [[0.0 if i == j else max(0.0, cosine(i, j)) for j in range(count)] for i in range(count)]


def best_cut(graph: Graph, refine: str) -> int:
    """Return before which node a graph is best cut in two."""
    cuts = range(1, len(graph))
    measure = modularity if refine == "modularity" else lambda g, at: -conductance(g, at)
    found = [(measure(graph, at), at) for at in cuts]
    best = max(value for value, _ in found)
    return max(at for value, at in found if value >= best - NEAR)


def modularity(graph: Graph, at: int) -> float:
    """Return the sum over pairs within either side of weight less what the degrees let expect, over all weight."""
    count, total = len(graph), sum(map(sum, graph))
    degree = [sum(row) for row in graph]
    if total == 0:
        return 0.0
    pairs = ((i, j) for i in range(count) for j in range(count) if (i < at) == (j < at))
    return sum(graph[i][j] - degree[i] * degree[j] / total for i, j in pairs) / total


def conductance(graph: Graph, at: int) -> float:
    """Return the weight that is cut, over the smaller sum of degrees of the two sides."""
    cut = sum(graph[i][j] for i in range(at) for j in range(at, len(graph)))
    least = min(sum(map(sum, graph[:at])), sum(map(sum, graph[at:])))
    return cut / least if least > 0 else 1.0


def taken(
    scores: list[float], must: set[int], numbers: list[int], p: int, *, budget: int, contiguity: float, delay: int
) -> set[int]:
    """Return the tokens that a query at p takes by the ``scores`` of each, with those it must."""
    events: dict[int, list[int]] = {}
    for j in range(p + 1):
        if numbers[j] >= 0 and j <= p - delay:
            events.setdefault(numbers[j], []).append(j)
    of = {j: number for number, members in events.items() for j in members}
    score = {number: max(scores[j] for j in members) for number, members in events.items()}
    rank = {j: score[of[j]] if j in of else scores[j] for j in range(p + 1) if j not in must}
    alike = budget - math.floor(contiguity * budget)
    first = sorted(must)[:alike] + sorted(rank, key=lambda j: (-rank[j], j))[: max(0, alike - len(must))]
    found = [number for number, _ in groupby(sorted(of[j] for j in first if j in of and j not in must))]
    read, beside = set(first) | must, []
    for j in rank:
        if j in of and j not in read:
            near = [score[number] for number in (of[j] - 1, of[j] + 1) if number in found]
            beside += [(-max(near), j)] if near else []
    return read | {j for _, j in sorted(beside)[: budget - len(read)]}

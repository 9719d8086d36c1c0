"""Forms of attention that the passes do not offer, in torch, for ``sparse_variants.py``.

Each is given the last R of the T tokens of a sequence, whose queries are asked, and gives their output ``[H,R,D]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from memc.kernels.sparse_attention.choose import Rule, describe, features, first, forced, strongest

BLOCK = 128


@dataclass(frozen=True)
class Layer:
    """What an attention is given: ``query [H,R,D]`` of the last tokens, ``key`` and ``value [G,T,D]`` of all, rotated.

    With the layer's number, the scale of its scores and the frequencies of its rotation.
    """

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    inv_freq: Tensor
    heads: tuple[int, ...] | None = None
    """Which of the layer's query heads these are, None for all."""

    @property
    def at(self) -> Tensor:
        """Positions ``[R]`` of the queries."""
        return torch.arange(self.key.shape[1] - self.query.shape[1], self.key.shape[1])

    @property
    def size(self) -> int:
        """Query heads that read one key-value head."""
        return len(self.query) // len(self.key)

    def of(self, groups: Sequence[int]) -> Layer:
        """Return the layer with some of its key-value heads, and the query heads that read them."""
        heads = tuple(group * self.size + head for group in groups for head in range(self.size))
        key, value = self.key[list(groups)], self.value[list(groups)]
        return replace(self, query=self.query[list(heads)], key=key, value=value, heads=heads)

    def grouped(self, x: Tensor) -> Tensor:
        """Return what query heads have ``[H,R,...]`` by the key-value head that they read ``[G,H/G R,...]``."""
        return x.reshape(len(self.key), self.size * x.shape[1], *x.shape[2:])

    def scores(self, key: Tensor | None = None) -> Tensor:
        """Return the scores ``[H,R,T]`` of all queries and keys, or of others ``[G,T,D]``, of later ones too."""
        keys = self.key if key is None else key
        return (self.grouped(self.query * self.scale) @ keys.mT).view(*self.query.shape[:2], -1)

    def read(self, weight: Tensor) -> Tensor:
        """Return the values ``[H,R,D]`` weighed by ``weight [H,R,T]``."""
        return (self.grouped(weight) @ self.value).view(*self.query.shape[:2], -1)

    def over_heads(self, x: Tensor) -> Tensor:
        """Repeat what key-value heads have for the query heads that read them."""
        return x.repeat_interleave(self.size, 0)


Attend = Callable[[Layer], Tensor]


def rotated(x: Tensor, by: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate ``x [...,T,D]`` by ``by [T]`` positions, which may be fractions or negative."""
    angle = by[:, None].to(x.dtype) * inv_freq.to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def dense(layer: Layer) -> Tensor:
    """Read every earlier token."""
    seen = torch.arange(layer.key.shape[1]) <= layer.at[:, None]
    given = (x[None] for x in (layer.query, layer.key, layer.value))
    return scaled_dot_product_attention(*given, attn_mask=seen, scale=layer.scale, enable_gqa=True)[0]


@dataclass(frozen=True)
class Streaming:
    """Sinks, a window, and one token of weight N that stands for the N tokens that are neither.

    ``token`` says what its logit is, ``log N`` aside:

    - ``none``: minus infinity, there is no such token;
    - ``mean``: q.k of the mean of the dropped keys, rotated as they are (RazorAttention, arXiv 2407.15891, 3.3);
    - ``before``: the same, keys averaged before rotation and rotated to the middle of where they stood;
    - ``edge``: likewise, rotated to the last that was dropped;
    - ``affine``: w.q + b with q before rotation, fitted for each query head offline to the log of the mean exponential
      of the dropped scores;
    - ``normal``: q.k of the mean and half the variance of q.k for independent channels, as ``moments`` ranks by;
    - ``true``: the log of the mean exponential of the dropped scores, which no state of constant size gives.

    Its value is the mean of the dropped values; with ``tilted`` the first-order expansion of their softmax around it,
    mean((1 + q.k - q.mean k) v), which a matrix of D x D for each key-value head would hold.
    """

    window: int
    token: str = "none"
    tilted: bool = False
    sinks: int = 4
    fitted: Mapping[int, Tensor] | None = None

    def __call__(self, layer: Layer) -> Tensor:
        """Return the output, of some queries at a time."""
        logit, mean = self.of_dropped(layer)
        made = []
        for start in range(0, len(layer.at), BLOCK):
            rows = slice(start, start + BLOCK)
            end = int(layer.at[rows][-1]) + 1
            low = max(self.sinks, end - len(layer.at[rows]) - self.window + 1)
            number = torch.cat([torch.arange(self.sinks), torch.arange(low, end)])
            near = replace(layer, query=layer.query[:, rows], key=layer.key[:, number], value=layer.value[:, number])
            back = layer.at[rows, None] - number
            kept = (back >= 0) & ((back < self.window) | (number < self.sinks))
            scores = near.scores().masked_fill(~kept, -torch.inf)
            weight = torch.cat([scores, logit[:, rows, None]], -1).softmax(-1)
            made.append(near.read(weight[..., :-1]) + weight[..., -1:] * mean[:, rows])
        return torch.cat(made, 1)

    def count(self, layer: Layer) -> Tensor:
        """Return how many tokens ``[R]`` each query has dropped."""
        return (layer.at - self.window - self.sinks + 1).clamp_min(0)

    def of_dropped(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return logit ``[H,R]`` and value ``[H,R,D]`` of the token that stands for what was dropped."""
        count = self.count(layer)
        if self.token == "none":
            return layer.query.new_full(layer.query.shape[:2], -torch.inf), torch.zeros_like(layer.query)
        logit = self.logit(layer) + count.to(layer.query.dtype).log()
        mean = layer.over_heads(self.mean(layer, layer.value))
        if self.tilted:
            at = torch.arange(layer.key.shape[1])
            gone = (at >= self.sinks) & (at <= layer.at[:, None] - self.window)
            spread = gone / count[:, None].clamp_min(1).to(layer.query.dtype)
            scores = layer.scores()
            mean = layer.read(spread * (1 + scores - (scores * spread).sum(-1, keepdim=True)))
        return logit, mean

    def mean(self, layer: Layer, x: Tensor) -> Tensor:
        """Return the mean ``[G,R,.]`` over the dropped tokens of what each has ``[G,T,.]``; 0 where there are none."""
        total = torch.cat([torch.zeros_like(x[:, :1]), x[:, self.sinks :].cumsum(1)], 1)
        count = self.count(layer)
        return total[:, count] / count.clamp_min(1)[:, None]

    def logit(self, layer: Layer) -> Tensor:
        """Return the logit ``[H,R]`` of the token; whatever it is where nothing was dropped."""
        at, q = torch.arange(layer.key.shape[1]), layer.query * layer.scale
        match self.token:
            case "mean":
                return (q * layer.over_heads(self.mean(layer, layer.key))).sum(-1)
            case "before" | "edge":
                plain = self.mean(layer, rotated(layer.key, -at, layer.inv_freq))
                last = layer.at - self.window
                where = last if self.token == "edge" else (last + self.sinks) / 2
                return (q * layer.over_heads(rotated(plain, where, layer.inv_freq))).sum(-1)
            case "affine":
                assert self.fitted is not None
                weights = self.fitted[layer.number]
                weights = weights if layer.heads is None else weights[list(layer.heads)]
                return (regressors(layer) @ weights[..., None].to(q.dtype))[..., 0]
            case "normal":
                mean = self.mean(layer, layer.key)
                variance = (self.mean(layer, layer.key.square()) - mean.square()).clamp_min(0)
                return (q * layer.over_heads(mean) + q.square() * layer.over_heads(variance) / 2).sum(-1)
            case _:
                gone = (at >= self.sinks) & (at <= layer.at[:, None] - self.window)
                count = self.count(layer).clamp_min(1).to(q.dtype)
                return layer.scores().masked_fill(~gone, -torch.inf).logsumexp(-1) - count.log()


def regressors(layer: Layer) -> Tensor:
    """Return what an affine logit is linear in ``[H,R,1+D]``: one, and the query before rotation."""
    one = torch.ones_like(layer.query[..., :1])
    return torch.cat([one, rotated(layer.query, -layer.at, layer.inv_freq)], -1)


def fitted(layers: Sequence[Layer], window: int) -> Tensor:
    """Fit ``[H,1+D]`` weights of an affine logit to calls of one layer, least squares weighed by what was missed."""
    true, gram, right = Streaming(window, "true"), 0.0, 0.0
    for layer in layers:
        given, wanted = regressors(layer).double(), true.logit(layer).double()
        dropped = (wanted + true.count(layer).log() - seen_sum(layer)).exp()
        gram = gram + (given * dropped[..., None]).mT @ given
        right = right + ((given * dropped[..., None]).mT @ wanted[..., None])[..., 0]
    assert isinstance(gram, Tensor) and isinstance(right, Tensor)
    ridge = 1e-4 * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.solve(gram + ridge, right)


def seen_sum(layer: Layer) -> Tensor:
    """Return the log-sum-exp ``[H,R]`` of all scores."""
    later = torch.arange(layer.key.shape[1]) > layer.at[:, None]
    return layer.scores().masked_fill(later, -torch.inf).logsumexp(-1)


@dataclass(frozen=True)
class Split:
    """Some key-value heads of each layer attend one way, the others another."""

    kept: Mapping[int, Sequence[int]]
    streaming: Attend
    retrieving: Attend = dense

    def __call__(self, layer: Layer) -> Tensor:
        """Return the output of both parts together."""
        kept = list(self.kept.get(layer.number, ()))
        others = [group for group in range(len(layer.key)) if group not in kept]
        out = torch.empty_like(layer.query).unflatten(0, (len(layer.key), -1))
        for groups, attend in ((kept, self.retrieving), (others, self.streaming)):
            if groups:
                out[groups] = attend(layer.of(groups)).unflatten(0, (len(groups), -1))
        return out.flatten(0, 1)


@dataclass(frozen=True)
class Choosing:
    """Tokens or pages are chosen by a rule, scores of the heads that share a key-value head joined by ``reduce``.

    ``max`` is what the ops do; ``sum`` adds scores, ``share`` the softmax of each head's scores over what it may take.
    """

    rule: Rule
    reduce: str = "max"

    def __call__(self, layer: Layer) -> Tensor:
        """Return the output."""
        scores = layer.scores().masked_fill_(~layer.over_heads(self.chosen(layer)), -torch.inf)
        return layer.read(scores.softmax(-1))

    def chosen(self, layer: Layer) -> Tensor:
        """Mark the tokens ``[G,R,T]`` that the queries read."""
        rule = self.rule
        query, key, at = layer.query[None] * layer.scale, layer.key[None], layer.at[None]
        pages = describe(key.unflatten(2, (-1, rule.page)), rule.method)
        if rule.by_token:
            found = joined(strongest(query, len(layer.key), rule.channels), pages.mT.flatten(2, 3))
        else:
            found = joined(features(query, rule.method), pages)
        must, seen = forced(at, found.shape[-1], rule)
        rank = self.reduced(found, seen).masked_fill_(must, torch.inf).masked_fill_(~seen, -torch.inf)
        taken = (first(rank, rule.most) & (rank > -torch.inf)).repeat_interleave(rule.unit, -1)
        taken &= torch.arange(key.shape[2]) <= at[0, :, None]
        if rule.rerank > 1:
            near = forced(at, key.shape[2], replace(rule, method="lowbit", page=1))[0]
            rank = self.reduced(joined(query, key), taken).masked_fill_(near, torch.inf)
            taken &= first(rank.masked_fill_(~taken, -torch.inf), rule.budget)
        return taken[0]

    def reduced(self, products: Tensor, among: Tensor) -> Tensor:
        """Return one rank ``[1,G,R,N]`` for the heads of a group, which may take what is ``among [1,.,R,N]``."""
        match self.reduce:
            case "max":
                return products.amax(2)
            case "sum":
                return products.sum(2)
            case _:
                return products.masked_fill(~among[:, :, None], -torch.inf).softmax(-1).sum(2)


def joined(query: Tensor, rows: Tensor) -> Tensor:
    """Return the products ``[1,G,H/G,R,N]`` of ``query [1,H,R,C]`` and ``rows [1,G,N,C]``."""
    return query.unflatten(1, (rows.shape[1], -1)) @ rows[:, :, None].mT


@dataclass(frozen=True)
class Narrowed:
    """Keys that queries read from afar lack the channels ``gone [G,D]`` of each layer (ThinK, arXiv 2407.21018).

    The last ``recent`` keys before a query stay whole, and with ``prompt`` all keys from there on.
    """

    gone: Mapping[int, Tensor]
    recent: int = 32
    prompt: int | None = None

    def __call__(self, layer: Layer) -> Tensor:
        """Return the output."""
        number = torch.arange(layer.key.shape[1])
        old = number <= layer.at[:, None] - self.recent
        if self.prompt is not None:
            old &= number < self.prompt - self.recent
        narrow = layer.scores(layer.key.masked_fill(self.gone[layer.number][:, None], 0))
        scores = torch.where(old, narrow, layer.scores()).masked_fill_(number > layer.at[:, None], -torch.inf)
        return layer.read(scores.softmax(-1))


def energy(query: Tensor, key: Tensor) -> Tensor:
    """Return the mean squares of queries ``[H,R,D]`` and keys, multiplied channel by channel ``[G,D]``."""
    return query.square().mean(1).unflatten(0, (len(key), -1)).sum(1) * key.square().mean(1)


def weakest(rank: Tensor, share: float) -> Tensor:
    """Mark a share of each row of ``rank [...,N]``, the lowest."""
    return ~first(rank, rank.shape[-1] - round(share * rank.shape[-1]))

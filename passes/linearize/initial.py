"""First values of a linearized layer's parameters in closed form, from the attention that it replaces.

Shapes: ``key [B,G,T,D]``; ``attention [B,H,R,T]`` are the teacher's weights of R queries on far tokens, zeros
elsewhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memc.objective import Values
from memc.passes.linearize.parameters import LONGEST, bias_of

ROUNDS = 8
"""Rounds of k-means."""

SHARPENING = 0.5
"""Power of the attention that a key gets with which it is drawn for k-means: 0 draws all alike, 1 as they are read."""

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean square of an input channel."""


def set_maps(key: Tensor, attention: Tensor, parameters: Values, scale: float, seed: int) -> None:
    """Make the features of queries and keys their attention to centroids of the keys.

    With centroids c_j, softmax_j(scale k.c_j) says which centroids a key is near to and softmax_j(scale q.c_j) how
    much a query would attend to each, so their product is attention through the centroids (as in clustered attention,
    Vyas et al. 2020), in the layer's own scale. Keys that are read more are drawn more often.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    groups, features = parameters["key_map"].shape[0], parameters["key_map"].shape[-1]
    read = attention.unflatten(1, (groups, -1)).sum((2, 3))
    for group in range(groups):
        keys = key[:, group].reshape(-1, key.shape[-1]).float()
        chances = (read[:, group].reshape(-1).float() + 1e-9).pow(SHARPENING).cpu()
        drawn = torch.multinomial(chances, len(keys), replacement=True, generator=generator)
        keys = keys[drawn.to(keys.device)]
        centroids = kmeans(keys, features, generator) - keys.mean(0)
        parameters["key_map"][group].copy_(scale * centroids.T)
        heads = parameters["query_map"].shape[0] // groups
        parameters["query_map"][group * heads : (group + 1) * heads].copy_((scale * centroids.T).expand(heads, -1, -1))


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` centroids of ``points [N,D]`` by Lloyd's rounds; empty ones are drawn anew from the points."""

    def draw(number: int) -> Tensor:
        return points[torch.randint(len(points), (number,), generator=generator).to(points.device)]

    centroids = draw(count)
    for _ in range(ROUNDS):
        nearest = (2 * points @ centroids.T - centroids.square().sum(1)).argmax(1)
        sizes = torch.zeros(count, device=points.device).index_add_(0, nearest, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], draw(count))
    return centroids


def set_half_life(attention: Tensor, distance: Tensor, gate_bias: Tensor) -> None:
    """Make the gate forget at the rate at which far attention falls with distance (after Taylor-Calibrate, 2606.16429).

    The rate is that of the exponential over the same far distances whose mean is the teacher's mean look-back; where
    the teacher looks back further than evenly, nothing is forgotten. ``distance [B,R,T]`` is in tokens; ``gate_bias``
    has a row for each group of heads.
    """
    far, groups = attention.sum(1) > 0, gate_bias.shape[0]
    mass = attention.float().unflatten(1, (groups, -1)).sum(2)
    weight = mass.sum((0, 2, 3)).clamp_min(1e-9)
    look_back = (mass * distance.unsqueeze(1)).sum((0, 2, 3)) / weight
    rows = mass.sum(-1)
    for group in range(groups):
        low, high = 0.0, 1.0
        for _ in range(20):
            rate = 0.5 * (low + high)
            decayed = torch.exp(-rate * distance.clamp_min(0)) * far
            mean = (decayed * distance).sum(-1) / decayed.sum(-1).clamp_min(1e-20)
            mean_of_rows = float((mean * rows[:, group]).sum() / weight[group])
            low, high = (rate, high) if mean_of_rows > float(look_back[group]) else (low, rate)
        # What a sample of T tokens shows of distances says nothing of forgetting within those T.
        half_life = min(LONGEST, max(float(attention.shape[-1]), math.log(2) / max(low, 1e-9)))
        gate_bias[group].fill_(bias_of(half_life))


def set_mass(share: Tensor, wanted: Tensor, hidden: Tensor, parameters: Values) -> None:
    """Fit the log mass of the memory to the teacher's share of far attention by ridge regression on the block's input.

    ``share [B,H,T]`` is the memory's share with the present parameters, ``wanted`` the teacher's. The log odds of a
    share are the log mass plus what does not depend on it, so the mass is off by the difference of the log odds. Tokens
    weigh by how much the teacher reads far. ``share`` and ``wanted [B,H,R]``, ``hidden [B,R,width]``.
    """
    rows = hidden.flatten(0, 1).float()
    odds = share.double().clamp(1e-30, 1 - 1e-7).logit()
    aim = (wanted.double().clamp(1e-6, 1 - 1e-6).logit() - odds).float() + parameters["mass_bias"][None, :, None]
    weight, bias = parameters["mass_weight"], parameters["mass_bias"]
    for head in range(share.shape[1]):
        weights = wanted[:, head].reshape(-1).float()
        if not float(weights.sum()) > 0:
            continue
        weights = weights / weights.sum()
        target = aim[:, head].reshape(-1)
        mean, level = weights @ rows, weights @ target
        centred = (rows - mean) * weights.sqrt()[:, None]
        gram = centred.T @ centred
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        slope = torch.linalg.solve(gram, centred.T @ ((target - level) * weights.sqrt()))
        weight[:, head].copy_(slope)
        bias[head].copy_(level - mean @ slope)

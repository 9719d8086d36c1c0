"""The prototypes of ``benchmarks/sparse_variants.py``, each beside its formula in float64, pair by pair."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memc.kernels.sparse_attention.choose import Rule, chosen, describe

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import sparse_variants_forms as forms
from sparse_variants_forms import Choosing, Layer, Narrowed, Split, Streaming, dense, energy, rotated, weakest

GROUPS, SIZE, CHANNELS, TOKENS, ASKED = 2, 3, 8, 40, 17
SINKS = 3
SELECTED = [("lowbit", 1), ("lowbit", 2), ("bounds", 1), ("bounds", 2), ("moments", 2)]


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Layer:
    monkeypatch.setattr(forms, "BLOCK", 7)
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(GROUPS * SIZE, ASKED, CHANNELS, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, GROUPS, TOKENS, CHANNELS, generator=draw, dtype=torch.float64)
    inv_freq = 0.01 ** (torch.arange(CHANNELS // 2, dtype=torch.float64) / (CHANNELS // 2))
    return Layer(0, query, key, value, 0.35, inv_freq)


def turned(x: Tensor, by: float, inv_freq: Tensor) -> Tensor:
    """Rotate one vector, as complex numbers."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:]) * torch.exp(1j * by * inv_freq)
    return torch.cat([pairs.real, pairs.imag])


def logit(token: str, layer: Layer, q: Tensor, p: int, keys: Tensor, window: int, weights: Tensor) -> float:
    """Return the logit, less log N, of what stands for ``keys [N,D]``, the first of them behind the sinks."""
    match token:
        case "mean":
            return float(q @ keys.mean(0)) * layer.scale
        case "edge":
            plain = torch.stack([turned(k, -(SINKS + j), layer.inv_freq) for j, k in enumerate(keys)]).mean(0)
            return float(q @ turned(plain, p - window, layer.inv_freq)) * layer.scale
        case "normal":
            scaled = q * layer.scale
            return float(scaled @ keys.mean(0) + (scaled.square() @ keys.var(0, correction=0)) / 2)
        case "affine":
            return float(weights[0] + weights[1:] @ turned(q, -p, layer.inv_freq))
        case _:
            return math.log(sum(math.exp(float(q @ k) * layer.scale) for k in keys) / len(keys))


@pytest.mark.parametrize("window", [1, 9, 30, 60])
@pytest.mark.parametrize("tilted", [False, True])
@pytest.mark.parametrize("token", ["none", "mean", "edge", "normal", "affine", "true"])
def test_a_token_stands_for_what_was_dropped(layer: Layer, token: str, tilted: bool, window: int) -> None:
    weights = torch.randn(GROUPS * SIZE, 1 + CHANNELS, generator=torch.Generator().manual_seed(1)).double()
    found = Streaming(window, token, tilted, SINKS, {0: weights})(layer)
    for h in range(GROUPS * SIZE):
        keys, values = layer.key[h // SIZE], layer.value[h // SIZE]
        for r in range(ASKED):
            q, p = layer.query[h, r], TOKENS - ASKED + r
            read = [j for j in range(p + 1) if p - j < window or j < SINKS]
            gone = [j for j in range(p + 1) if j not in read]
            terms = [(math.exp(float(q @ keys[j]) * layer.scale), values[j]) for j in read]
            if gone and token != "none":
                mean = keys[gone].mean(0)
                share = [1 + layer.scale * float(q @ (keys[j] - mean)) * tilted for j in gone]
                weight = len(gone) * math.exp(logit(token, layer, q, p, keys[gone], window, weights[h]))
                terms.append((weight, sum(s * values[j] for s, j in zip(share, gone, strict=True)) / len(gone)))
            wanted = sum(weight * value for weight, value in terms) / sum(weight for weight, _ in terms)
            torch.testing.assert_close(found[h, r], wanted, atol=1e-12, rtol=0)


def test_heads_are_split(layer: Layer) -> None:
    weights = {0: torch.randn(GROUPS * SIZE, 1 + CHANNELS).double()}
    stream = Streaming(5, "affine", fitted=weights)
    found = Split({0: [0]}, stream)(layer)
    torch.testing.assert_close(found[:SIZE], dense(layer)[:SIZE])
    torch.testing.assert_close(found[SIZE:], stream(layer)[SIZE:])


def rule(layer: Layer, method: str, rerank: int) -> Rule:
    sizes = {"page": 4, "budget": 16, "sinks": SINKS, "window": 5, "channels": 2}
    return Rule(scale=layer.scale, method=method, rerank=rerank, **sizes)


@pytest.mark.parametrize(("method", "rerank"), SELECTED)
def test_the_highest_score_is_what_the_op_takes(layer: Layer, method: str, rerank: int) -> None:
    given = rule(layer, method, rerank)
    pages = describe(layer.key[None].unflatten(2, (-1, given.page)), method)
    wanted = chosen(layer.query[None], layer.key[None], pages, layer.at[None], given)
    assert torch.equal(Choosing(given).chosen(layer), wanted[0])


@pytest.mark.parametrize(("method", "rerank"), SELECTED)
@pytest.mark.parametrize("reduce", ["sum", "share"])
def test_joined_scores_of_one_head_choose_alike(layer: Layer, method: str, rerank: int, reduce: str) -> None:
    one, given = (
        Layer(0, layer.query[:GROUPS], layer.key, layer.value, layer.scale, layer.inv_freq),
        rule(layer, method, rerank),
    )
    assert torch.equal(Choosing(given, reduce).chosen(one), Choosing(given).chosen(one))


@pytest.mark.parametrize("reduce", ["sum", "share"])
def test_scores_are_joined(layer: Layer, reduce: str) -> None:
    given = rule(layer, "bounds", 1)
    found = Choosing(given, reduce).chosen(layer)
    for g in range(GROUPS):
        for r in range(ASKED):
            p = TOKENS - ASKED + r
            starts = range(0, p + 1, given.page)
            total = torch.zeros(len(starts)).double()
            for h in range(g * SIZE, (g + 1) * SIZE):
                q = layer.query[h, r] * layer.scale
                bounds = [(q * layer.key[g, start : start + given.page]).amax(0).sum() for start in starts]
                total += torch.stack(bounds).softmax(0) if reduce == "share" else torch.stack(bounds)
            must = [s for s in starts if s < SINKS or s >= (p - given.window + 1) // given.page * given.page]
            rest = sorted((s for s in starts if s not in must), key=lambda s: -float(total[s // given.page]))
            taken = {*must, *rest[: given.budget // given.page - len(must)]}
            assert found[g, r].tolist() == [j <= p and j // given.page * given.page in taken for j in range(TOKENS)]


@pytest.mark.parametrize("prompt", [None, 28])
def test_old_keys_lack_channels(layer: Layer, prompt: int | None) -> None:
    gone = weakest(torch.rand(GROUPS, CHANNELS), 0.4)
    assert gone.sum(1).tolist() == [3, 3]
    found = Narrowed({0: gone}, 5, prompt)(layer)
    for h in range(GROUPS * SIZE):
        for r in range(ASKED):
            p, keys = TOKENS - ASKED + r, layer.key[h // SIZE].clone()
            old = [j for j in range(p + 1) if p - j >= 5 and (prompt is None or j < prompt - 5)]
            keys[old] = keys[old] * ~gone[h // SIZE]
            weight = (keys[: p + 1] @ layer.query[h, r] * layer.scale).softmax(0)
            torch.testing.assert_close(found[h, r], weight @ layer.value[h // SIZE, : p + 1], atol=1e-12, rtol=0)


def test_channels_weigh_what_queries_and_keys_do(layer: Layer) -> None:
    by_head = layer.query.pow(2).mean(1).view(GROUPS, SIZE, CHANNELS)
    torch.testing.assert_close(energy(layer.query, layer.key), by_head.sum(1) * layer.key.pow(2).mean(1))


def test_rotation_is_that_of_complex_numbers(layer: Layer) -> None:
    found = rotated(layer.key, torch.arange(TOKENS) / 2 - 3, layer.inv_freq)
    wanted = torch.stack([turned(layer.key[1, t], t / 2 - 3, layer.inv_freq) for t in range(TOKENS)])
    torch.testing.assert_close(found[1], wanted)

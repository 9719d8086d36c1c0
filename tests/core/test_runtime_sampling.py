"""Drawing tokens, against a naive reference."""

import numpy as np
import pytest

from memc.errors import MemcError
from memc.runtime.sampling import Sampler, Sampling, distribution


def naive(logits, temperature, top_k, top_p):
    """The warpers of transformers, line by line."""
    scores = logits.astype(np.float64) / temperature
    if top_k is not None:
        scores = np.where(scores < np.sort(scores)[-min(top_k, len(scores))], -np.inf, scores)
    if top_p < 1:
        order = np.argsort(scores, kind="stable")
        cumulative = np.cumsum(np.exp(scores[order] - scores.max()) / np.exp(scores - scores.max()).sum())
        remove = cumulative <= 1 - top_p
        remove[-1] = False
        scores[order[remove]] = -np.inf
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_distribution_equals_the_reference(temperature, top_k, top_p):
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(size=300).astype(np.float32) * 3
        got = distribution(logits, Sampling(temperature, top_k, top_p))
        np.testing.assert_allclose(got, naive(logits, temperature, top_k, top_p), atol=1e-12)


def test_distribution_equals_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    scores = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.8)):
        scores = warper(None, scores)
    np.testing.assert_allclose(
        distribution(logits[0].numpy(), Sampling(0.7, 40, 0.8)), scores.softmax(-1)[0].numpy(), atol=1e-12
    )


def test_ties_with_the_last_of_top_k_are_kept():
    assert distribution(np.array([2.0, 1.0, 1.0, 0.0]), Sampling(1.0, 2)).tolist()[3] == 0
    assert (distribution(np.array([2.0, 1.0, 1.0, 0.0]), Sampling(1.0, 2)) > 0).sum() == 3


def test_draws_follow_the_distribution():
    logits = np.array([1.0, 0.0, 2.0, -1.0, 0.5])
    sampling = Sampling(0.8, 4, 0.95)
    sampler = Sampler(sampling, 0, 1)
    count = 20000
    seen = np.bincount([sampler.draw(0, logits) for _ in range(count)], minlength=5) / count
    expected = distribution(logits, sampling)
    assert np.abs(seen - expected).max() < 0.015
    assert not seen[expected == 0].any()


def test_greedy_and_extremes():
    logits = np.array([0.0, 3.0, 3.0, 1.0])
    for sampling in (Sampling(), Sampling(0.0, 2, 0.5), Sampling(1e-300, 1)):
        assert Sampler(sampling, 0, 1).draw(0, logits) in ((1,) if sampling.temperature == 0 else (1, 2))
    assert distribution(np.array([1e30, -1e30, 0.0]), Sampling(1e-3, None, 0.9)).tolist() == [1, 0, 0]


def test_rows_have_their_own_seeds():
    logits = np.zeros(1000)
    both, second = Sampler(Sampling(1.0), 3, 2), Sampler(Sampling(1.0), 4, 1)
    first = [both.draw(0, logits) for _ in range(8)]
    assert [both.draw(1, logits) for _ in range(8)] == [second.draw(0, logits) for _ in range(8)] != first


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad):
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(MemcError) as caught:
            Sampler(sampling, 0, 1).draw(0, np.array([0.0, bad]))
        assert caught.value.code == "E403"


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_values_out_of_range(options):
    with pytest.raises(MemcError) as caught:
        Sampling(**options)
    assert caught.value.code == "E200" and next(iter(options)) in str(caught.value)

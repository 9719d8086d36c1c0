"""Perplexity and divergence against a naive sum over the whole logits."""

import numpy as np
import pytest

from memc.errors import MemcError
from memc.evaluate import compare, perplexity
from tests.core.runtime_fakes import VOCAB, make_session

IDS = np.random.default_rng(0).integers(0, VOCAB, 150)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def naive(session, ids, window, stride):
    """Return log-probabilities of every scored column, its target, and its column."""
    logs, targets, columns = [], [], []
    done = 1
    for start in range(0, len(ids), stride):
        tokens = ids[start : start + window]
        out = log_softmax(session.logits(tokens)[0])
        for column in range(len(tokens) - 1):
            if start + column + 1 >= done:
                logs.append(out[column])
                targets.append(tokens[column + 1])
                columns.append(column)
        done = max(done, start + len(tokens))
    return np.array(logs), np.array(targets), np.array(columns)


@pytest.mark.parametrize(("window", "stride"), [(150, None), (64, None), (50, 20), (400, None), (2, None), (149, None)])
@pytest.mark.parametrize("chunk", [7, 256])
def test_perplexity_equals_the_naive_sum(tmp_path, window, stride, chunk):
    session = make_session(tmp_path, chunk=chunk)
    got = perplexity(session, IDS, window, stride=stride)
    logs, targets, columns = naive(session, IDS, window, stride or window)
    nll = -logs[np.arange(len(targets)), targets]
    assert got.tokens == len(nll)
    np.testing.assert_allclose(got.nll_mean, nll.mean(), rtol=1e-10)
    np.testing.assert_allclose(got.perplexity, np.exp(nll.mean()), rtol=1e-10)
    assert sum(bucket.tokens for bucket in got.by_position) == got.tokens
    for bucket in got.by_position:
        chosen = nll[(columns + 1 >= bucket.start) & (columns + 1 < bucket.stop)]
        assert bucket.tokens == len(chosen)
        np.testing.assert_allclose(bucket.perplexity, np.exp(chosen.mean()), rtol=1e-10)
    assert max(width for width, _ in session.runner.calls) <= max(chunk, window)


def test_buckets_halve_the_window_and_chunks_stay_small(tmp_path):
    session = make_session(tmp_path, chunk=8)
    got = perplexity(session, IDS, 128, limit=128)
    assert [(bucket.start, bucket.stop) for bucket in got.by_position] == [
        (1, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128)
    ]  # fmt: skip
    assert got.tokens == 127 and {width for width, _ in session.runner.calls} == {8}


def test_a_perplexity_past_all_numbers_is_bounded(tmp_path, monkeypatch):
    session = make_session(tmp_path)
    wrong = np.zeros((1, len(IDS), IDS.max() + 2), np.float32)
    wrong[..., -1] = 1e4  # nats, on a token that never comes
    monkeypatch.setattr(session, "logit_chunks", lambda ids: iter([(0, wrong)]))
    got = perplexity(session, IDS, len(IDS))
    assert got.nll_mean == pytest.approx(1e4)
    assert 1e300 < got.perplexity < np.inf


@pytest.mark.parametrize(("window", "stride"), [(64, None), (50, 20)])
def test_compare_equals_the_naive_sum(tmp_path, window, stride):
    a, b = make_session(tmp_path, chunk=9), make_session(tmp_path, chunk=200, seed=1)
    got = compare(a, b, IDS, window, stride=stride)
    log_a, _, _ = naive(a, IDS, window, stride or window)
    log_b, _, _ = naive(b, IDS, window, stride or window)
    kl = (np.exp(log_b) * (log_b - log_a)).sum(1)
    np.testing.assert_allclose(got.kl_mean, kl.mean(), rtol=1e-9)
    np.testing.assert_allclose(got.kl_p99, np.quantile(kl, 0.99), rtol=1e-9)
    assert got.top1_agreement == (log_a.argmax(1) == log_b.argmax(1)).mean()
    for side, session in ((got.a, a), (got.b, b)):
        expected = perplexity(session, IDS, window, stride=stride)
        assert side.tokens == expected.tokens and np.isclose(side.perplexity, expected.perplexity, rtol=1e-12)
    assert got.ratio == got.a.perplexity / got.b.perplexity


def test_a_session_agrees_with_itself(tmp_path):
    a, b = make_session(tmp_path), make_session(tmp_path)
    got = compare(a, b, IDS, 64)
    assert (got.kl_mean, got.kl_p99, got.top1_agreement, got.ratio) == (0, 0, 1, 1)


def test_refusals(tmp_path):
    session = make_session(tmp_path, capacity=40, grows=True)
    poisoned = make_session(tmp_path, poison=int(IDS[20]))
    encoder = make_session(tmp_path, decoder=False)
    for code, call in (
        ("E207", lambda: perplexity(session, IDS[:1], 10)),
        ("E200", lambda: perplexity(session, IDS, 1)),
        ("E200", lambda: perplexity(session, IDS, -3)),
        ("E200", lambda: perplexity(session, IDS, 10, stride=11)),
        ("E200", lambda: perplexity(session, IDS, 10, stride=0)),
        ("E200", lambda: compare(session, session, IDS, 10, limit=1)),
        ("E206", lambda: perplexity(session, IDS, 64)),
        ("E403", lambda: perplexity(poisoned, IDS, 64)),
        ("E403", lambda: compare(session, poisoned, IDS, 32)),
        ("E208", lambda: perplexity(encoder, IDS, 64)),
        ("E208", lambda: compare(session, encoder, IDS, 32)),
    ):
        with pytest.raises(MemcError) as caught:
            call()
        assert caught.value.code == code, caught.value


def test_other_vocabularies_are_refused(tmp_path):
    a, b = make_session(tmp_path), make_session(tmp_path)
    b.runner.run = lambda tokens, *rest: np.zeros((*tokens.shape, VOCAB + 1), np.float32)
    with pytest.raises(MemcError) as caught:
        compare(a, b, IDS, 32)
    assert caught.value.code == "E208" and str(VOCAB + 1) in str(caught.value)

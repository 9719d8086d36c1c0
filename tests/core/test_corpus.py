"""Packed sequences: every token once, positions from each document's start, the same at any index and process."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memc.data import Batch, Corpus, TokenStream
from memc.errors import MemcError
from tests.core.runtime_fakes import byte_tokenizer

BLOCK = 8


@st.composite
def streams(draw, least=1):
    """Streams of documents whose every token is another number."""
    number, made = 0, []
    for index in range(draw(st.integers(least, 4))):
        documents = []
        for length in draw(st.lists(st.integers(0, 30), min_size=1, max_size=8)):
            documents.append(np.arange(number, number + length))
            number += length
        made.append(TokenStream.of(documents, f"text {index}"))
    return made


def long_streams(*sizes):
    starts = np.cumsum([0, *sizes])
    return [
        TokenStream.of(np.array_split(np.arange(start, start + size), 3), f"text {start}")
        for start, size in zip(starts, sizes, strict=False)
    ]


def epoch(sequences, number=0):
    return sequences.batch(number, len(sequences))


def ready(made, length):
    corpus = Corpus(made, block=BLOCK)
    return corpus if sum(pool.tokens for pool in corpus.train) >= length else None


@given(streams(), st.integers(1, 12), st.integers(0, 3))
def test_an_epoch_is_every_training_token_once(made, length, number):
    if (corpus := ready(made, length)) is None:
        return
    sequences = corpus.sequences(length, seed=3)
    tokens = epoch(sequences, number).tokens
    assert tokens.shape == (len(sequences), length)
    seen = set(tokens.ravel().tolist())
    held = {int(token) for pool in corpus.held_out for part in pool.segments for token in _ids(part)}
    everything = {int(token) for stream in made for token in stream.ids}
    assert len(seen) == tokens.size  # none twice
    assert not seen & held and held | seen <= everything
    assert len(everything - held - seen) < length  # what does not fill a sequence


def _ids(segment):
    return segment.stream.ids[segment.start : segment.stop]


@given(streams(), st.integers(1, 12))
def test_positions_count_from_the_start_of_a_document(made, length):
    if (corpus := ready(made, length)) is None:
        return
    first = {int(stream.ids[start]) for stream in made for start in stream.starts}
    batches = [epoch(corpus.sequences(length))]
    if any(pool.tokens >= length for pool in corpus.held_out):
        batches.append(corpus.guard(length))
    for tokens, positions in (row for batch in batches for row in zip(*batch, strict=True)):
        expected = 0
        for index, (token, position) in enumerate(zip(tokens.tolist(), positions.tolist(), strict=True)):
            expected = 0 if index == 0 or token in first else expected + 1
            assert position == expected
            # Inside a document its tokens follow one another.
            assert position == 0 or token == tokens[index - 1] + 1


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    made = long_streams(100, 300)
    run = Corpus(made, [1, 2]).sequences(7, seed=5)
    steps = [run.batch(step, 4) for step in range(60)]  # several epochs
    for step in (0, 1, 13, 14, 59):
        again = Corpus(long_streams(100, 300), [1, 2]).sequences(7, seed=5).batch(step, 4)
        assert np.array_equal(again.tokens, steps[step].tokens)
        assert np.array_equal(again.positions, steps[step].positions)
    later = Corpus(made, [1, 2]).sequences(7, seed=5, epoch=2)
    assert np.array_equal(epoch(later).tokens, epoch(run, 2).tokens)
    assert [len(batch.tokens) for batch in run] == [1] * len(run)


def test_the_order_never_changes():
    """What is drawn is fixed for all time: a run resumed under another version of numpy must go on as it began."""
    sequences = Corpus(long_streams(40), guard=0).sequences(4, seed=7)
    assert sequences.batch(0, 10).tokens[:, 0].tolist() == [20, 16, 4, 12, 24, 36, 28, 32, 0, 8]


def test_seeds_and_epochs_differ():
    corpus = Corpus(long_streams(1003), guard=0)
    one, two = corpus.sequences(10, seed=0), corpus.sequences(10, seed=1)
    assert not np.array_equal(epoch(one).tokens, epoch(two).tokens)
    assert not np.array_equal(epoch(one).tokens, epoch(one, 1).tokens)
    # The cut moves too, over the 3 tokens that do not fill a sequence.
    assert {int(epoch(one, number).tokens.min()) for number in range(20)} == {0, 1, 2, 3}


@given(st.lists(st.integers(2 * BLOCK, 400), min_size=1, max_size=4), st.sampled_from([0.05, 0.2, 0.5]))
def test_the_end_of_every_stream_is_held_out_in_whole_blocks(sizes, guard):
    made = long_streams(*sizes)
    corpus = Corpus(made, guard=guard, block=BLOCK)
    held = corpus.guard(BLOCK).tokens.ravel().tolist()
    for stream in made:
        mine = [token for token in stream.ids.tolist() if token in set(held)]
        assert mine and len(mine) % BLOCK == 0 and mine == stream.ids[-len(mine) :].tolist()
        assert abs(len(mine) - guard * len(stream)) <= BLOCK and len(mine) < len(stream)


def test_a_limited_guard_has_all_streams():
    corpus = Corpus(long_streams(1000, 1000, 1000), guard=0.2, block=10)
    batch = corpus.guard(10, limit=6)
    assert isinstance(batch, Batch) and batch.tokens.shape == (6, 10)
    assert Counter((batch.tokens[:, 0] // 1000).tolist()) == {0: 2, 1: 2, 2: 2}
    assert corpus.guard(10, limit=1000).tokens.shape == (60, 10)


def test_the_guard_of_each_text_is_its_own():
    corpus = Corpus(long_streams(1000, 400, 15), [1, 1, 1], guard=0.2, block=10)
    assert [name for name, _ in corpus.guards(10, 3)] == corpus.names[:2], "the last is too short to hold any out"
    for text, (_, batch) in enumerate(corpus.guards(10, 3)):
        assert set((batch.tokens // 1000).flatten().tolist()) == {text} and batch.tokens.shape == (3, 10)
    assert [len(batch.tokens) for _, batch in corpus.guards(10, 100)] == [20, 8]
    with pytest.raises(MemcError, match="E207"):
        corpus.guards(1000, 1)


def test_small_files_are_joined():
    corpus = Corpus(long_streams(*[6] * 30, 100), guard=0.1, block=BLOCK)
    small = [token for token in corpus.guard(BLOCK).tokens.ravel().tolist() if token < 180]
    assert small and small == list(range(180 - len(small), 180))
    assert len(corpus.sequences(BLOCK)) * BLOCK > 280 - len(small) - 2 * BLOCK - BLOCK


@given(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)))
def test_weights_are_shares_of_every_epoch(weights):
    corpus = Corpus(long_streams(1000, 2000, 3000), weights, guard=0)
    sequences = corpus.sequences(10)
    total = Counter()
    for number in range(6):
        firsts = epoch(sequences, number).tokens[:, 0]
        counts = np.bincount(np.searchsorted([1000, 3000], firsts, side="right"), minlength=3)
        assert np.abs(counts - len(sequences) * np.array(weights) / sum(weights)).max() <= 2
        total.update(firsts.tolist())
    for low, high, spare in ((0, 1000, 100), (1000, 3000, 200), (3000, 6000, 300)):
        seen = [count for token, count in total.items() if low <= token < high]
        # A stream has given all before it gives anything twice.
        assert max(seen) - (min(seen) if len(seen) == spare else 0) <= 1


def test_streams_that_share_a_weight_are_as_one():
    made = long_streams(1000, 500, 3, 4, 600)
    corpus = Corpus([made[:4], made[4]], [3, 1], guard=0.1, block=10)
    counts, again = Counter(), corpus.sequences(10)
    for number in range(8):
        counts.update((epoch(again, number).tokens[:, 0] >= 1507).tolist())
    assert counts[False] == pytest.approx(3 * counts[True], rel=0.05)
    seen = {int(token) for number in range(8) for token in epoch(again, number).tokens.ravel()}
    held = {int(token) for pool in corpus.held_out for part in pool.segments for token in _ids(part)}
    assert not seen & held and seen >= set(range(1500, 1507)), "what is shorter than a sequence is in one too"
    assert [name for name, _ in corpus.guards(10, 1)] == ["text 0", "text 1000", "text 1507"]
    with pytest.raises(MemcError, match=r"E207 .*fewer than one sequence of 700 \[text 1507\]"):
        corpus.sequences(700)


def test_too_little_data():
    corpus = Corpus(long_streams(100), guard=0, block=10)
    sequences = corpus.sequences(30)
    sequences.require(90)
    with pytest.raises(MemcError) as caught:
        sequences.require(91)
    assert caught.value.code == "E207" and "91" in str(caught.value) and "--tokens 90" in caught.value.next
    with pytest.raises(MemcError, match=r"E207 .*100 tokens.* 101"):
        corpus.sequences(101)
    with pytest.raises(MemcError, match="E207 0 tokens are held out"):
        corpus.guard(10)
    with pytest.raises(MemcError, match=r"E207 .*5 tokens.*text 100\]"):
        Corpus(long_streams(100, 5), [1, 1]).sequences(10)


@pytest.mark.parametrize(
    "options", [{"guard": 0.6}, {"guard": -0.1}, {"weights": [1]}, {"weights": [1, 0]}, {"weights": [1, float("nan")]}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"guard|weights"):
        Corpus(long_streams(100, 100), **options)


def test_reading(tmp_path):
    tokenizer = byte_tokenizer()
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"the {name} fox\n" * 300)
    sources = [tmp_path / "a.txt", tmp_path / "b.txt"]
    corpus = Corpus.read(sources, tokenizer, folder=tmp_path / "cache", block=32)
    texts = [tokenizer.decode(row) for row in corpus.guard(32).tokens.tolist()]
    assert "a fox" in texts[0] and "b fox" in texts[-1]
    assert corpus.digest == Corpus.read(sources, tokenizer, folder=tmp_path / "cache", block=32).digest
    others = (
        Corpus.read(sources[::-1], tokenizer, folder=tmp_path / "cache", block=32),
        Corpus.read(sources, tokenizer, [1, 2], folder=tmp_path / "cache", block=32),
        Corpus.read(sources, tokenizer, limit=99, folder=tmp_path / "cache", block=32),
        Corpus.read(sources, tokenizer, folder=tmp_path / "cache", block=16),
    )
    assert len({corpus.digest, *(other.digest for other in others)}) == 5

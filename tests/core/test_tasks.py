"""Every task against what it promises: one right answer, the length, the distance, the depth, the same every time."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memc.errors import MemcError
from memc.evaluate.tasks import DEPTHS, TASKS, Words, parse_tasks
from memc.evaluate.tasks.tokens import AssociativeRecall, Copy, JointRecall
from tests.core.runtime_fakes import VOCAB, byte_tokenizer, metaspace_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "metaspace": metaspace_tokenizer()}
SPECIAL = frozenset([0, 1])
BARE = Words(VOCAB, SPECIAL)
TEXT = ("passkey", "needle_single", "needle_multikey", "needle_multivalue", "needle_multiquery", "variable_tracking")
LISTS = ("common_words", "frequent_words")
LENGTH = 1801


def words(kind="bytes", start=(0,)):
    tokenizer = TOKENIZERS[kind]
    return Words(tokenizer.get_vocab_size(), SPECIAL, start, tokenizer)


def read(sample, kind="bytes"):
    """Return the text before the first question, the text of each question, and of each answer."""
    decode = TOKENIZERS[kind].decode
    first = sample.questions[0].ask
    asked = [decode(sample.ids[q.ask : q.start].tolist()) for q in sample.questions]
    answers = [decode(sample.ids[q.start : q.stop].tolist()).strip() for q in sample.questions]
    return decode(sample.ids[:first].tolist()), asked, answers


@pytest.mark.parametrize("name", TASKS)
def test_length_range_and_determinism(name):
    offered = words() if name in (*TEXT, *LISTS) else BARE
    (task,) = parse_tasks({"copy": "copy:asked=5"}.get(name, name))
    length = 201 if name == "copy" else LENGTH
    made, again = (task.samples(offered, length, 2, 7) for _ in range(2))
    other = task.samples(offered, length, 2, 8)
    assert len(made) == 2 * len(task.depths)
    for sample, same, different in zip(made, again, other, strict=True):
        assert len(sample.ids) == length and sample.ids.dtype == np.int64
        assert (sample.ids[len(offered.start) :] < offered.vocab).all()
        assert not np.isin(sample.ids[len(offered.start) :], list(SPECIAL)).any()
        assert tuple(sample.ids[: len(offered.start)]) == offered.start
        np.testing.assert_array_equal(sample.ids, same.ids)
        assert sample.questions == same.questions
        assert not np.array_equal(sample.ids, different.ids)
    assert len({sample.ids.tobytes() for sample in made}) == len(made)


@given(
    st.integers(1, 12),
    st.integers(0, 90),
    st.floats(0.01, 2.0),
    st.integers(1, 3),
    st.sampled_from([8192, 101]),
    st.integers(0, 40),
    st.integers(0, 99),
)
def test_associative_recall(pairs, gap, power, passes, vocab, more, seed):
    task = AssociativeRecall(pairs=pairs, gap=gap, power=power, passes=passes, vocab=vocab)
    body = 2 * pairs * passes
    length = 1 + body + 2 * pairs + max(gap - 2, 0) + more
    (sample,) = task.samples(Words(VOCAB, SPECIAL, (0,)), length, 1, seed)
    ids = sample.ids
    used = min(vocab, VOCAB - len(SPECIAL))
    half = used // 2 + len(SPECIAL)
    assert ids.max() < used + len(SPECIAL)
    assert len(sample.questions) == pairs
    for q in sample.questions:
        assert q.start == q.ask + 1 and q.stop == q.start + 1
        told = np.flatnonzero(ids[: q.ask] == ids[q.ask])
        assert len(told) == passes and told[-1] < 1 + body, "a key stands in the pairs alone and is no filler"
        assert (ids[told + 1] == ids[q.start]).all()
        assert ids[q.ask] < half <= ids[q.start]
        assert q.start - (told[-1] + 1) >= gap
    assert len({int(ids[q.start]) for q in sample.questions}) == pairs
    with pytest.raises(MemcError, match="needs") as caught:
        task.samples(BARE, body + 2 * pairs + max(gap - 2, 0) - 1, 1, seed)
    assert caught.value.code == "E200"


def test_associative_recall_draws_near_slots_more_often_than_far_ones():
    def far(power):
        samples = AssociativeRecall(pairs=4, power=power).samples(BARE, 300, 40, 0)
        return np.mean([q.ask for sample in samples for q in sample.questions])

    assert far(0.01) + 30 < far(1.0) < far(3.0)


def test_joint_recall_needs_both_keys():
    task = JointRecall(contexts=3, keys=5, queries=6)
    for sample in task.samples(BARE, 120, 5, 0):
        ids, block = sample.ids, 11
        table, by_key = {}, {}
        for c in range(3):
            part = ids[c * block : (c + 1) * block]
            for key, value in zip(part[1::2], part[2::2], strict=True):
                table[int(part[0]), int(key)] = int(value)
                by_key.setdefault(int(key), set()).add(int(value))
        assert len(table) == 15 and all(len(values) == 3 for values in by_key.values())
        assert len(sample.questions) == 6 and sample.questions[-1].stop == len(ids)
        for q in sample.questions:
            context, key, value = ids[q.ask : q.stop].tolist()
            assert table[context, key] == value
        assert len({tuple(ids[q.ask : q.start]) for q in sample.questions}) == 6
        fillers = ids[3 * block : sample.questions[0].ask]
        assert not np.isin(fillers, [number for pair in table for number in pair]).any()


@pytest.mark.parametrize("length", [40, 41])
def test_copy_repeats_at_half_the_length(length):
    (sample,) = Copy(asked=6).samples(Words(VOCAB, SPECIAL, (0,)), length, 1, 0)
    size = (length - 1) // 2
    assert [q.start for q in sample.questions] == list(range(length - 6, length))
    np.testing.assert_array_equal(sample.ids[-size:], sample.ids[1 : 1 + size])
    once = sample.ids[1 : length - size]
    assert len(set(once.tolist())) == len(once)
    with pytest.raises(MemcError, match="needs 15 tokens"):
        Copy(asked=6).samples(Words(VOCAB, SPECIAL, (0,)), 14, 1, 0)
    Copy(asked=6).samples(Words(VOCAB, SPECIAL, (0,)), 15, 1, 0)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_passkey_is_told_at_its_depth(kind):
    (task,) = parse_tasks("passkey")
    for depth, sample in zip(DEPTHS, task.samples(words(kind), LENGTH, 1, 3), strict=True):
        before, asked, (answer,) = read(sample, kind)
        assert re.fullmatch("[0-9]{5}", answer)
        assert set(re.findall("[0-9]+", before)) == {answer}, "one number in the text"
        assert asked[0].rstrip().endswith("he pass key is")
        head, needle = before.index("for it."), before.index(f"he pass key is {answer}")
        hay = len(before) - head - 70
        assert abs((needle - head) / hay - depth) < 0.08
        assert sample.questions[0].depth == depth


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", [name for name in TEXT if name.startswith("needle")])
def test_needles_have_one_answer(name, kind):
    (task,) = parse_tasks(name)
    for sample in task.samples(words(kind), 2500, 3, 1):
        before, asked, answers = read(sample, kind)
        told = {}
        for key, number in re.findall(r"ecret number of the (\w+ \w+) is ([0-9]+)\.", before):
            told.setdefault(key, []).append(number)
        assert len(told) == task.keys and all(len(numbers) == task.values for numbers in told.values())
        assert len({number for numbers in told.values() for number in numbers}) == task.keys * task.values
        asked_for = re.findall(r"of the (\w+ \w+)(?:,| is)", " ".join(asked))
        assert len(asked_for) == len(set(asked_for)) == task.queries
        assert answers == [number for key in asked_for for number in told[key]]
        assert {q.depth for q in sample.questions} <= set(DEPTHS)


def test_variables_follow_their_chain():
    (task,) = parse_tasks("variable_tracking:chains=3,hops=4")
    for sample in task.samples(words(), 2500, 4, 1):
        before, asked, answers = read(sample)
        value = re.search("hold the value ([0-9]+)", asked[0])[1]
        held = {}
        for name, number, other in re.findall(r"VAR (\w+) = (?:([0-9]+)|VAR (\w+))\.", before):
            held[name] = number or held[other]  # a KeyError here is a variable read before it is set
        assert len(held) == 15 and answers == [name for name, number in held.items() if number == value]
        assert len(answers) == 5


def test_common_words_are_the_common_ones():
    (task,) = parse_tasks("common_words")
    for sample in task.samples(words(), 2500, 3, 1):
        before, _, answers = read(sample)
        counts = Counter(re.findall("[a-z]+-[a-z]+", before))
        assert {counts[word] for word in answers} == {8} and len(set(answers)) == 5
        assert max(count for word, count in counts.items() if word not in answers) <= 2
        assert answers == sorted(answers, key=before.index)


def test_frequent_words_are_in_order():
    (task,) = parse_tasks("frequent_words")
    for length in (700, 1800, 4000):
        for sample in task.samples(words(), length, 3, 1):
            before, _, answers = read(sample)
            counts = Counter(re.findall(r"\b[a-z]{6}\b", before.partition("list:")[2]))
            first = counts.most_common(4)
            assert [word for word, _ in first[:3]] == answers
            assert first[0][1] > first[1][1] > first[2][1] > first[3][1]


@given(st.sampled_from([*TEXT, *LISTS]), st.integers(0, 200), st.integers(0, 99), st.sampled_from(sorted(TOKENIZERS)))
def test_text_fits_every_length(name, more, seed, kind):
    (task,) = parse_tasks(name)
    with pytest.raises(MemcError) as caught:
        task.samples(words(kind), 50, 1, seed)
    assert caught.value.code == "E200"
    needed = int(re.search(r"needs (\d+) tokens", str(caught.value))[1])
    # The least length is that of the first sample; what the others draw may be a little longer.
    for sample in task.samples(words(kind), needed + 40 + more, 1, seed):
        assert len(sample.ids) == needed + 40 + more


def test_specs_round_trip():
    tasks = parse_tasks("passkey, mqar:pairs=8,gap=128,copy,needle_multikey:keys=9")
    assert [task.spec for task in tasks] == ["passkey", "mqar:pairs=8,gap=128", "copy", "needle_multikey:keys=9"]
    assert parse_tasks(",".join(task.spec for task in tasks)) == tasks
    assert len(parse_tasks("copy,copy")) == 1
    chances = {task.name: task.chance for task in tasks}
    assert chances == {"passkey": None, "mqar": 1 / 8, "copy": None, "needle_multikey": 1 / 9}


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("pasky", "E202", "did you mean 'passkey'?"),
        ("", "E202", "known: common_words"),
        ("mqar:pears=3", "E203", "task 'mqar' has no option 'pears'"),
        ("mqar:pairs=0", "E203", "at least 1"),
        ("mqar:pairs", "E203", "write mqar:pairs=VALUE"),
        ("gap=3", "E202", "unknown task 'gap=3'"),
    ],
)
def test_bad_specs(text, code, said):
    with pytest.raises(MemcError) as caught:
        parse_tasks(text)
    assert caught.value.code == code and said in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "offered", "code", "said"),
    [
        ("passkey", BARE, "E308", "no tokenizer"),
        ("copy", Words(40), "E200", "the vocabulary offers 40"),
        ("copy:vocab=30", Words(40), "E200", "the vocabulary offers 30"),
        ("mqar:pairs=30", Words(40), "E200", "the vocabulary offers 20"),
        ("joint_recall:contexts=2,keys=2,queries=5", BARE, "E203", "joint_recall:queries=4"),
        ("needle_multikey:queries=5", words(), "E203", "needle_multikey:queries=4"),
        ("common_words:rare=9", words(), "E203", "no less than"),
        ("common_words:rare=1,often=2,common=1", words("metaspace"), "E200", "has words for fewer than"),
    ],
)
def test_what_cannot_be_made(spec, offered, code, said):
    (task,) = parse_tasks(spec)
    with pytest.raises(MemcError) as caught:
        task.samples(offered, 60_000, 1, 0)
    assert caught.value.code == code and said in str(caught.value)

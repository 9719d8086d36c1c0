"""Asking sessions that answer by a rule: always right, never, with another key's value, or from a window alone."""

import numpy as np
import pytest

from memc.errors import MemcError
from memc.evaluate import free_running, run_tasks
from memc.evaluate.score import ask, words_of
from memc.evaluate.tasks import Question, Sample, parse_tasks
from memc.runtime import Session
from tests.core.runtime_fakes import VOCAB, FakeRunner, byte_tokenizer, make_artifact, make_manifest, make_session


class RuleRunner(FakeRunner):
    """The likeliest token is what a rule says of the tokens so far."""

    def __init__(self, manifest, rule):
        super().__init__(manifest, grows=True)
        self.rule = rule

    def run(self, tokens, positions, state, keep=None, fetched=None):
        self.calls.append(tokens.shape)
        state.tokens = np.concatenate([state.tokens, tokens], 1)
        state.positions = np.concatenate([state.positions, positions], 1)
        keep = np.arange(tokens.shape[1]) if keep is None else keep
        out = np.zeros((len(tokens), len(keep), VOCAB), np.float32)
        for row in range(len(tokens)):
            for place, column in enumerate(keep):
                if (at := positions[row, column]) >= 0:
                    seen = (state.positions[row] >= 0) & (state.positions[row] <= at)
                    out[row, place, self.rule(state.tokens[row][seen])] = 1
        return out


def session_of(folder, rule, **changes):
    if not folder.exists():
        make_artifact(folder, **changes)
    manifest = make_manifest(**{k: v for k, v in changes.items() if k not in ("tokenizer", "files")})
    return Session(folder, manifest, RuleRunner(manifest, rule), chunk=64)


def induction(window=None):
    """Say what followed the last token when it came before, as far back as the window reaches; else nothing (0)."""

    def rule(history):
        reach = history if window is None else history[-window:]
        found = np.flatnonzero(reach[:-1] == history[-1])
        return int(reach[found[-1] + 1]) if len(found) else 0

    return rule


def knowing(samples):
    """Say what comes next in the sample that begins like this."""
    after = {sample.ids[:n].tobytes(): int(sample.ids[n]) for sample in samples for n in range(1, len(sample.ids))}
    return lambda history: after.get(history.tobytes(), 0)  # 0 past the end, where some rows wait for others


def accuracy(session, spec, length=120, samples=6, seed=0):
    (cell,) = run_tasks(session, parse_tasks(spec), [length], samples=samples, seed=seed)
    return cell


def test_induction_recalls_and_a_window_only_within_itself(tmp_path):
    whole = session_of(tmp_path / "out", induction())
    near = session_of(tmp_path / "out", induction(40))
    for spec in ("mqar:pairs=5,gap=50", "copy:asked=8"):
        assert accuracy(whole, spec).accuracy == 1.0
        assert accuracy(near, spec).accuracy == 0.0
    assert 0 < accuracy(near, "mqar:pairs=5,power=1.0").accuracy < 1
    assert accuracy(whole, "joint_recall").accuracy < 0.6, "induction knows the key, not the context"


def test_the_value_of_another_key_is_wrong(tmp_path):
    def wrong(history):
        return int(history[3])  # the value of the second key, whatever is asked

    cell = accuracy(session_of(tmp_path / "out", wrong), "mqar:pairs=5")
    assert (cell.accuracy, cell.chance, cell.questions, cell.samples) == (0.2, 0.2, 30, 6)


@pytest.mark.parametrize("spec", ["passkey", "needle_multivalue", "variable_tracking", "frequent_words"])
def test_who_knows_the_text_is_right_and_one_wrong_token_counts(tmp_path, spec):
    out = tmp_path / "out"
    session = session_of(out, lambda history: 0, tokenizer=byte_tokenizer())
    (task,) = parse_tasks(spec)
    samples = task.samples(words_of(session), 900, 2, 0)
    right = knowing(samples)
    assert all(all(answers) for answers in ask(session_of(out, right), samples))
    last = {len(sample.ids) - 1 for sample in samples}

    def slip(history):
        return right(history) + (len(history) in last)

    for answers in ask(session_of(out, slip), samples):
        assert answers == [True] * (len(answers) - 1) + [False], "the last token of the last answer is wrong"
    first = {sample.questions[0].start for sample in samples}

    def stumble(history):
        return right(history) + (len(history) in first)

    for sample, answers in zip(samples, ask(session_of(out, stumble), samples), strict=True):
        assert sample.questions[0].stop > sample.questions[0].start + 1
        assert answers == [False] + [True] * (len(answers) - 1), "the first token of the first answer is wrong"
    assert not any(any(answers) for answers in ask(session, samples))


def test_what_stands_before_a_question_is_prefilled_and_the_question_stepped(tmp_path):
    samples = [
        Sample(np.arange(1, 31), (Question(10, 13, 15), Question(20, 20, 22))),
        Sample(np.arange(2, 26), (Question(7, 8, 9),)),
    ]
    session = session_of(tmp_path / "out", knowing(samples))
    assert ask(session, samples) == [[True, True], [True]]
    widths = [shape[1] for shape in session.runner.calls]
    # 10 and 7 tokens; 5 steps; then 15 to 20 of the first alone, and 2 steps.
    assert widths == [10, 1, 1, 1, 1, 1, 5, 1, 1]


def test_cells_are_by_depth_with_the_error_of_whole_samples(tmp_path):
    session = session_of(tmp_path / "out", lambda history: 0, tokenizer=byte_tokenizer())
    (task,) = parse_tasks("passkey")
    samples = task.samples(words_of(session), 700, 4, 0)
    known = [s for s in samples if s.questions[0].depth == 0.5] + samples[:1]
    right = knowing(samples)
    after = {s.ids[:n].tobytes() for s in known for n in range(1, len(s.ids))}
    session = session_of(tmp_path / "out", lambda h: right(h) if h.tobytes() in after else 0)
    cells = run_tasks(session, [task], [700], samples=4, seed=0)
    assert [(cell.depth, cell.accuracy, cell.samples) for cell in cells] == [
        (0.0, 0.25, 4), (0.25, 0.0, 4), (0.5, 1.0, 4), (0.75, 0.0, 4), (1.0, 0.0, 4)
    ]  # fmt: skip
    # The standard error of a mean: the deviation of (1, 0, 0, 0), 0.5, over the root of 4.
    assert [cell.stderr for cell in cells] == [0.25, 0, 0, 0, 0]
    assert accuracy(session, "mqar:pairs=2", samples=1).stderr is None


def test_tokens_that_no_text_has_are_never_used(tmp_path):
    config = {"tokenizer_config.json": {"bos_token": "<s>", "add_bos_token": True}}
    tokenizer = byte_tokenizer()
    session = session_of(tmp_path / "out", induction(), tokenizer=tokenizer, files=config)
    words = words_of(session)
    assert words.start == (0,) and words.vocab == VOCAB
    assert set(words.plain.tolist()) == set(range(3, tokenizer.get_vocab_size()))


def test_refusals(tmp_path):
    small = session_of(tmp_path / "small", induction(), capacity=100)
    encoder = make_session(tmp_path / "encoder", decoder=False)
    unknown = make_session(tmp_path / "unknown", vocab_size=None)
    poisoned = make_session(tmp_path / "poisoned", poison=3)
    tasks = parse_tasks("mqar:pairs=2")
    for code, session, length in (
        ("E206", small, 101),
        ("E208", encoder, 50),
        ("E208", unknown, 50),
        ("E200", small, 6),
    ):
        with pytest.raises(MemcError) as caught:
            run_tasks(session, tasks, [length], samples=1)
        assert caught.value.code == code, caught.value
    run_tasks(small, tasks, [100], samples=1)
    with pytest.raises(MemcError) as caught:
        ask(poisoned, [Sample(np.array([5, 3, 4]), (Question(1, 2, 3),))])
    assert caught.value.code == "E403"


def counting(history):
    return (int(history[-1]) + 1) % VOCAB


def placed(history):
    return (int(history[0]) + len(history)) % VOCAB


def test_free_running_finds_the_first_difference(tmp_path):
    def stumbling(history):
        return 7 if len(history) == 30 and history[0] == 0 else counting(history)

    ids = np.arange(100) % VOCAB
    a, b = session_of(tmp_path / "out", stumbling), session_of(tmp_path / "out", counting)
    got = free_running(a, b, ids, prompt_tokens=20, new_tokens=40, prompts=3)
    # The prompts start at 0, 40 and 80; the first goes wrong at its eleventh new token and never comes back.
    assert got.first_difference == [10, 40, 40]
    assert (got.equal_before, got.equal) == (90 / 120, 90 / 120)
    same = free_running(b, b, ids, prompt_tokens=20, new_tokens=40)
    assert (same.prompts, same.equal_before, same.equal, same.first_difference) == (5, 1, 1, [40] * 5)

    def slip(history):
        return 399 if len(history) == 30 else placed(history)

    # One wrong token and then right again: only the share before the first difference shows what it would have cost.
    back = free_running(
        session_of(tmp_path / "out", slip), session_of(tmp_path / "out", placed), ids, prompt_tokens=20, new_tokens=40
    )
    assert (back.first_difference, back.equal_before, back.equal) == ([10] * 5, 0.25, 39 / 40)


def test_free_running_refusals(tmp_path):
    session = session_of(tmp_path / "out", counting, capacity=50)
    for code, tokens, prompt, new in (("E207", 19, 20, 5), ("E206", 40, 20, 31)):
        with pytest.raises(MemcError) as caught:
            free_running(session, session, np.arange(tokens), prompt_tokens=prompt, new_tokens=new)
        assert caught.value.code == code

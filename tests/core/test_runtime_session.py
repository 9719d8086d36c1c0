"""States, prefill, step, fork, save and load; what goes in and the errors of it."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

import memc
from memc import plugins
from memc.errors import MemcError
from memc.runtime import load
from tests.core.runtime_fakes import VOCAB, make_artifact, make_session

RNG = np.random.default_rng(5)
ROWS = [RNG.integers(0, VOCAB, size).tolist() for size in (7, 1, 12)]
BOTH = pytest.mark.parametrize("grows", [False, True])


def refused(code, call, *args, **kwargs):
    with pytest.raises(MemcError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return str(caught.value)


def test_importing_it_loads_no_torch():
    code = "import sys, memc, memc.data, memc.evaluate.measure, memc.runtime; memc.load; memc.Session; "
    code += "sys.exit(str({'torch', 'transformers'} & set(sys.modules)).replace('set()', ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.stderr.strip(), done.stderr


@BOTH
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_any_chunking_gives_the_same(tmp_path, grows, chunk):
    whole = make_session(tmp_path, grows=grows)
    parts = make_session(tmp_path, grows=grows, chunk=chunk)
    np.testing.assert_array_equal(parts.logits(ROWS), whole.logits(ROWS))
    np.testing.assert_array_equal(parts.prefill(ROWS, parts.new_state(3)), whole.prefill(ROWS, whole.new_state(3)))
    assert max(width for width, _ in parts.runner.calls) == chunk


@BOTH
def test_a_batch_of_mixed_lengths_equals_one_at_a_time(tmp_path, grows):
    session = make_session(tmp_path, grows=grows, chunk=4)
    state = session.new_state(3)
    last = session.prefill(ROWS, state)
    after = session.step([5, -1, 6], state)
    everything = session.logits(ROWS)
    for index, row in enumerate(ROWS):
        alone = session.new_state()
        np.testing.assert_array_equal(session.prefill(row, alone)[0], last[index])
        expected = last[index] if index == 1 else session.step([5 if index == 0 else 6], alone)[0]
        np.testing.assert_array_equal(after[index], expected)
        np.testing.assert_array_equal(session.logits([row])[0], everything[index, : len(row)])
        assert not everything[index, len(row) :].any()
    assert state.lengths.tolist() == [8, 1, 13]


@BOTH
def test_prefill_in_turns_and_steps_equal_one_prefill(tmp_path, grows):
    session = make_session(tmp_path, grows=grows, chunk=3)
    row = ROWS[2]
    expected = session.prefill(row, session.new_state())
    state = session.new_state()
    session.prefill(row[:5], state)
    session.prefill([row[5:7]], state)
    for number in row[7:]:
        last = session.step(np.array([number]), state)
    np.testing.assert_array_equal(last, expected)


def test_prefill_asks_for_last_tokens_only(tmp_path):
    session = make_session(tmp_path, chunk=4)
    session.prefill(ROWS, session.new_state(3))
    # Rows end in columns 6, 0 and 11: one in the first chunk, one in the second, one in the third.
    assert session.runner.calls == [(4, 1), (4, 1), (4, 1)]
    session.runner.calls.clear()
    session.prefill([ROWS[2], ROWS[2]], session.new_state(2))
    assert session.runner.calls == [(4, 1), (4, 1), (4, 1)]


def test_logit_chunks_hold_one_chunk(tmp_path):
    session = make_session(tmp_path, chunk=5)
    pieces = list(session.logit_chunks(ROWS[2]))
    assert [(start, piece.shape) for start, piece in pieces] == [
        (0, (1, 5, VOCAB)),
        (5, (1, 5, VOCAB)),
        (10, (1, 2, VOCAB)),
    ]


@BOTH
def test_a_fork_is_independent(tmp_path, grows):
    session = make_session(tmp_path, grows=grows)
    state = session.new_state(2)
    session.prefill(ROWS[:2], state)
    fork = session.fork(state)
    first = session.step([1, 2], state)
    session.step([9, 9], fork)
    np.testing.assert_array_equal(session.step([3, 4], state), _run(session, [[*ROWS[0], 1, 3], [*ROWS[1], 2, 4]]))
    np.testing.assert_array_equal(fork.last, _run(session, [[*ROWS[0], 9], [*ROWS[1], 9]]))
    rows = session.fork(fork, [1, 0, 1])
    assert rows.batch == 3 and rows.lengths.tolist() == [2, 8, 2]
    np.testing.assert_array_equal(session.step([8, 8, 7], rows)[0], _run(session, [[*ROWS[1], 9, 8]])[0])
    first[:] = 0  # what is returned is a copy
    assert state.last.any()


def _run(session, rows):
    return session.prefill(rows, session.new_state(len(rows)))


@BOTH
def test_save_and_load(tmp_path, grows):
    session = make_session(tmp_path / "out", grows=grows)
    state = session.new_state(3)
    session.prefill(ROWS, state)
    session.save(state, tmp_path / "state.safetensors")
    again = session.load_state(tmp_path / "state.safetensors")
    np.testing.assert_array_equal(again.last, state.last)
    np.testing.assert_array_equal(session.step([1, 2, 3], again), session.step([1, 2, 3], state))
    fresh = session.new_state(2)
    session.save(fresh, tmp_path / "fresh")
    assert session.load_state(tmp_path / "fresh").last is None


def test_load_state_refuses(tmp_path):
    session = make_session(tmp_path / "out", grows=True, capacity=64)
    state = session.new_state()
    session.prefill(ROWS[0], state)
    path = tmp_path / "state"
    session.save(state, path)
    refused("E309", session.load_state, tmp_path / "missing")
    (tmp_path / "broken").write_bytes(path.read_bytes()[:20])
    refused("E309", session.load_state, tmp_path / "broken")
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2)}, tmp_path / "other")
    refused("E309", session.load_state, tmp_path / "other")
    other = make_session(tmp_path / "out2", grows=True, capacity=64, source_digest="1")
    refused("E402", other.load_state, path)
    refused("E206", session.load_state, path, capacity=3)
    assert session.load_state(path, capacity=9).capacity == 9
    refused("E502", session.save, state, tmp_path / "no" / "folder")


def test_a_damaged_state_is_refused_wherever_the_damage_is(tmp_path):
    session = make_session(tmp_path / "out", grows=True, capacity=64)
    state = session.new_state()
    session.prefill(ROWS[0], state)
    path = tmp_path / "state"
    session.save(state, path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    places = range(data, len(whole), max(1, (len(whole) - data) // 40))
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert "changed" in refused("E402", session.load_state, path)
    path.write_bytes(whole)
    np.testing.assert_array_equal(session.step([1], session.load_state(path)), session.step([1], state))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "state"]


def test_a_state_without_a_digest_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    session = make_session(tmp_path / "out")
    session.save(session.new_state(), tmp_path / "state")
    with safe_open(tmp_path / "state", framework="np") as file:
        metadata = file.metadata()
    arrays = load_file(tmp_path / "state")
    save_file(arrays, tmp_path / "older", metadata={**metadata, "schema": "memc.state/1"})
    assert "prefill again" in refused("E309", session.load_state, tmp_path / "older")
    del metadata["arrays"]
    save_file(arrays, tmp_path / "bare", metadata=metadata)
    refused("E402", session.load_state, tmp_path / "bare")


def test_a_state_of_another_session_is_refused(tmp_path):
    session, other = make_session(tmp_path, grows=True), make_session(tmp_path, grows=True)
    state = session.new_state()
    session.prefill(ROWS[0], state)
    before = state.lengths.copy()
    for call, *args in (
        (other.prefill, [[1]]),
        (other.step, [1]),
        (other.generate, [1]),
        (other.fork,),
        (other.save,),
    ):
        options = {"state": state} if call == other.generate else {}
        given = [*args, *([] if options else [state]), *([tmp_path / "file"] if call == other.save else [])]
        assert "another session" in refused("E200", call, *given, **options)
    np.testing.assert_array_equal(state.lengths, before)
    session.save(state, tmp_path / "file")
    np.testing.assert_array_equal(
        other.step([1], other.load_state(tmp_path / "file")), session.step([1], session.fork(state))
    )


@pytest.mark.parametrize("wrong", [None, 3, "x", [1]])
def test_what_is_no_state_is_refused(tmp_path, wrong):
    session = make_session(tmp_path)
    for call in (
        lambda: session.fork(wrong),
        lambda: session.prefill([[1]], wrong),
        lambda: session.step([1], wrong),
        lambda: session.save(wrong, tmp_path / "file"),
    ):
        assert str(wrong)[:4] in refused("E200", call)


@pytest.mark.parametrize("rows", [[1], [-1], [], ["a"], [0.0], 5])
def test_rows_that_a_state_does_not_have_are_refused(tmp_path, rows):
    session = make_session(tmp_path)
    refused("E200", session.fork, session.new_state(), rows)


def test_what_is_no_path_is_refused(tmp_path):
    session = make_session(tmp_path)
    for wrong in (None, 3, b"bytes"):
        refused("E200", load, wrong)
        refused("E200", session.load_state, wrong)
        refused("E200", session.save, session.new_state(), wrong)


def test_capacity(tmp_path):
    session = make_session(tmp_path, grows=True, capacity=10)
    message = refused("E206", session.prefill, ROWS[2], session.new_state())
    assert "12" in message and "10" in message and "--context 12" in message
    refused("E206", session.logits, ROWS)
    refused("E206", session.new_state, 1, 11)
    state = session.new_state(2, capacity=7)
    session.prefill(ROWS[:2], state)
    session.step([-1, 5], state)
    refused("E206", session.step, [5, -1], state)
    # A state of constant size has no room to run out of.
    steady = make_session(tmp_path)
    assert steady.new_state(1, capacity=3).capacity is None


def test_a_sequence_past_the_training_is_warned_of_once(tmp_path):
    session = make_session(tmp_path, trained_positions=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.logits(ROWS[0])
        state = session.new_state()
        session.prefill(ROWS[0], state)
        session.step([1], state)
        session.step([1], state)
        assert session.beyond_trained(9) == ""
    with pytest.warns(UserWarning, match="beyond_trained: 10 tokens are past the 9 positions") as told:
        session.step([1], state)
        session.step([1], state)
        session.logits(ROWS[2])
    assert len(told) == 1
    with pytest.warns(UserWarning, match="12 tokens"):
        make_session(tmp_path, trained_positions=9).logits(ROWS[2])


def test_bad_ids(tmp_path):
    session = make_session(tmp_path)
    refused("E205", session.logits, [])
    refused("E205", session.logits, [[1], []])
    refused("E205", session.prefill, [[1], []], session.new_state(2))
    refused("E205", session.step, [-1], session.new_state())
    assert str(VOCAB) in refused("E200", session.logits, [[0, VOCAB]])
    refused("E200", session.prefill, [[-1]], session.new_state())
    refused("E200", session.prefill, [[1], [2]], session.new_state())
    for wrong in ([[1.5]], [["x"]], [[2**70]], [[True]], np.zeros((1, 2, 2), np.int64)):
        refused("E200", session.prefill, wrong, session.new_state())
    refused("E200", session.step, [1.5], session.new_state())
    for wrong in (3, "x", np.array(5), object()):
        refused("E200", session.logits, wrong)
        refused("E200", session.prefill, wrong, session.new_state())
        refused("E200", session.step, wrong, session.new_state())
    refused("E200", session.prefill, None, session.new_state())
    refused("E200", session.new_state, 0)
    refused("E200", session.new_state, 1, 0)


def test_an_encoder_gives_logits_and_refuses_the_rest_by_name(tmp_path):
    session = make_session(tmp_path, decoder=False, family="bert", states=[], chunk=2)
    assert session.logits(ROWS).shape == (3, 12, VOCAB)
    # Whole, for an encoder reads what comes later, and rows of one length together, for it would read padding too.
    assert session.runner.calls == [(1, 1), (7, 7), (12, 12)]
    for call, args in ((session.generate, ([1],)), (session.stream, ([1],)), (session.new_state, ())):
        assert "bert" in refused("E208", call, *args)


def test_load(tmp_path, monkeypatch):
    monkeypatch.setitem(plugins.BUILTIN["memc.backends"], "fake", "tests.core.runtime_fakes:FakeBackend")
    plugins.registered.cache_clear()
    try:
        out = make_artifact(tmp_path / "out")
        session = load(out, threads=1, verify=True)
        assert session.logits([[1, 2]]).shape == (1, 2, VOCAB) and session.capacity is None
        assert isinstance(memc.load(str(out)), memc.Session)
        for threads in (0, 1.5, "2", 10**14):
            refused("E200", load, out, threads=threads)
        refused("E200", load, out, chunk=0)
        refused("E309", load, tmp_path / "nothing")
        (out / "lowered/fake/model.bin").write_bytes(b"altered")
        load(out)
        refused("E402", load, out, verify=True)
        refused("E202", load, make_artifact(tmp_path / "out2", backend="fakke"))
    finally:
        plugins.registered.cache_clear()

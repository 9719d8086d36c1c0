"""Generation: text in and out, stops, streaming, chat, seeds, and every error of them."""

import numpy as np
import pytest

from memc.errors import MemcError
from memc.runtime.text import Text, TextStream
from tests.core.runtime_fakes import VOCAB, byte_tokenizer, make_artifact, make_session, metaspace_tokenizer

BYTES, MARKS = byte_tokenizer(), metaspace_tokenizer()
PROMPTS = ["the quick", "naïve 😀 dog", "a"]


def refused(code, call, *args, **kwargs):
    with pytest.raises(MemcError) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return str(caught.value)


@pytest.fixture
def session(tmp_path):
    return make_session(tmp_path, tokenizer=BYTES, vocab_size=None)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_generate_is_prefill_then_steps(tmp_path, grows, temperature):
    session = make_session(tmp_path, grows=grows, chunk=4, tokenizer=BYTES)
    batch = session.generate(PROMPTS, max_new_tokens=9, temperature=temperature, seed=11)
    for index, (prompt, got) in enumerate(zip(PROMPTS, batch, strict=True)):
        alone = session.generate(prompt, max_new_tokens=9, temperature=temperature, seed=11 + index)
        assert (alone.ids, alone.text, alone.seed) == (got.ids, got.text, got.seed)
        assert (
            session.generate(session.encode(prompt), max_new_tokens=9, temperature=temperature, seed=11 + index).ids
            == got.ids
        )
        if temperature == 0:
            ids = session.encode(prompt)
            for number in got.ids:
                assert session.logits(ids)[0, -1].argmax() == number
                ids.append(number)
        assert got.finish_reason == "length" and len(got.ids) == 9 and got.prompt_tokens == len(session.encode(prompt))


def test_timing_and_bytes(session):
    got = session.generate(PROMPTS, max_new_tokens=5)
    timing = got[0].timing
    assert timing.prefill_tokens == sum(len(session.encode(prompt)) for prompt in PROMPTS)
    assert timing.decode_tokens == 12 and timing.decode_tokens_per_s > 0 and timing.prefill_tokens_per_s > 0
    assert got[0].state_bytes > 0
    assert session.generate("a", max_new_tokens=1).timing.decode_tokens_per_s is None


def test_seeds(session):
    first, again, other = (session.generate("the", temperature=1.5, seed=s, max_new_tokens=12).ids for s in (1, 1, 2))
    assert first == again != other
    fresh = session.generate("the", temperature=1.5, max_new_tokens=12)
    assert session.generate("the", temperature=1.5, max_new_tokens=12, seed=fresh.seed).ids == fresh.ids
    assert session.generate("the", temperature=1.5, max_new_tokens=12).ids != fresh.ids


def test_stop_tokens(tmp_path):
    plain = make_session(tmp_path / "plain", tokenizer=BYTES)
    ids = plain.generate("the quick", max_new_tokens=12).ids
    end = next(n for n, number in enumerate(ids) if n >= 2 and number not in ids[:n])
    for name, config in (("one", ids[end]), ("many", [VOCAB - 1, ids[end]])):
        session = make_session(
            tmp_path / name, tokenizer=BYTES, files={"generation_config.json": {"eos_token_id": config}}
        )
        got = session.generate("the quick", max_new_tokens=12)
        assert got.ids == ids[: end + 1] and got.finish_reason == "stop"
        assert got.text == plain.decode(ids[:end])
    assert plain.generate("the quick", max_new_tokens=12, stop=ids[end]).ids == ids[: end + 1]
    assert plain.generate("the quick", max_new_tokens=12, stop=[ids[end], "zzzz"]).ids == ids[: end + 1]
    both = plain.generate(["the quick", "a"], max_new_tokens=12, stop=ids[end])
    assert both[0].ids == ids[: end + 1] and both[1].ids == plain.generate("a", max_new_tokens=12, stop=ids[end]).ids


def test_end_of_text_of_the_tokenizer(tmp_path):
    config = {"tokenizer_config.json": {"eos_token": {"content": "</s>"}}}
    assert make_session(tmp_path / "a", tokenizer=BYTES, files=config).text.stop_ids == {1}
    assert make_session(tmp_path / "b", files=config).text.stop_ids == frozenset()


def test_stop_texts(session):
    whole = session.generate("the quick", max_new_tokens=30).text
    stop = whole[11:14]
    for stops in (stop, ["never there", stop], [stop, whole[12:15]]):
        got = session.generate("the quick", max_new_tokens=30, stop=stops)
        assert got.text == whole[: whole.index(stop)] and got.finish_reason == "stop" and len(got.ids) < 30
        assert "".join(session.stream("the quick", max_new_tokens=30, stop=stops)) == got.text
    # A beginning of a stop text that never completes comes out at the end.
    assert session.generate("the quick", max_new_tokens=30, stop=whole[-2:] + "\0").text == whole


def test_stream_equals_generate(session):
    for prompt in PROMPTS:
        got = session.generate(prompt, max_new_tokens=40, temperature=1.0, seed=3)
        pieces = list(session.stream(prompt, max_new_tokens=40, temperature=1.0, seed=3))
        assert "".join(pieces) == got.text and all(pieces) and len(pieces) > 5
        assert got.text == session.decode(got.ids)
    heard = {}
    batch = session.generate(
        PROMPTS, max_new_tokens=9, on_text=lambda row, piece: heard.setdefault(row, []).append(piece)
    )
    assert ["".join(heard[row]) for row in range(3)] == [one.text for one in batch]


@pytest.mark.parametrize("tokenizer", [BYTES, MARKS])
@pytest.mark.parametrize("text", ["the dog, 東京 😀😀 ünd the end", " two  spaces", "é", "a the 👩‍👩‍👧 a"])
def test_decoding_piece_by_piece(tmp_path, tokenizer, text):
    # Metaspace marks stand for a space: the first word of a text has one that decoding drops, but not in its middle.
    reader = Text(make_artifact(tmp_path, tokenizer))
    ids = reader.encode(text)
    for cut in range(len(ids)):
        before = reader.decode(ids[:cut])
        stream = TextStream(reader, ids[:cut])
        pieces = [stream.push(number) for number in ids[cut:]]
        pieces.append(stream.finish())
        assert "\ufffd" not in "".join(pieces)
        if "\ufffd" not in before:
            assert before + "".join(pieces) == reader.decode(ids)
        assert not pieces[-1] or cut == len(ids)


def test_special_tokens_and_broken_bytes_in_a_stream(tmp_path):
    reader = Text(make_artifact(tmp_path, MARKS))
    the = reader.encode("a the")
    stream = TextStream(reader, the)
    assert [stream.push(number) for number in (0, *reader.encode("the"))] == ["", " the"]
    broken = [2 + 0xE6] * 40
    stream = TextStream(reader, the)
    pieces = [stream.push(number) for number in broken] + [stream.finish()]
    assert set("".join(pieces)) == {"\ufffd"} and len("".join(pieces)) == 40
    assert max(map(len, pieces)) <= 16


def test_states_go_on(session):
    state = session.new_state()
    ids = session.encode("the quick fox")
    session.prefill(ids[:3], state)
    fork = session.fork(state)
    assert session.generate(ids[3:], state=fork, max_new_tokens=6).ids == session.generate(ids, max_new_tokens=6).ids
    assert fork.lengths.tolist() == [len(ids) + 5] and state.lengths.tolist() == [3]
    refused("E200", session.generate, ["a", "b"], state=state)


def test_starting_tokens(tmp_path):
    ids = BYTES.encode("a dog").ids
    for number, (config, expected) in enumerate(
        [
            ({"bos_token": "<s>", "add_bos_token": True}, [0, *ids]),
            ({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}, [0, *ids, 1]),
            ({"bos_token": "<s>", "add_bos_token": False}, ids),
            ({"bos_token": None, "add_bos_token": True}, ids),
            ({"bos_token": "<s>"}, ids),
        ]
    ):
        session = make_session(tmp_path / str(number), tokenizer=BYTES, files={"tokenizer_config.json": config})
        assert session.encode("a dog") == expected


TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m.role not in ('user', 'system', 'assistant') %}{{ raise_exception('role ' + m.role) }}{% endif %}
<|user|>{{ m['content'] | trim }} {{ {'é': '<'} | tojson }}
{% generation %}x{% endgeneration %}
{% if loop.last %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|user|>' }}{{ strftime_now('') }}{% endif %}"""
RENDERED = '<s><|user|>Hi {"é": "<"}\nx<|user|>'


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"bos_token": "<s>", "chat_template": "no"}},
        {"tokenizer_config.json": {"bos_token": "<s>", "chat_template": TEMPLATE}},
        {
            "tokenizer_config.json": {
                "bos_token": {"content": "<s>"},
                "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}],
            }
        },
    ],
)
def test_chat(tmp_path, files):
    session = make_session(tmp_path, tokenizer=BYTES, files=files)
    assert session.text.chat([{"role": "user", "content": " Hi "}]) == RENDERED
    got = session.generate(" Hi ", chat=True, max_new_tokens=4)
    ids = BYTES.encode(RENDERED, add_special_tokens=False).ids
    assert got.ids == session.generate(ids, max_new_tokens=4).ids and got.prompt_tokens == len(ids)
    messages = [{"role": "user", "content": " Hi "}]
    assert session.generate(messages, chat=True, max_new_tokens=4).ids == got.ids
    assert [g.ids for g in session.generate([messages, messages], chat=True, max_new_tokens=4)] == [got.ids] * 2
    assert "role dog" in refused("E208", session.generate, [{"role": "dog", "content": ""}], chat=True)
    refused("E200", session.generate, messages)
    refused("E200", session.generate, [1, 2], chat=True)


def test_chat_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    out = make_artifact(
        tmp_path, BYTES, {"tokenizer_config.json": {"bos_token": "<s>", "chat_template": TEMPLATE, "eos_token": "</s>"}}
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(out / "tokenizer.json"), bos_token="<s>")
    messages = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "<b>"}]
    expected = theirs.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True)
    assert Text(out).chat(messages) == expected


def test_templates_that_fail(tmp_path):
    templates = ["{% if %}", "{{ messages[0].content + 1 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", None]
    for number, template in enumerate(templates):
        files = {"tokenizer_config.json": {"chat_template": template}}
        session = make_session(tmp_path / str(number), tokenizer=BYTES, files=files)
        refused("E208", session.generate, "a", chat=True)


def test_model_defaults_apply_only_when_asked(tmp_path):
    config = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.9, "eos_token_id": 1}
    session = make_session(tmp_path / "a", tokenizer=BYTES, files={"generation_config.json": config})
    greedy = session.generate("the", max_new_tokens=9, seed=1)
    assert greedy.ids == session.generate("the", max_new_tokens=9, temperature=0).ids
    asked = session.generate("the", max_new_tokens=9, seed=1, model_defaults=True)
    assert asked.ids != greedy.ids
    assert asked.ids == session.generate("the", max_new_tokens=9, seed=1, temperature=2.0, top_k=50, top_p=0.9).ids
    assert session.generate("the", max_new_tokens=9, temperature=0, model_defaults=True).ids == greedy.ids
    session = make_session(tmp_path / "b", tokenizer=BYTES, files={"generation_config.json": {"temperature": 2.0}})
    assert session.generate("the", max_new_tokens=9, model_defaults=True).ids == greedy.ids


def test_prompts_and_options_that_are_refused(tmp_path):
    session = make_session(tmp_path, tokenizer=BYTES, capacity=20)
    for prompt in ("", [], [""], [[]], ["a", ""]):
        refused("E205", session.generate, prompt)
    refused("E205", session.stream, "")
    message = refused("E206", session.generate, [1] * 15, max_new_tokens=6)
    assert all(word in message for word in ("15", "6", "21", "20", "--context 21"))
    assert len(session.generate([1] * 15, max_new_tokens=5).ids) == 5
    refused("E206", session.generate, [[1], [2] * 30], max_new_tokens=1)
    for options in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 2},
        {"seed": -1},
        {"stop": ""},
        {"stop": 3.5},
        {"stop": [None]},
        {"temperature": "hot"},
        {"top_p": "most"},
        {"top_k": 1.5},
        {"seed": 2**63},
        {"max_new_tokens": 10**14},
    ):
        refused("E200", session.generate, "a", **{"max_new_tokens": 4, **options})
    assert "max_new_tokens" in refused("E200", session.generate, "a", max_tokens=4)
    for prompt in (None, 3, [1.5], [None], [1, 1.5], [["a"]], [-1]):
        refused("E200", session.generate, prompt, max_new_tokens=4)
        refused("E200", session.stream, prompt, max_new_tokens=4)
    for ids in (None, 3, ["a"], [-1], [2**40], [1.5]):
        refused("E200", session.decode, ids)
    refused("E200", session.stream, ["a", "b"])


def test_without_a_tokenizer_ids_still_work(tmp_path):
    session = make_session(tmp_path)
    got = session.generate([1, 2, 3], max_new_tokens=4)
    assert got.text is None and len(got.ids) == 4
    for call in (session.generate, session.stream, session.encode):
        assert "tokenizer.json" in refused("E308", call, "text")
    refused("E308", session.generate, [1], stop="text")
    refused("E308", session.stream, [1])
    refused("E308", session.decode, [1])


def test_broken_files(tmp_path):
    session = make_session(tmp_path / "a", files={"tokenizer.json": '{"model"'})
    refused("E302", session.generate, "text")
    for name, content in (("generation_config.json", "{"), ("tokenizer_config.json", "[]")):
        refused("E302", make_session(tmp_path / name, tokenizer=BYTES, files={name: content}).generate, "text")


def test_logits_that_are_not_finite(tmp_path):
    session = make_session(tmp_path, tokenizer=BYTES, poison=5)
    for temperature in (0.0, 1.0):
        refused("E403", session.generate, [4, 5], temperature=temperature)


def test_numpy_ids(session):
    ids = np.array([3, 4, 5])
    assert session.generate(ids, max_new_tokens=3).ids == session.generate([3, 4, 5], max_new_tokens=3).ids

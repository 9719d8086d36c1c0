"""Reading and tokenising text files."""

import json

import numpy as np
import pytest
from tokenizers import processors

from memc import data
from memc.errors import MemcError
from tests.core.runtime_fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_documents(tmp_path):
    text = write(tmp_path / "a.txt", "\ufeffthe dog\r\n東京 😀\n")
    assert list(data.read_documents(text)) == ["the dog\n東京 😀\n"]
    lines = [json.dumps({"text": "a\u2028b", "n": 1}, ensure_ascii=False), "", '{"text": ""}', '{"text": "dog\\n"}']
    assert list(data.read_documents(write(tmp_path / "b.jsonl", "\n".join(lines)))) == ["a\u2028b", "dog\n"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", " \n", "empty"),
        ("binary.txt", b"abc\0def", "binary"),
        ("latin.txt", "caf\u00e9 x".encode("latin-1"), "byte 3"),
        ("bad.jsonl", '{"text": "a"}\n{"text"', "bad.jsonl:2"),
        ("field.jsonl", '{"body": "a"}', "'text'"),
        ("number.jsonl", '{"text": 3}', "'text'"),
        ("list.jsonl", "[1]", "'text'"),
        ("none.jsonl", '{"text": ""}\n', "no text"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(MemcError) as caught:
        data.tokenize([path], TOKENIZER)
    assert caught.value.code == "E207" and words in str(caught.value) and name in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(MemcError) as caught:
        list(data.read_documents(tmp_path))
    assert caught.value.code == "E207"


def test_tokenize(tmp_path):
    files = [write(tmp_path / "a.txt", "the dog\n"), write(tmp_path / "b.jsonl", '{"text": "a fox"}\n{"text": "the"}')]
    expected = [number for text in ("the dog\n", "a fox", "the") for number in TOKENIZER.encode(text).ids]
    got = data.tokenize(files, TOKENIZER)
    assert got.dtype == np.int64 and got.tolist() == expected
    assert data.tokenize(files, TOKENIZER, limit=3).tolist() == expected[:3]
    assert data.tokenize([], TOKENIZER).shape == (0,)


def test_long_documents_go_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 50)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = "the quick brown fox\njumps over\n" * 9 + "x" * 120
    ids = data.tokenize([write(tmp_path / "a.txt", text)], tokenizer).tolist()
    assert ids[0] == 0 and ids[-1] == 1 and not {0, 1} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text
    assert data.tokenize([tmp_path / "a.txt"], tokenizer, limit=7).tolist() == ids[:7]

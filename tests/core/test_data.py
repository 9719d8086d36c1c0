"""Reading and tokenising text files."""

import json
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from tokenizers import processors

from memc import data
from memc.data.sources import PIECE, read_pieces
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
        ("late.txt", b"\xef\xbb\xbf" + b"a" * ((1 << 20) - 4) + "東".encode()[:2], "byte 1048575"),
        ("cut.txt", b"a" * ((1 << 20) - 1) + b"\xe6(", "byte 1048575"),
        ("utf16.txt", "the dog".encode("utf-16"), "UTF-16"),
        ("bad.jsonl", '{"text": "a"}\n{"text"', "bad.jsonl:2"),
        ("field.jsonl", '{"body": "a"}', "'text'"),
        ("number.jsonl", '{"text": 3}', "'text'"),
        ("list.jsonl", "[1]", "'text'"),
        ("half.jsonl", '{"text": "a"}\n{"text": "so \\ud83d it goes"}', "half.jsonl:2"),
        ("deep.jsonl", '{"text": ' + "[" * 200_000, "not JSON"),
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


@pytest.mark.parametrize("dtype", ["<u2", ">i4", "int64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_token_ids_are_taken_as_they_are(tmp_path, dtype, order):
    rows = np.asarray(np.arange(12).reshape(3, 4) % 7, dtype, order)
    np.save(tmp_path / "rows.npy", rows)
    with (tmp_path / "one.NPY").open("wb") as stream:
        np.save(stream, rows[0])
    flat = rows.reshape(-1).tolist()
    text = write(tmp_path / "a.txt", "the dog\n")
    assert data.tokenize([tmp_path / "rows.npy"], None).tolist() == flat
    words = data.tokenize([text], TOKENIZER).tolist()
    both = data.tokenize([text, tmp_path / "rows.npy"], TOKENIZER, limit=len(words) + 6)
    assert both.dtype == np.int64 and both.tolist() == words + flat[:6]
    stream = data.read_tokens(tmp_path / "rows.npy", None, folder=tmp_path / "cache")
    assert [document.tolist() for document in stream.documents()] == rows.tolist()
    assert not (tmp_path / "cache").exists()
    one = data.read_tokens(tmp_path / "one.NPY", None)
    short = data.read_tokens(tmp_path / "rows.npy", None, limit=6)
    assert [document.tolist() for document in one.documents()] == [flat[:4]]
    assert [document.tolist() for document in short.documents()] == [flat[:4], flat[4:6]]
    assert len({stream.digest, one.digest, short.digest}) == 3
    again = data.read_tokens(tmp_path / "rows.npy", None)
    assert again.digest == stream.digest and data.holds_ids(tmp_path / "rows.npy") and not data.holds_ids(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "no array"),
        (b"the dog", "no array"),
        (np.array([{"a": 1}]), "no array"),
        (np.array([0.5]), "float64"),
        (np.array([True]), "bool"),
        (np.zeros((2, 2, 2), int), "[2, 2, 2]"),
        (np.array(3), "int64 []"),
        (np.zeros((0, 4), int), "[0, 4]"),
        (np.array([3, -1]), "-1 is negative"),
    ],
)
def test_arrays_that_are_no_token_ids(tmp_path, content, words):
    path = tmp_path / "a.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    for read in (data.read_ids, lambda path: data.read_tokens(path, None), lambda path: data.tokenize([path], None)):
        with pytest.raises(MemcError) as caught:
            read(path)
        assert caught.value.code == "E207" and words in str(caught.value) and "a.npy" in str(caught.value)


def test_token_ids_cut_short(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(99))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(MemcError, match=r"E207 file is no array"):
        data.read_ids(tmp_path / "a.npy")


def test_long_documents_go_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("memc.data.sources.PIECE", 50)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    text = "the quick brown fox\njumps over\n" * 9 + "x" * 120
    ids = data.tokenize([write(tmp_path / "a.txt", text)], tokenizer).tolist()
    assert ids[0] == 0 and ids[-1] == 1 and not {0, 1} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text
    assert data.tokenize([tmp_path / "a.txt"], tokenizer, limit=7).tolist() == ids[:7]


def test_blocks_and_line_ends_do_not_show(tmp_path, monkeypatch):
    text = "東京 😀\r\nnaïve\rcafé\n\r\n"
    path = write(tmp_path / "a.txt", "\ufeff" + text)
    for size in (3, 4, 5, 7):
        monkeypatch.setattr("memc.data.sources._BLOCK", size)
        assert list(data.read_documents(path)) == ["東京 😀\nnaïve\ncafé\n\n"]


def test_a_large_file_is_never_whole_in_memory(tmp_path):
    path = write(tmp_path / "a.txt", b"the dog and the fox\n" * 1_000_000)
    tracemalloc.start()
    sizes = [len(piece) for document in read_pieces(path) for piece in document]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 20_000_000 and max(sizes) <= PIECE and peak < 8_000_000


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import array, table

    def made(name, **columns):
        parquet.write_table(table(columns), tmp_path / name)
        return tmp_path / name

    words = ["the dog", None, "", "a fox", "a fox"]
    assert list(data.read_documents(made("a.parquet", n=[1] * 5, text=words))) == ["the dog", "a fox", "a fox"]
    coded = made("b.PARQUET", text=array(words).dictionary_encode())
    assert list(data.read_documents(coded)) == ["the dog", "a fox", "a fox"]
    damaged = write(tmp_path / "d.parquet", coded.read_bytes()[:-9])
    for path, words in (
        (made("body.parquet", body=["a"], title=["b"]), "no column 'text' but body, title"),
        (made("number.parquet", text=[3]), "int, not strings"),
        (made("none.parquet", text=[None, ""]), "no text"),
        (damaged, "damaged"),
        (tmp_path / "missing.parquet", "No such file"),
    ):
        with pytest.raises(MemcError) as caught:
            list(data.read_documents(path))
        assert caught.value.code == "E207" and words in str(caught.value) and path.name in str(caught.value)
        assert caught.value.next


def test_a_data_set(tmp_path, monkeypatch):
    """A folder named like a data set of the hub is read by the same library in the same way, with no hub."""
    pytest.importorskip("datasets")
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", '{"text": "the dog", "other": "x"}\n{"text": "a fox", "other": "y"}\n')
    write(folder / "test.jsonl", '{"text": "the end", "other": "z"}\n')
    monkeypatch.chdir(tmp_path)
    assert list(data.read_documents("hub:org/name")) == ["the dog", "a fox"]
    assert list(data.read_documents("hub:org/name:test")) == ["the end"]
    assert list(data.read_documents("hub:org/name:train:other")) == ["x", "y"]
    stream = data.read_tokens("hub:org/name", TOKENIZER, limit=2, folder=tmp_path)
    assert stream.ids.tolist() == TOKENIZER.encode("the dog").ids[:2]
    for name, words in (
        ("hub:org/name:valid", "valid"),
        ("hub:org/name:train:body", "no column 'body' but text, other"),
        ("hub:org", "org/name[:split"),
    ):
        with pytest.raises(MemcError) as caught:
            list(data.read_documents(name))
        assert caught.value.code == "E207" and words in str(caught.value)
    for read in (partial(data.read_tokens, "hub:org/name", folder=tmp_path), partial(data.tokenize, ["hub:org/name"])):
        with pytest.raises(MemcError, match="--tokens"):
            read(tokenizer=TOKENIZER)
    before = data.source_digest("hub:org/name")
    assert before == data.source_digest("hub:org/name") != data.source_digest("hub:org/name:test")


@pytest.mark.parametrize(("source", "library"), [("a.parquet", "pyarrow"), ("hub:org/name-2", "datasets")])
def test_a_library_that_is_missing_is_named(source, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MemcError) as caught:
        list(data.read_documents(source))
    assert caught.value.code == "E602" and library in str(caught.value) and "memc[data]" in caught.value.next

"""The cache of tokens: the same as fresh tokens, never half of them, whatever the disk does."""

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memc import data
from memc.data import cache
from memc.errors import MemcError
from memc.progress import Silent
from tests.core.runtime_fakes import byte_tokenizer

TOKENIZER = byte_tokenizer()


class Notes(Silent):
    def __init__(self):
        self.notes, self.steps = [], []

    def step(self, title, total=None):
        self.steps.append(title)
        return super().step(title, total)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the quick brown fox"}\n{"text": "東京 and a dog"}\n' * 20)
    return path


def read(path, folder, **options):
    notes = Notes()
    return data.read_tokens(path, TOKENIZER, folder=folder, progress=notes, **options), notes


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), min_size=1), st.data())
def test_a_hit_is_what_fresh_tokenising_gives(documents, draw):
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "a.parquet.jsonl", Path(name) / "cache"
        path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in documents))
        fresh = data.tokenize([path], TOKENIZER)
        limit = draw.draw(st.none() | st.integers(1, len(fresh)))
        made, first = read(path, folder, limit=limit)
        hit, second = read(path, folder, limit=limit)
        assert len(first.steps) == 1 and not second.steps and not second.notes
        for stream in (made, hit):
            assert stream.ids.tolist() == fresh[:limit].tolist() and stream.ids.dtype == np.uint16
            starts = np.cumsum([0, *(len(TOKENIZER.encode(text).ids) for text in documents)])[:-1]
            assert stream.starts.tolist() == starts[starts < len(stream.ids)].tolist()
        assert isinstance(hit.ids, np.memmap) and hit.digest == made.digest


def test_the_key_is_the_content(tmp_path, text):
    folder = tmp_path / "cache"
    copy = tmp_path / "other.jsonl"
    copy.write_bytes(text.read_bytes())
    assert read(text, folder)[1].steps and not read(copy, folder)[1].steps
    assert read(text, folder, limit=9)[1].steps
    plain = tmp_path / "a.txt"
    plain.write_bytes(text.read_bytes())
    assert read(plain, folder)[1].steps  # the same bytes, read in another way
    other = byte_tokenizer()
    other.add_tokens(["fox"])
    notes = Notes()
    data.read_tokens(text, other, folder=folder, progress=notes)
    assert notes.steps
    with text.open("a") as stream:
        stream.write('{"text": "more"}\n')
    assert read(text, folder)[1].steps
    assert len(entries(folder)) == 5


def test_a_large_vocabulary_is_wider(tmp_path, text):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{number}" for number in range(1 << 16)])
    text.write_text('{"text": "word65535"}\n')
    stream = data.read_tokens(text, tokenizer, folder=tmp_path)
    assert stream.ids.dtype == np.uint32 and stream.ids.tolist() == tokenizer.encode("word65535").ids
    assert stream.ids.max() > 1 << 16


@given(st.data())
def test_damage_is_found_and_mended(draw):
    with tempfile.TemporaryDirectory() as name:
        path, folder = Path(name) / "a.jsonl", Path(name) / "cache"
        path.write_text('{"text": "the dog"}\n{"text": "a fox"}\n')
        good = read(path, folder)[0].ids.tolist()
        (entry,) = folder.iterdir()
        whole = bytearray(entry.read_bytes())
        written = len(bytes(whole[: cache.HEADER]).rstrip())
        places = st.integers(0, written - 1) | st.integers(cache.HEADER, len(whole) - 1)
        kind = draw.draw(st.sampled_from(["flip", "cut", "longer"]))
        if kind == "flip":
            whole[draw.draw(places)] ^= draw.draw(st.sampled_from([1, 2, 8, 128]))
        elif kind == "cut":
            del whole[draw.draw(st.integers(0, len(whole) - 1)) :]
        else:
            whole += b"\0"
        entry.write_bytes(whole)
        stream, notes = read(path, folder)
        assert stream.ids.tolist() == good and notes.steps and "damaged" in notes.notes[0]
        assert not read(path, folder)[1].steps and entries(folder) == [entry.name]


@pytest.mark.parametrize("field", ["tokens", "documents"])
def test_a_header_that_does_not_fit_the_file_is_found(tmp_path, text, field):
    good = read(text, tmp_path / "cache")[0].ids.tolist()
    (entry,) = (tmp_path / "cache").iterdir()
    whole = entry.read_bytes()
    header = json.loads(whole[: cache.HEADER])
    header[field] -= 1
    entry.write_bytes(json.dumps(header).encode().ljust(cache.HEADER) + whole[cache.HEADER :])
    stream, notes = read(text, tmp_path / "cache")
    assert stream.ids.tolist() == good and notes.steps


KILLED = """
import os, signal, sys
from pathlib import Path
from memc.data import cache
from tests.core.runtime_fakes import byte_tokenizer

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

pieces = cache.token_pieces
def some(*arguments):
    for number, piece in enumerate(pieces(*arguments)):
        yield piece if number < 7 else die()

if sys.argv[3] == "pieces":
    cache.token_pieces = some
elif sys.argv[3] == "fsync":
    cache.os.fsync = die
else:
    Path.replace = die
cache.read_tokens(sys.argv[1], byte_tokenizer(), folder=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("when", ["pieces", "fsync", "rename"])
def test_a_kill_leaves_no_entry(tmp_path, text, when):
    folder = tmp_path / "cache"
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", KILLED, str(text), str(folder), when]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = folder.iterdir()
    assert left.suffix == ".partial"
    stream, notes = read(text, folder)
    assert stream.ids.tolist() == data.tokenize([text], TOKENIZER).tolist() and notes.steps
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    read(text, folder, limit=3)
    assert not left.exists()  # what a killed process left goes after a day


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path, text, monkeypatch):
    def full(**options):
        name = Path(options["dir"]) / "x.partial"
        name.touch()
        return os.open("/dev/full", os.O_RDWR), str(name)

    monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    with pytest.raises(MemcError) as caught:
        read(text, tmp_path / "cache")
    assert caught.value.code == "E502" and str(tmp_path / "cache") in str(caught.value)
    assert "XDG_CACHE_HOME" in caught.value.next and not entries(tmp_path / "cache")


def test_a_full_disk_before_the_first_byte(tmp_path, text, monkeypatch):
    def full(**options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(cache.tempfile, "mkstemp", full)
    with pytest.raises(MemcError, match="E502"):
        read(text, tmp_path / "cache")


def test_a_folder_that_cannot_be_written(tmp_path, text, monkeypatch):
    (tmp_path / "file").touch()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(cache.tempfile, "tempdir", str(temporary))
    stream, notes = read(text, tmp_path / "file" / "cache")
    assert stream.ids.tolist() == data.tokenize([text], TOKENIZER).tolist()
    assert "cannot be written" in notes.notes[0] and str(temporary) in notes.notes[0]
    assert not entries(temporary)  # the mapping alone holds it


def test_a_source_that_stops_half_way_leaves_nothing(tmp_path, text):
    text.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(MemcError, match="E207"):
        read(text, tmp_path / "cache")
    assert not entries(tmp_path / "cache")


@pytest.mark.parametrize(("make", "words"), [(None, "No such file"), (Path.mkdir, "regular"), (os.mkfifo, "regular")])
def test_what_is_no_file(tmp_path, make, words):
    path = tmp_path / "a.txt"
    if make:
        make(path)
    with pytest.raises(MemcError, match="E207") as caught:
        read(path, tmp_path / "cache")
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_the_folder_is_in_the_users_cache(tmp_path, text, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data.read_tokens(text, TOKENIZER)
    assert len(entries(tmp_path / "home" / "memc" / "tokens")) == 1

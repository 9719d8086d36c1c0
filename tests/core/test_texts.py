"""The reader of R's serialisation in ``benchmarks/texts.py``, on a lazy-load database written here."""

import gzip
import importlib.util
import struct
import zlib
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("texts", Path(__file__).parents[2] / "benchmarks" / "texts.py")
texts = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(texts)


def number(*values):
    return struct.pack(f">{len(values)}i", *values)


def chars(text):
    return number(0x00040009, -1) if text is None else number(0x00040009, len(text.encode())) + text.encode()


def strings(*items):
    return number(16, len(items)) + b"".join(map(chars, items))


def named(names, *items):
    """A list with names: an attribute pair list of one tagged pair."""
    pairs = number(0x402, 1) + chars("names") + strings(*names) + number(254)
    return number(0x213, len(items)) + b"".join(items) + pairs


def serialized(value, version=3):
    return b"X\n" + number(version, 0x40201, 0x30500) + (number(5) + b"UTF-8" if version >= 3 else b"") + value


def test_values():
    inner = named(["a", "b"], number(13, 2, 7, -8), strings("naïve", None))
    assert texts.Serialized(serialized(inner)).value() == {"a": [7, -8], "b": ["naïve", None]}
    assert texts.Serialized(serialized(inner, 2)).value() == {"a": [7, -8], "b": ["naïve", None]}
    # The second list names its attribute by a reference to the symbol of the first.
    again = number(0x213, 1) + strings("x") + number(0x402, 0x1FF) + strings("c") + number(254)
    assert texts.Serialized(serialized(number(19, 2) + inner + again)).value()[1] == {"c": ["x"]}


@pytest.mark.parametrize("data", [b"A\n", serialized(number(14, 0)), serialized(strings("abc"))[:-1]])
def test_what_cannot_be_read(data):
    with pytest.raises(ValueError, match="R"):
        texts.Serialized(data).value()


def test_novels(tmp_path):
    data, places = b"", []
    for name in texts.TITLES:
        packed = zlib.compress(serialized(strings(name, "", "line two", "", "")))
        places.append(number(13, 2, len(data), 4 + len(packed)))
        data += number(0) + packed
    (tmp_path / "Rdata.rdb").write_bytes(data)
    index = named(["variables"], named(list(texts.TITLES), *places))
    (tmp_path / "Rdata.rdx").write_bytes(gzip.compress(serialized(index)))
    found = dict(texts.novels(tmp_path / "Rdata.rdb"))
    assert len(found) == 6 and found["austen-emma"] == "emma\n\nline two\n"

"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from memc.partial import partial_of, write_whole, writing


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with writing(path) as stream:
        stream.write(b"whole")
        assert not path.exists()
        assert partial_of(path).exists()
    assert path.read_bytes() == b"whole"
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_where_writing_fails(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file.json"
    path.write_text("before")
    with pytest.raises(type(failure)), writing(path) as stream:
        stream.write(b"ha")
        raise failure
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file.json"]


def test_text_that_is_no_unicode_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with pytest.raises(UnicodeError):
        write_whole(path, "\ud800")
    assert not list(tmp_path.iterdir())

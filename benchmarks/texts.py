"""Write the public-domain texts of the benchmarks: six novels of Jane Austen and the Jargon File, from Debian packages.

``python benchmarks/texts.py FOLDER``. An installed package is read where it is; otherwise it is fetched with
``apt-get download``, which any user may run, and unpacked in a temporary folder. What is there and right is left.
``--more`` adds four that are of other kinds: the King James Bible, The Devil's Dictionary, and two dictionaries of
computing, FOLDOC and V.E.R.A. (GNU Free Documentation License).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

NOVELS = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
JARGON = Path("usr/share/doc/jargon-text/jargon.txt.gz")
BIBLE = ("bible-kjv", Path("usr/bin/bible")), ("bible-kjv-text", Path("usr/lib/bible.data"))
DICTIONARIES = ("devil", "foldoc", "vera")
TITLES = {
    "emma": "emma",
    "mansfieldpark": "mansfield-park",
    "northangerabbey": "northanger-abbey",
    "persuasion": "persuasion",
    "prideprejudice": "pride-and-prejudice",
    "sensesensibility": "sense-and-sensibility",
}


class Serialized:
    """A reader of R's binary serialisation (``R-ints``, "Serialization Formats") for lists, vectors and strings.

    Attributes are read and left out but for the names of a list. Whatever else occurs raises ``ValueError``.
    """

    SYMBOL, PAIRS, CHARS, LOGICALS, INTEGERS, STRINGS, LIST, NIL, REFERENCE = 1, 2, 9, 10, 13, 16, 19, 254, 255

    def __init__(self, data: bytes) -> None:
        """Take an uncompressed serialisation and read past its header."""
        if data[:2] != b"X\n":
            raise ValueError("no binary serialisation of R")
        self.data, self.at = data, 2
        self.symbols: list[object] = []
        version, _, _ = self.integer(), self.integer(), self.integer()
        if version >= 3:  # the native encoding's name follows
            self.take(self.integer())

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.at += count
        if not 0 <= count <= len(self.data) - (self.at - count):
            raise ValueError("serialisation of R ends too early")
        return self.data[self.at - count : self.at]

    def integer(self) -> int:
        """Return the next 32-bit number."""
        return int.from_bytes(self.take(4), "big", signed=True)

    def value(self) -> object:
        """Return the next value: None, a string, or a list of values; a dict where they have names."""
        flags = self.integer()
        kind = flags & 255
        if kind == self.NIL:
            return None
        if kind == self.REFERENCE:
            return self.symbols[((flags >> 8) or self.integer()) - 1]
        if kind == self.SYMBOL:
            self.symbols.append(self.value())
            return self.symbols[-1]
        if kind == self.CHARS:
            return None if (count := self.integer()) == -1 else self.take(count).decode()
        if kind == self.PAIRS and flags & 1024 and not flags & 512:
            return self.pairs()
        if kind in (self.INTEGERS, self.LOGICALS):
            values: list[object] = [self.integer() for _ in range(self.integer())]
        elif kind in (self.STRINGS, self.LIST):
            values = [self.value() for _ in range(self.integer())]
        else:
            raise ValueError(f"value of R of type {kind} is not known here")
        names = attributes.get("names") if flags & 512 and isinstance(attributes := self.value(), dict) else None
        return dict(zip(names, values, strict=True)) if isinstance(names, list) else values

    def pairs(self) -> dict[object, object]:
        """Return a pair list, after the flags of its first pair, as a dict."""
        found = {}
        while True:
            name = self.value()
            found[name] = self.value()
            flags = self.integer()
            if flags & 255 == self.NIL:
                return found


def novels(database: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of each object of a lazy-load database that is in ``TITLES``.

    The ``.rdx`` file beside it says where in the ``.rdb`` file each object is: four bytes of length, then zlib.
    """
    index = Serialized(gzip.decompress(database.with_suffix(".rdx").read_bytes())).value()
    data = database.read_bytes()
    for name, title in TITLES.items():
        start, length = index["variables"][name]  # type: ignore[index]
        lines = Serialized(zlib.decompress(data[start + 4 : start + length])).value()
        yield f"austen-{title}", "\n".join(lines).strip("\n") + "\n"  # type: ignore[arg-type]


def package(name: str, file: Path, work: Path) -> Path:
    """Return where a file of a Debian package is: installed, else fetched and unpacked below ``work``."""
    if (Path("/") / file).exists():
        return Path("/") / file
    try:
        subprocess.run(["apt-get", "download", "-q", name], cwd=work, check=True, stdout=sys.stderr)
        (archive,) = work.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, work], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{name} cannot be fetched ({error}); on Debian or Ubuntu: apt-get install {name}") from error
    return work / file


def others(work: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of what ``--more`` adds; the Bible's package has a program that writes it out."""
    program, data = (package(name, file, work) for name, file in BIBLE)
    command = [program, "-p", data.parent, "gen1:1-rev22:21"]
    yield "bible", subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout.decode()
    for name in DICTIONARIES:
        file = Path(f"usr/share/dictd/{name}.dict.dz")
        yield name, gzip.decompress(package(f"dict-{name}", file, work).read_bytes()).decode(errors="replace")


def main() -> None:
    """Write the texts and print the sha256 of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the texts go")
    parser.add_argument("--more", action="store_true", help="four texts of other kinds beside them")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="memc-texts-") as work:
        texts = dict(novels(package("r-cran-janeaustenr", NOVELS, Path(work))))
        texts["jargon"] = gzip.decompress(package("jargon-text", JARGON, Path(work)).read_bytes()).decode()
        texts |= dict(others(Path(work))) if arguments.more else {}
    for name, text in texts.items():
        path, data = folder / f"{name}.txt", text.encode()
        if not path.exists() or path.read_bytes() != data:
            unfinished = path.with_suffix(".partial")
            unfinished.write_bytes(data)
            unfinished.replace(path)
        print(f"{hashlib.sha256(data).hexdigest()}  {path.name}")


if __name__ == "__main__":
    main()

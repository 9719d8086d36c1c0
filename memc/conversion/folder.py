"""The output folder of a conversion: ``OUT.partial`` while it is made, ``OUT`` when it is whole, nothing in between."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from memc import __version__
from memc.artifact import MANIFEST, read_manifest
from memc.errors import MemcError
from memc.frontend.source import SIDE_FILES
from memc.partial import partial_of, write_whole
from memc.program_io import link
from memc.report.facts import Document
from memc.report.models import ErrorDocument
from memc.report.text import size

RESUME = Path("report", "resume.json")  # under report, which the manifest does not list
RECIPE = "recipe.yaml"


class OutFolder:
    """Where an artifact is written. ``partial`` is the folder to write into between :meth:`open` and :meth:`finish`."""

    def __init__(self, out: Path) -> None:
        """Note the folder; nothing is touched yet. Raises ``MemcError`` E200 for one without a name."""
        if not out.name:
            raise MemcError("E200", "output folder has no name of its own", f"-o {str(out)!r}", "give a new folder")
        self.out = out
        self.partial = partial_of(out)

    def refuse_existing(
        self, recipe: str, facts: dict[str, str], *, force: bool, sources: Iterable[str | Path] = ()
    ) -> None:
        """Raise ``MemcError`` E204 when OUT holds something, unless ``force``.

        ``recipe`` and ``facts`` (manifest fields) tell whether what is there is what was asked for. With ``force``
        still refuses to replace a file, or a folder that this process, the user's home or one of the ``sources`` that
        it is made from lives in.
        """
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise MemcError("E204", "output is a file", str(self.out), "give a folder that does not exist")
        if not any(self.out.iterdir()):
            return
        here = self.out.resolve()
        for source in map(Path, sources):
            if source.exists() and source.resolve().is_relative_to(here):
                reason = f"the result would replace what it is made from, {source}"
                raise MemcError("E204", reason, str(self.out), "give another -o OUT")
        if force:
            if any(place.is_relative_to(here) for place in (Path.cwd().resolve(), Path.home().resolve())):
                raise MemcError("E204", "output folder cannot be replaced", str(self.out), "give another folder")
            return
        if not (self.out / MANIFEST).is_file():
            hint = "give a folder that does not exist, or add --force to replace this one"
            raise MemcError("E204", "output folder is not empty and no artifact of memc", str(self.out), hint)
        if self._is_same(recipe, facts):
            reason = "output is there already, made by this recipe from this source"
            raise MemcError("E204", reason, str(self.out), f"memc report {self.out}, or add --force to make it again")
        raise MemcError("E204", "output folder holds another artifact", str(self.out), "add --force to replace it")

    def _is_same(self, recipe: str, facts: dict[str, str]) -> bool:
        manifest = read_manifest(self.out).model_dump()
        path = self.out / RECIPE
        same_recipe = path.is_file() and path.read_text() == recipe
        return same_recipe and all(manifest.get(name) == value for name, value in facts.items())

    def open(self, key: str, *, fresh: bool) -> bool:
        """Make or go on with ``OUT.partial`` and tell whether it goes on.

        One of another recipe, source or version (see :func:`resume_key`) is started over where ``fresh`` or where
        nothing in it was finished. Raises ``MemcError`` E204 for one in which something was, and for one that memc did
        not make.
        """
        marker = self.partial / RESUME
        if self.partial.exists() and not self._is_empty():  # what a kill before the marker leaves is
            if not marker.is_file():
                raise MemcError("E204", "folder is in the way", str(self.partial), "remove it")
            if not fresh and _read_key(marker) == key:
                (self.partial / "report" / "error.json").unlink(missing_ok=True)
                return True
            if not fresh and not self._only_begun():
                reason = "unfinished output of another recipe, source or version is here"
                raise MemcError("E204", reason, str(self.partial), "add --fresh to start over, or give another OUT")
            shutil.rmtree(self.partial)
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_whole(marker, json.dumps({"key": key}) + "\n")
        return False

    def _is_empty(self) -> bool:
        """Tell whether ``OUT.partial`` holds no file but a marker that was being written."""
        files = {path for path in self.partial.rglob("*") if path.is_symlink() or not path.is_dir()}
        return self.partial.is_dir() and files <= {partial_of(self.partial / RESUME)}

    def _only_begun(self) -> bool:
        """Tell whether the partial folder holds nothing that took work: what is copied from the model, and reports."""
        begun = ("report", "log", RECIPE, *SIDE_FILES)
        sampled = any((self.partial / "report").glob("*.safetensors"))  # tokens that the original was asked for
        return not sampled and all(any(fnmatch(p.name, name) for name in begun) for p in self.partial.iterdir())

    def write_report(self, name: str, document: Document) -> None:
        """Write one report file."""
        folder = self.partial / "report"
        folder.mkdir(exist_ok=True)
        write_whole(folder / name, document.to_json() + "\n")

    def write_error(self, error: MemcError) -> None:
        """Write down why the conversion stopped, where there is a folder to write it in."""
        if self.partial.is_dir():
            self.write_report("error.json", ErrorDocument.of(error))

    def clean(self) -> None:
        """Remove the stages, which only an unfinished conversion needs."""
        for stage in self.partial.glob("stage-*"):
            shutil.rmtree(stage)

    def finish(self) -> None:
        """Put ``OUT.partial`` in the place of OUT, in one rename."""
        old = partial_of(self.out, ".old.partial")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        (self.out / RESUME).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def resume_key(*parts: str) -> str:
    """Return the digest that an unfinished conversion must share to be gone on with; memc's version is part of it."""
    return hashlib.sha256(json.dumps([__version__, *parts]).encode()).hexdigest()


def require_space(folder: Path, needed: int) -> None:
    """Raise ``MemcError`` E502 when the disk that ``folder`` is or will be on has less than ``needed`` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        reason = f"output needs {size(needed)} of disk, {size(free)} are free"
        raise MemcError("E502", reason, str(place), "free some, or give an OUT on another disk")


def link_folder(source: Path, target: Path) -> None:
    """Put the files of ``source`` into a new folder without writing them again, where the disk has hard links."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=link)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_key(marker: Path) -> str | None:
    try:
        key = json.loads(marker.read_text())["key"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None

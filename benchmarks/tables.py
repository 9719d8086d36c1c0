"""A table beside SmolLM2-135M that is larger than memory: read row by row, and as the system reads ahead by itself.

    python benchmarks/tables.py --group FOLDER

The model at int4 with a memory of product keys, whose table is on the disk and nowhere in the page cache when a process
loads it, runs a prompt and then single tokens. The two ways take turns, each in a process of its own, once with the
memory of the machine and once in a control group with less (``mkdir /sys/fs/cgroup/small`` makes one, ``echo 800M >
/sys/fs/cgroup/small/memory.max`` limits it); without one the latter is left out. Writes ``results/tables-DATE.json``
and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from cpu import facts, model
from page import grid, save

from memc import machine, runtime
from memc.artifact import read_manifest
from memc.cli import main as memc

HERE = Path(__file__).parent
PROMPT, STEPS = 56, 20
SIDES = {"rows": "row by row", "ahead": "read ahead"}
COLUMNS = {
    "prompt_seconds": ("prompt, s", 2),
    "prompt_megabytes": ("read for it, MB", 0),
    "step_milliseconds": ("a token after it, ms", 1),
    "step_megabytes": ("read for each, MB", 2),
    "resident_megabytes": ("file pages held, MB", 0),
}


def read_bytes() -> int:
    """Return what this process has had read from the disk."""
    return int(re.findall(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[0])


def forget(folder: Path) -> None:
    """Drop what the system holds of an artifact's files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def child(folder: Path, side: str) -> dict[str, float]:
    """Load the artifact, run a prompt and single tokens, and return what it took."""
    memory = machine.memory_bytes()
    with mock.patch.object(machine, "memory_bytes", lambda: 1 << 20 if side == "rows" else None):
        session = runtime.load(folder, threads=1)
    state, ids = session.new_state(1), list(range(100, 100 + 7 * (PROMPT + STEPS), 7))
    began, before = time.perf_counter(), read_bytes()
    session.prefill([ids[:PROMPT]], state)
    prompt, read = time.perf_counter(), read_bytes()
    for token in ids[PROMPT:]:
        session.step([token], state)
    ended, after = time.perf_counter(), read_bytes()
    resident = re.findall(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {
        "memory": float(memory or 0),
        "prompt_seconds": prompt - began,
        "prompt_megabytes": (read - before) / 1e6,
        "step_milliseconds": 1e3 * (ended - prompt) / STEPS,
        "step_megabytes": (after - read) / 1e6 / STEPS,
        "resident_megabytes": int(resident[0]) * 1024 / 1e6,
    }


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    lines = []
    limits = sorted({row["memory"] for row in document["rows"]}, reverse=True)
    for memory, (side, name) in itertools.product(limits, SIDES.items()):
        found = [row for row in document["rows"] if (row["side"], row["memory"]) == (side, memory)]
        cells = [f"{memory / 1e6:,.0f}"]
        for column, (_, digits) in COLUMNS.items():
            values = [row[column] for row in found]
            cells.append(
                f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
            )
        lines.append([name, *cells])
    table = document["table"]
    parts = [
        "# A table on the disk",
        f"{document['cpu']}; memc at {document['commit']}. SmolLM2-135M at int4 with {document['slots']:,} product-key"
        f" rows of 32 channels, a table of {table / 1e6:.0f} MB; a prompt of {PROMPT} tokens, then {STEPS} one"
        f" at a time; one thread; medians, least and most of {document['rounds']} rounds in which all took turns, each"
        " in a process that found nothing in the page cache.",
        grid(["the table is", "memory, MB", *(name for name, _ in COLUMNS.values())], lines),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Convert, measure the sides in turns and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/tables"))
    parser.add_argument("--slots", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--group", type=Path, help="the folder of a control group that limits memory")
    parser.add_argument("--child", choices=[*SIDES])
    options = parser.parse_args()
    folder = options.work / str(options.slots)
    if options.child:
        if options.group:
            (options.group / "cgroup.procs").write_text(str(os.getpid()))
        print(json.dumps(child(folder, options.child)))
        return
    if not folder.is_dir():
        pass_ = f"memory_bank:kind=pkm,slots={options.slots}"
        words = ["convert", str(model()), "-o", str(folder), "--target", "cpu", "--weights", "int4", "--pass", pass_]
        assert memc(words) == 0
    (table,) = (table for table in read_manifest(folder).tables if "memory_bank" in table.name)
    document = {"schema": "memc.benchmark.tables/1", **facts(), "slots": options.slots, "rounds": options.rounds}
    document |= {"table": 4 * table.shape[0] * table.shape[1], "rows": []}
    for _ in range(options.rounds):
        for group, side in itertools.product([None, options.group] if options.group else [None], SIDES):
            forget(folder)
            words = [sys.executable, __file__, "--work", str(options.work), "--slots", str(options.slots)]
            words += ["--group", str(group)] if group else []
            done = subprocess.run([*words, "--child", side], check=True, capture_output=True, text=True)
            document["rows"].append({"side": side, **json.loads(done.stdout)})
            print(document["rows"][-1], flush=True)
    save(HERE / "results" / f"tables-{datetime.datetime.now(datetime.UTC).date()}.json", document, page)


if __name__ == "__main__":
    main()

"""What fetching from a memory bank costs: cold and warm, level by level in three stores, and finding the cluster.

    python benchmarks/bank.py                  # some minutes, 200 MB of disk

Blocks and embeddings are random: these are numbers of the store, not of what is in it (for that, ``memc bank train``
measures held-out passages). Writes ``results/bank-DATE.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cpu import facts
from page import grid, save

from memc import __version__
from memc.bank import Bank, BankShape, Cluster, TreePath
from memc.bank.encoder import EncoderFacts
from memc.bank.manifest import PASSAGES, RECORDS, TREE, BankManifest, seal
from memc.bank.records import write_records
from memc.bank.tiers import Tier, place
from memc.bank.tree import Tree
from memc.machine import rss_bytes

HERE = Path(__file__).parent
WIDTH = 384
SHAPE = BankShape(branch=8, ranks=(64, 16, 4), layers=tuple(range(12)), width=256)
"""150 MB in all; a path is 3.1 MB."""
FLAT = BankShape(branch=8**3, ranks=(sum(SHAPE.ranks),), layers=SHAPE.layers, width=SHAPE.width)
"""As many leaves, each with as many units as a path of the tree."""

STORES = (
    Tier("memory", 8e9, capacity=32_000_000),
    Tier("disk", 200e6, 1e-3, 100_000_000),
    Tier("slow", 20e6, 5e-3),
)
"""An emulated store: what a read takes longer in it than on this machine is slept."""

PATHS = 24
RELATED = 6
"""Prompts in a row whose clusters of all levels but the last are the same."""


def write_bank(folder: Path, shape: BankShape, clusters: Iterable[Cluster]) -> Path:
    """Write a bank of random blocks for some clusters, and a tree of random centroids."""
    (folder / PASSAGES).mkdir(parents=True)
    rng = np.random.default_rng(0)
    tree = random_tree(shape.branch, shape.levels)
    tree.save(folder / TREE)

    def blocks() -> Iterator[tuple[Cluster, Any]]:
        for cluster in sorted(clusters, key=lambda each: (len(each), each)):
            yield cluster, rng.standard_normal(shape.record_shape(len(cluster) - 1), np.float32)

    write_records(folder / RECORDS, shape, blocks())
    encoder = EncoderFacts(source="random", digest="", width=WIDTH, limit=1)
    manifest = BankManifest(
        version=__version__, model="", model_digest="", **vars(shape), encoder=encoder, passages=0,
        passage_characters=0, sources=[], seed=0,
    )  # fmt: skip
    seal(folder, manifest)
    return folder


def random_tree(branch: int, levels: int) -> Tree:
    """Make a tree whose centroids are random unit vectors."""
    rng = np.random.default_rng(0)
    sizes = [branch ** (level + 1) for level in range(levels)]
    centroids = [rng.standard_normal((size, WIDTH), np.float32) for size in sizes]
    unit = tuple(each / np.linalg.norm(each, axis=1, keepdims=True) for each in centroids)
    return Tree(branch, unit, tuple(np.ones(size, np.int64) for size in sizes), (10.0,) * levels)


def paths(shape: BankShape, count: int, *, related: int = 1) -> list[TreePath]:
    """Return random paths; ``related`` in a row share all but the last level."""
    rng = np.random.default_rng(1)
    found: list[TreePath] = []
    for index in range(count):
        cluster = tuple(map(int, rng.integers(shape.branch, size=shape.levels)))
        if index % related:
            cluster = (*found[-1].cluster[:-1], cluster[-1])
        found.append(TreePath(cluster, (0.0,) * shape.levels, shape.levels))
    return found


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def raw_read(path: Path, bank: Bank, clusters: Iterable[Cluster]) -> None:
    """Read the bytes of some records, each in one piece, and do nothing with them."""
    with path.open("rb", buffering=0) as stream:
        for cluster in clusters:
            stream.seek(int(bank.records._entry(cluster)["offset"]))
            stream.read(bank.shape.record_bytes(len(cluster) - 1))


def cold_and_warm(folder: Path) -> dict[str, Any]:
    """Time fetches of paths that nothing is held of, beside raw reads of the same bytes, and fetches once it is."""
    file = folder / RECORDS
    cold, raw, warm, same = [], [], [], []
    bank = Bank.open(folder, memory_bytes=0)
    before, grown = rss_bytes(), 0
    for path in paths(SHAPE, PATHS):
        clusters = bank.used(path)
        forget(file)
        raw.append(timed(lambda: raw_read(file, bank, clusters)))  # noqa: B023 - called at once
        forget(file)
        bank.reopen()
        cold.append(timed(lambda: bank.fetch(path)))  # noqa: B023
        same.append(timed(lambda: bank.fetch(path)))  # noqa: B023
        bank.reopen()
        warm.append(timed(lambda: bank.fetch(path)))  # noqa: B023
        grown = max(grown, rss_bytes() - before)
    index = bank.records._index.nbytes + sum(each.nbytes for each in bank.tree.centroids)
    size = sum(SHAPE.record_bytes(level) for level in SHAPE.storing())
    return {
        "path_bytes": size,
        "raw_ms": 1e3 * statistics.median(raw),
        "cold_ms": 1e3 * statistics.median(cold),
        "cached_file_ms": 1e3 * statistics.median(warm),
        "same_ms": 1e3 * statistics.median(same),
        "rss_grown": grown,
        "index_bytes": index,
    }


def throttle(bank: Bank) -> None:
    """Let every read take at least as long as it would in the store that its level lies in."""
    tiers = {placement.level: placement.tier for placement in place(bank.shape, STORES)}
    read = bank.records.read

    def slow(cluster: Cluster) -> Any:
        level = len(cluster) - 1
        began = time.perf_counter()
        record = read(cluster)
        wanted = tiers[level].latency + bank.shape.record_bytes(level) / tiers[level].bandwidth
        time.sleep(max(0.0, wanted - (time.perf_counter() - began)))
        return record

    bank.records.read = slow  # type: ignore[method-assign]


def placement(work: Path, folder: Path) -> dict[str, Any]:
    """Fetch streams of prompts from the tree and from a flat bank of as many units a prompt, in the emulated store."""
    found: dict[str, Any] = {"stores": [vars(tier) for tier in STORES]}
    for kind, related in (("unrelated", 1), ("related", RELATED)):
        stream = paths(SHAPE, PATHS, related=related)
        leaves = [(SHAPE.number(path.cluster),) for path in stream]
        flat = write_bank(work / f"flat-{kind}", FLAT, set(leaves))
        seconds = {}
        for side, place_, ways in (
            ("tree", folder, stream),
            ("flat", flat, [TreePath(leaf, (0.0,), 1) for leaf in leaves]),
        ):
            bank = Bank.open(place_, memory_bytes=int(2.2 * SHAPE.level_bytes(0)))
            throttle(bank)
            if side == "tree":
                bank.pin()
            seconds[side] = sum(timed(lambda bank=bank, path=path: bank.fetch(path)) for path in ways) / len(ways)
        found[kind] = {side: 1e3 * value for side, value in seconds.items()}
        found[kind]["ratio"] = seconds["flat"] / seconds["tree"]
    return found


def descent(levels: int = 4, branch: int = 16) -> dict[str, Any]:
    """Time the descent of a tree beside the distances to all of its leaves."""
    tree = random_tree(branch, levels)
    rows = np.random.default_rng(2).standard_normal((8, WIDTH), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    greedy = [timed(lambda row=row: tree.descend(row)) for row in rows]
    whole = [timed(lambda row=row: tree.nearest_leaf(row[None])) for row in rows]
    return {
        "distances": levels * branch,
        "leaves": branch**levels,
        "descent_ms": 1e3 * statistics.median(greedy),
        "exhaustive_ms": 1e3 * statistics.median(whole),
    }


def page(document: dict[str, Any]) -> str:
    """Write the page."""
    fetch, tree = document["fetch"], document["descent"]
    stores = "; ".join(f"{one['name']} {one['bandwidth'] / 1e6:g} MB/s" for one in document["placement"]["stores"])
    times = [
        ["raw read of the same bytes, not in the page cache", f"{fetch['raw_ms']:.2f}"],
        ["fetch, not in the page cache", f"{fetch['cold_ms']:.2f}"],
        ["fetch, in the page cache", f"{fetch['cached_file_ms']:.2f}"],
        ["the same clusters again", f"{fetch['same_ms']:.4f}"],
    ]
    streams = [
        [kind, *(f"{document['placement'][kind][side]:.1f}" for side in ("tree", "flat")), f"{ratio:.1f}"]
        for kind in ("unrelated", "related")
        if (ratio := document["placement"][kind]["ratio"])
    ]
    cold = fetch["cold_ms"] / fetch["raw_ms"]
    goals = [
        ["cold fetch over a raw read", "at most 1.2", f"{cold:.2f}", "yes" if cold <= 1.2 else "no"],
        *(
            [f"flat over tree, {kind} prompts", f"at least {goal}", f"{found:.1f}", "yes" if found >= goal else "no"]
            for kind, goal in (("unrelated", 4), ("related", 3))
            if (found := document["placement"][kind]["ratio"])
        ),
        [
            "distances of all leaves over those of descent",
            "at least 500",
            f"{tree['leaves'] / tree['distances']:.0f}",
            "yes" if tree["leaves"] >= 500 * tree["distances"] else "no",
        ],
    ]
    grown, allowed = fetch["rss_grown"] / 2**20, (2 * fetch["path_bytes"] + fetch["index_bytes"]) / 2**20
    return (
        "\n\n".join(
            [
                "# Fetching from a memory bank",
                f"{document['cpu']}, load {document['load_before']:.1f} before the start; memc at {document['commit']}."
                f" A path is {fetch['path_bytes'] / 1e6:.1f} MB in three records; medians over {PATHS} random paths.",
                "## One path, milliseconds",
                grid(["", "ms"], times),
                f"Resident memory grew by {grown:.1f} MiB at most; the records, the block of them and the index are"
                f" {allowed:.1f} MiB.",
                f"## A stream of prompts, milliseconds a prompt, in an emulated store ({stores})",
                grid(["prompts", "tree", "flat", "ratio"], streams),
                f"## Finding the cluster among {tree['leaves']} leaves",
                grid(
                    ["", "distances", "ms"],
                    [
                        ["descent", str(tree["distances"]), f"{tree['descent_ms']:.3f}"],
                        ["every leaf", str(tree["leaves"]), f"{tree['exhaustive_ms']:.2f}"],
                    ],
                ),
                "## Numbers to reach",
                grid(["number", "goal", "found", "reached"], goals),
            ]
        )
        + "\n"
    )


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / f"bank-{datetime.date.today()}.json")
    results = parser.parse_args().results
    document: dict[str, Any] = {"schema": "memc.benchmark.bank/1", **facts()}
    with tempfile.TemporaryDirectory(prefix="memc-bank-") as name:
        work = Path(name)
        whole = [cluster for level in SHAPE.storing() for cluster in SHAPE.all_clusters(level)]
        folder = write_bank(work / "tree", SHAPE, whole)
        document["fetch"] = cold_and_warm(folder)
        document["placement"] = placement(work, folder)
    document["descent"] = descent()
    save(results, document, page)
    print(results.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

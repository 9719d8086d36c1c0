"""A bank that is open: which clusters a text belongs to, and their blocks. No torch."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memc.bank.encoder import Encoder
from memc.bank.layout import MATRICES, BankShape, Cluster, parse_cluster
from memc.bank.manifest import ENCODER, PASSAGES, RECORDS, TREE, BankManifest, read_manifest
from memc.bank.passages import Passages
from memc.bank.records import RecordFile
from memc.bank.tiers import DISK, Placement, Tier, memory, place
from memc.bank.tree import Tree, TreePath
from memc.errors import MemcError

F32 = npt.NDArray[np.float32]

MEMORY = 1 << 28
"""Bytes of memory for records unless said otherwise: half for pinned levels, half for those last used."""

AHEAD = 16
"""Most records that are read ahead and not yet fetched."""


@dataclass
class FetchCost:
    """What fetching has cost so far: records and bytes read, records that were in memory already, seconds waited."""

    read: int = 0
    bytes: int = 0
    reused: int = 0
    seconds: float = 0.0


class Bank:
    """A bank that is open for reading.

    Shallow levels that fit into half of ``memory`` bytes are read once and stay; of deeper ones the records last used
    stay in the other half, so that a conversation, or a stream of prompts alike, reads each once. What ``deny`` names
    is never read.
    """

    def __init__(
        self,
        folder: Path,
        manifest: BankManifest,
        *,
        deny: Sequence[Cluster] = (),
        generic: bool = False,
        memory_bytes: int = MEMORY,
        threads: int | None = None,
    ) -> None:
        """Open what ``Bank.open`` has checked."""
        self.folder = folder
        self.manifest = manifest
        self.shape: BankShape = manifest.shape
        self.tree = Tree.load(folder / TREE, manifest.branch, self.shape.levels, manifest.encoder.width)
        self.records = RecordFile(folder / RECORDS)
        if self.records.shape != self.shape:
            raise MemcError("E310", "records are not of this bank", str(folder / RECORDS), "build the bank again")
        self.deny = tuple(deny)
        self.generic = generic
        self.cost = FetchCost()
        widening = 4 // self.shape.itemsize  # records are float32 in memory
        self.placements = self.plan([memory(memory_bytes // 2 // widening), DISK])
        self._pinned = {p.level for p in self.placements if p.tier is not DISK}
        pinned_bytes = sum(p.level_bytes for p in self.placements if p.level in self._pinned)
        self._room = memory_bytes - pinned_bytes * widening
        self._held: dict[Cluster, F32] = {}
        self._recent: OrderedDict[Cluster, F32] = OrderedDict()
        self._ahead: dict[Cluster, Future[F32]] = {}
        self._last: tuple[list[Cluster], F32] | None = None
        self._reader = ThreadPoolExecutor(1, "memc-bank")
        self._threads = threads

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        deny: Iterable[str] = (),
        generic: bool = False,
        memory_bytes: int = MEMORY,
        threads: int | None = None,
        verify: bool = False,
    ) -> Bank:
        """Open the bank in a folder.

        ``deny`` names clusters (``0.3.1``) that are never read, with all below them. With ``generic`` a text that is
        like nothing in the bank gets the generic block, if it is trained; ``memory_bytes`` is for records, ``threads``
        for the encoder. ``verify`` checks the digest of every file. Raises ``MemcError``: E310 no bank, or
        an incomplete one; E402 a digest differs; E200 a denied cluster that there is not.
        """
        place = Path(folder)
        manifest = read_manifest(place, verify=verify)
        denied = [parse_cluster(text, manifest.shape) for text in deny]
        bank = cls(place, manifest, deny=denied, generic=generic, memory_bytes=memory_bytes, threads=threads)
        if verify:
            for level in (-1, *bank.shape.storing()):
                for cluster in bank.shape.all_clusters(level):
                    bank.records.read(cluster)
        return bank

    @cached_property
    def encoder(self) -> Encoder:
        """The sentence encoder, loaded when first needed. Raises ``MemcError`` as ``Encoder``."""
        return Encoder(self.folder / ENCODER, self.manifest.encoder, threads=self._threads)

    @cached_property
    def passages(self) -> Passages:
        """The passages that the bank was built from. Raises ``MemcError`` E310 when they are incomplete."""
        return Passages(self.folder / PASSAGES, self.manifest.encoder.width, self.shape.levels)

    def plan(self, tiers: Sequence[Tier]) -> list[Placement]:
        """Return where each level would lie among ``tiers``, fast ones first, and what a fetch would take there."""
        return place(self.shape, tiers)

    def predicted_seconds(self) -> float:
        """Return what fetching one path takes where nothing of it is in memory but pinned levels."""
        return sum(placement.seconds for placement in self.placements)

    def retrieve(self, query: str | npt.ArrayLike, *, blank: bool = False) -> TreePath:
        """Return the clusters of a text, or of an embedding ``[width]``: ``levels * branch`` distances.

        With ``blank`` a text of which the encoder knows nothing belongs where such passages of the bank do. Raises
        ``MemcError``: E205 an empty text otherwise, E310 an embedding of another width, E403 one that is not finite.
        """
        if isinstance(query, str):
            return self.tree.descend(self.encoder.encode([query], blank=blank)[0])
        embedding = np.asarray(query, np.float32)
        if embedding.shape != (self.tree.width,):
            reason = f"embedding has shape {list(embedding.shape)}, the bank's have [{self.tree.width}]"
            raise MemcError("E310", reason, str(self.folder), "use the encoder that the bank was built with")
        if not np.isfinite(embedding).all():
            raise MemcError("E403", "embedding is not finite", str(self.folder))
        return self.tree.descend(embedding)

    def used(self, path: TreePath) -> list[Cluster]:
        """Return the clusters of a path whose records are fetched: near ones that are trained and not denied.

        The generic block, of the root, comes alone.
        """
        if path.depth == 0:
            return [()] if self.generic and self.records.trained(()) else []
        near = [path.near[: level + 1] for level in self.shape.storing() if level < path.depth]
        return [cluster for cluster in near if not self._is_denied(cluster) and self.records.trained(cluster)]

    def fetch(self, path: TreePath) -> F32:
        """Return the block of a path, ``[layers, 3, units, width]`` float32; zeros where there is none to be used.

        Units of all levels stand one after the other, the coarsest first, in ``gate``, ``up`` and ``down`` alike. The
        block is not to be written to: the same clusters again give the same one. Raises ``MemcError``: E402 a record is
        damaged, E310 the file was cut short.
        """
        began = time.perf_counter()
        shape, used = self.shape, self.used(path)
        if self._last is not None and self._last[0] == used:
            self.cost.reused += len(used)
            return self._last[1]
        self.records.announce(cluster for cluster in used if not self._is_held(cluster))
        block = np.zeros((len(shape.layers), len(MATRICES), shape.units, shape.width), np.float32)
        for cluster in used:
            level = len(cluster) - 1
            start = sum(shape.ranks[: max(level, 0)])
            block[:, :, start : start + shape.rank(level)] = self._record(cluster)
        block.setflags(write=False)
        self._last = used, block
        self.cost.seconds += time.perf_counter() - began
        return block

    def inputs(self, paths: Sequence[TreePath]) -> dict[str, F32]:
        """Return what a rewritten model takes: ``bank_<layer>`` with blocks ``[B, 3, units, width]``, one a path.

        They are not to be written to.
        """
        first, *others = [self.fetch(path)[None] for path in paths]
        blocks = np.concatenate([first, *others]) if others else first
        found = {f"bank_{layer}": np.ascontiguousarray(blocks[:, i]) for i, layer in enumerate(self.shape.layers)}
        for block in found.values():
            block.setflags(write=False)  # so that a device is sent each once
        return found

    def prefetch(self, path: TreePath) -> None:
        """Start reading the records of a path that are not in memory, beside whatever else is done."""
        for cluster in self.used(path):
            if not self._is_held(cluster):
                self._ahead[cluster] = self._reader.submit(self.records.read, cluster)
        while len(self._ahead) > AHEAD:
            self._ahead.pop(next(iter(self._ahead))).cancel()

    def pin(self) -> None:
        """Read all records of the levels that stay in memory now, and not when first used."""
        for level in sorted(self._pinned):
            for cluster in self.shape.all_clusters(level):
                if not self._is_denied(cluster) and self.records.trained(cluster) and cluster not in self._held:
                    self._held[cluster] = self.records.read(cluster)

    def _is_denied(self, cluster: Cluster) -> bool:
        return any(cluster[: len(denied)] == denied for denied in self.deny)

    def _is_held(self, cluster: Cluster) -> bool:
        return cluster in self._held or cluster in self._recent or cluster in self._ahead

    def _record(self, cluster: Cluster) -> F32:
        held: dict[Cluster, F32] | OrderedDict[Cluster, F32]
        held = self._held if len(cluster) - 1 in self._pinned else self._recent
        if cluster in held:
            self.cost.reused += 1
        else:
            ahead = self._ahead.pop(cluster, None)
            held[cluster] = self.records.read(cluster) if ahead is None else ahead.result()
            self.cost.read += 1
            self.cost.bytes += self.shape.record_bytes(len(cluster) - 1)
        record = held[cluster]
        if held is self._recent:
            self._recent.move_to_end(cluster)
            while len(self._recent) > 1 and sum(each.nbytes for each in self._recent.values()) > self._room:
                self._recent.popitem(last=False)
        return record

    def reopen(self) -> None:
        """Read records that were written since, from now on; what was in memory is forgotten."""
        self.records.close()
        self.records = RecordFile(self.folder / RECORDS)
        self._last = None
        for held in (self._held, self._recent, self._ahead):
            held.clear()

    def close(self) -> None:
        """Close the files."""
        self._reader.shutdown()
        self.records.close()

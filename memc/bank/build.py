"""``memc bank build``: from text to a bank whose blocks are still zero. Every step goes on where it was killed."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memc import __version__
from memc.bank.encoder import EncoderFacts
from memc.bank.layout import BankShape, Dtype
from memc.bank.manifest import ENCODER, PASSAGES, RECORDS, TREE, BankManifest, seal
from memc.bank.passages import EMBEDDINGS, ENDS, write_passages
from memc.bank.records import write_records
from memc.bank.sentence import prepare_encoder
from memc.bank.tasks import BLOCK, ROWS, AssignBlock, EmbedBlock, FitNode, Levels
from memc.bank.tree import Tree
from memc.bank.workers import Workers
from memc.conversion.folder import OutFolder, require_space, resume_key
from memc.data import source_digest
from memc.errors import MemcError
from memc.frontend import capture_source
from memc.machine import memory_bytes
from memc.partial import writing
from memc.progress import Progress, Silent
from memc.raising import raise_program

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

ENCODER_BYTES = 250_000_000
"""Disk that a converted encoder is taken to need before it is there."""

NEAR = 0.99
"""Share of the passages that are within the limit of their cluster."""


@dataclass(frozen=True)
class BuildOptions:
    """What a bank is built with.

    ``ranks`` are the hidden units of each level, ``branch`` the children of a cluster, ``characters`` the most of a
    passage. Raises ``MemcError`` E200 for sizes that are no bank.
    """

    ranks: tuple[int, ...]
    branch: int
    encoder: str
    characters: int = 1000
    dtype: Dtype = "float32"
    seed: int = 0
    threads: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the sizes."""
        if not self.ranks or min(self.ranks) < 0 or max(self.ranks) == 0:
            raise MemcError("E200", "a bank stores something on one level at least", "--ranks", "like 64,16")
        if self.branch < 2:
            raise MemcError("E200", "a cluster has at least 2 children", "--branch", "give 2 or more")


@dataclass(frozen=True)
class BankModel:
    """The model that a bank is for: its name, its digest, the layers that have a feed-forward block, its width."""

    name: str
    digest: str
    layers: tuple[int, ...]
    width: int

    @classmethod
    def of(cls, model: str, *, remote_code: bool = False) -> BankModel:
        """Look at a model. Raises ``MemcError`` as ``capture_source``, and E307 for one without feed-forward blocks."""
        captured = capture_source(model, remote_code=remote_code)
        raised = raise_program(captured.program)
        blocks = [block for block in raised.blocks if block.kind == "feed_forward"]
        if not blocks:
            hint = "memc inspect MODEL --why says what it has"
            raise MemcError("E307", "model has no feed-forward block that a bank could add to", model, hint)
        (width,) = {block.width for block in blocks}
        info = captured.program.model
        return cls(info.source, info.digest, tuple(sorted({block.layer for block in blocks})), width)

    def only(self, layers: Collection[int]) -> BankModel:
        """Return the model with some of its layers alone. Raises ``MemcError`` E200 for none, or one that has not."""
        if missing := sorted(set(layers) - set(self.layers)):
            message = f"layer {missing[0]} has no feed-forward block that a bank could add to"
            raise MemcError("E200", message, "--layers", f"give some of {', '.join(map(str, self.layers))}")
        if not layers:
            raise MemcError("E200", "a bank adds to one layer at least", "--layers", "like 0,5,7")
        return replace(self, layers=tuple(sorted(set(layers))))


def build_bank(
    model: BankModel,
    data: Sequence[str],
    out: Path,
    options: BuildOptions,
    *,
    fresh: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> BankManifest:
    """Build a bank for ``model`` from the text of ``data`` in the folder ``out``, whole or not at all.

    Passages are embedded, clustered level by level, and kept; records stay empty until they are trained. The same
    text, model, encoder and options give the same bank on the same machine, however often it was killed and run again,
    and whoever ``workers`` are: this process, unless said otherwise.

    Raises ``MemcError``: E204 ``out`` is in the way, E207 data that hold no text or fewer passages than clusters, E501
    and E502 too little memory or disk; and as ``prepare_encoder`` for the encoder.
    """
    progress, workers = progress or Silent(), workers or Workers()
    digests = [source_digest(source) for source in data]
    folder = OutFolder(out)
    folder.refuse_existing("", {}, force=force, sources=data)
    shape = BankShape(options.branch, options.ranks, model.layers, model.width, options.dtype)
    _require_disk(out, data, shape)
    key = resume_key("bank", repr(model), repr(options), *digests)
    if folder.open(key, fresh=fresh):
        progress.note(f"going on with {folder.partial}")
    place = folder.partial
    encoder_facts = prepare_encoder(options.encoder, place / ENCODER, progress)
    count = _cut(place, data, shape, options, progress)
    _require_memory(count, encoder_facts.width, shape)
    _embed(place, encoder_facts, count, options, progress, workers)
    tree = _cluster(place, count, encoder_facts.width, shape, options.seed, progress, workers)
    tree.save(place / TREE)
    write_records(place / RECORDS, shape, ())
    manifest = BankManifest(
        version=__version__,
        model=model.name,
        model_digest=model.digest,
        **vars(shape),
        encoder=encoder_facts,
        passages=count,
        passage_characters=options.characters,
        sources=[Path(source).name for source in data],
        seed=options.seed,
    )
    for path in place.glob("*.npy"):
        path.unlink()
    seal(place, manifest)
    folder.finish()
    shutil.rmtree(out / "report", ignore_errors=True)  # its mark as a folder of ours
    return manifest


def _require_disk(out: Path, data: Sequence[str], shape: BankShape) -> None:
    """Raise ``MemcError`` E502 where text, embeddings of it, tree and encoder cannot fit."""
    text = sum(Path(source).stat().st_size for source in data if Path(source).is_file())
    tree = 4 * 384 * sum(shape.clusters(level) for level in range(shape.levels))
    require_space(out, 4 * text + tree + ENCODER_BYTES)


def _require_memory(count: int, width: int, shape: BankShape) -> None:
    tree = sum(shape.clusters(level) for level in range(shape.levels)) * (4 * width + 8)
    needed = 2 * tree + count * 24 * shape.levels
    limit = memory_bytes()
    if limit is not None and needed > 0.8 * limit:
        reason = f"clustering needs {needed / 1e9:.1f} GB of memory, the machine has {limit / 1e9:.1f} GB"
        raise MemcError("E501", reason, next="give fewer --levels or a lower --branch")


def _cut(place: Path, data: Sequence[str], shape: BankShape, options: BuildOptions, progress: Progress) -> int:
    """Write the passages' text unless it is there, and return how many there are."""
    folder = place / PASSAGES
    if not folder.is_dir():
        partial = place / (PASSAGES + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with progress.step("cut passages"):
            write_passages(partial, data, options.characters)
        partial.rename(folder)
    count = (folder / ENDS).stat().st_size // 8
    leaves = shape.clusters(shape.levels - 1)
    if count < leaves:
        reason = f"data give {count} passages, fewer than the {leaves} clusters of the last level"
        raise MemcError("E207", reason, next="give more text, or fewer --levels, a lower --branch or --passage")
    return count


def _embed(
    place: Path, facts: EncoderFacts, count: int, options: BuildOptions, progress: Progress, workers: Workers
) -> None:
    """Append the embeddings of the passages that have none yet."""
    row, path = 4 * facts.width, place / PASSAGES / EMBEDDINGS
    size = path.stat().st_size if path.is_file() else 0
    done = count if size == count * row else size // row // BLOCK * BLOCK
    if done == count:
        return
    make = partial(EmbedBlock, place, facts, count, options.threads)
    with progress.step("embed passages", count) as advance, path.open("ab") as stream:
        stream.truncate(done * row)
        advance(done)
        for made in workers.map(make, range(done // BLOCK, -(-count // BLOCK))):
            stream.write(made.tobytes())
            stream.flush()
            done += len(made)
            advance(len(made), f"{done} passages")


def _cluster(
    place: Path, count: int, width: int, shape: BankShape, seed: int, progress: Progress, workers: Workers
) -> Tree:
    """Fit the tree level by level, write the clusters of every passage, and return the tree."""
    levels: Levels = Levels(place, count, width, shape)
    centroids, counts, limits = [], [], []
    places = levels.places("w+")
    for level in range(shape.levels):
        path = levels.centroids(level)
        if not path.is_file():
            _save(path, _fit_level(levels, level, seed, progress, workers))
        centroids.append(np.load(path))
        distances = np.empty(count, np.float32)
        with progress.step(f"sort into level {level}", count) as advance:
            start = 0
            for chosen, far in workers.map(partial(AssignBlock, levels, level), range(-(-count // ROWS))):
                rows = slice(start, start + len(chosen))
                places[rows, level], distances[rows] = chosen, far
                start = rows.stop
                advance(len(chosen), f"{start} passages")
        places.flush()
        counts.append(np.bincount(places[:, level], minlength=shape.clusters(level)))
        limits.append(_limit(distances, counts[level][places[:, level]]))
    return Tree(shape.branch, tuple(centroids), tuple(counts), tuple(limits))


def _fit_level(levels: Levels, level: int, seed: int, progress: Progress, workers: Workers) -> F32:
    shape = levels.shape
    nodes = shape.clusters(level - 1) if level else 1
    parents = levels.places("r")[:, level - 1] if level else np.zeros(levels.count, np.int64)
    _save(levels.members, np.argsort(parents, kind="stable"))
    ends = np.cumsum(np.bincount(parents, minlength=nodes))
    fitted = []
    with progress.step(f"cluster level {level}", nodes) as advance:
        for centroids in workers.map(partial(FitNode, levels, level, seed, ends), range(nodes)):
            fitted.append(centroids)
            advance(1, f"{len(fitted)} nodes")
    return np.concatenate(fitted)


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    with writing(path) as stream:
        np.save(stream, array)


def _limit(distances: F32, sizes: I64) -> float:
    """Return the distance that ``NEAR`` of the passages would keep had their cluster been made without them.

    A centroid is the mean of its passages, so that leaving one of n out moves it away by a factor of n / (n - 1).
    """
    several = sizes > 1
    if not several.any():
        return float(distances.max())
    return float(np.quantile(distances[several] * sizes[several] / (sizes[several] - 1), NEAR))

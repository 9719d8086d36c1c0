"""What there is to say of a bank, as the document of ``memc bank inspect``."""

from __future__ import annotations

import numpy as np

from memc.bank.bank import Bank
from memc.bank.layout import Cluster, name
from memc.report.models.banks import BankCluster, BankDocument, BankLevel, BankPassage

NEAREST = 5
"""Passages that are shown of a cluster."""


def describe(bank: Bank, cluster: Cluster | None = None) -> BankDocument:
    """Describe a bank, and one of its clusters with the passages nearest to its centroid."""
    manifest, shape = bank.manifest, bank.shape
    per_source = np.bincount(bank.passages.sources, minlength=len(manifest.sources))
    unit = len(shape.layers) * 3 * shape.width
    return BankDocument(
        bank=str(bank.folder),
        model=manifest.model,
        model_digest=manifest.model_digest,
        encoder=manifest.encoder.source,
        encoder_width=manifest.encoder.width,
        branch=shape.branch,
        layers=list(shape.layers),
        width=shape.width,
        dtype=shape.dtype,
        seed=manifest.seed,
        passages=len(bank.passages),
        sources=dict(zip(manifest.sources, per_source.tolist(), strict=True)),
        fetched_parameters=unit * shape.units,
        bank_parameters=unit * sum(rank * shape.clusters(level) for level, rank in enumerate(shape.ranks)),
        disk_bytes=sum(path.stat().st_size for path in bank.folder.rglob("*") if path.is_file()),
        predicted_seconds=bank.predicted_seconds(),
        levels=[_level(bank, level) for level in range(shape.levels)],
        cluster=None if cluster is None else _cluster(bank, cluster),
    )


def _level(bank: Bank, level: int) -> BankLevel:
    shape, counts = bank.shape, bank.tree.counts[level]
    held = counts[counts > 0]
    placement = next((each for each in bank.placements if each.level == level), None)
    return BankLevel(
        level=level,
        rank=shape.ranks[level],
        clusters=len(counts),
        empty=int((counts == 0).sum()),
        trained=sum(map(bank.records.trained, shape.all_clusters(level))) if shape.ranks[level] else 0,
        smallest=int(held.min()),
        median=float(np.median(held)),
        largest=int(held.max()),
        balance=float(held.max() / counts.mean()),
        limit=bank.tree.limits[level],
        record_bytes=shape.record_bytes(level),
        level_bytes=shape.level_bytes(level),
        tier=placement.tier.name if placement else "",
        seconds=placement.seconds if placement else 0.0,
    )


def _cluster(bank: Bank, cluster: Cluster) -> BankCluster:
    shape, level = bank.shape, len(cluster) - 1
    number = shape.number(cluster)
    children = bank.tree.counts[level + 1] if level + 1 < shape.levels else np.zeros(0, np.int64)
    members = bank.passages.members(level, number)
    nearest = bank.passages.nearest(bank.tree.centroids[level][number], members, NEAREST)
    return BankCluster(
        cluster=name(cluster),
        passages=len(members),
        trained=bank.records.trained(cluster),
        children=children[number * shape.branch : (number + 1) * shape.branch].tolist(),
        nearest=[
            BankPassage(
                index=index,
                source=bank.manifest.sources[int(bank.passages.sources[index])],
                distance=distance,
                text=bank.passages.text(index),
            )
            for index, distance in nearest
        ],
    )

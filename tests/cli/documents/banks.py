"""Documents of banks."""

from __future__ import annotations

from memc.report.models import banks as b
from tests.cli.documents.models import MODEL


def bank(*, trained: bool = False, cluster: bool = False) -> b.BankDocument:
    levels = [
        b.BankLevel(
            level=level,
            rank=rank,
            clusters=16 ** (level + 1),
            empty=3 if level == 2 else 0,
            trained=16 ** (level + 1) - level if trained and rank else 0,
            smallest=812 // 16**level,
            median=1000 / 16**level,
            largest=1466 // 16**level,
            balance=1.4375 + level,
            limit=0.96875,
            record_bytes=6 * 30 * 576 * rank,
            level_bytes=6 * 30 * 576 * rank * 16 ** (level + 1),
            tier=tier,
            seconds=seconds,
        )
        for level, (rank, tier, seconds) in enumerate([(64, "memory", 0.001), (16, "disk", 0.0025), (0, "", 0.0)])
    ]
    found = b.BankCluster(
        cluster="0.3",
        passages=62,
        trained=trained,
        children=[4] * 15 + [2],
        nearest=[
            b.BankPassage(index=17, source="novels.txt", distance=0.5, text="Emma Woodhouse,\nhandsome, clever"),
            b.BankPassage(index=1811, source="notes.jsonl", distance=0.5625, text="kludge \x1b[31m " + "word " * 90),
        ],
    )
    return b.BankDocument(
        bank="bank",
        model=MODEL.source,
        model_digest=MODEL.digest,
        encoder="sentence-transformers/all-MiniLM-L6-v2",
        encoder_width=384,
        branch=16,
        layers=list(range(30)),
        width=576,
        dtype="bfloat16",
        seed=0,
        passages=16_000,
        sources={"novels.txt": 12_000, "notes.jsonl": 4_000},
        fetched_parameters=90 * 576 * 80,
        bank_parameters=90 * 576 * (64 * 16 + 16 * 256),
        disk_bytes=600_000_000,
        predicted_seconds=0.0035,
        levels=levels,
        cluster=found if cluster else None,
    )


def bank_trained() -> b.BankTrainDocument:
    jobs = [
        b.BankJob(
            job=job,
            passages=passages,
            blocks=17,
            steps=passages,
            tokens=256 * passages,
            loss_first=3.75,
            loss_last=3.25 if passages else None,
            seconds=passages / 2,
        )
        for job, passages in (("0", 812), ("15", 1466), ("generic", 2278))
    ]
    rows = [
        b.BankHeldOut(cluster="0", tokens=2040, original=38.5, block=32.25, generic=32.5, wrong=39.125),
        b.BankHeldOut(cluster="15", tokens=1530, original=50.25, block=34.5, generic=None, wrong=51.0),
    ]
    return b.BankTrainDocument(bank="bank", jobs=jobs, held_out=rows)

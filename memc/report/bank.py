"""The terminal views of what the commands of ``memc bank`` say."""

from __future__ import annotations

from rich.console import RenderableType

from memc.report.layout import lines, stack, table, titled
from memc.report.models.banks import BankCluster, BankDocument, BankFuseDocument, BankLevel, BankTrainDocument
from memc.report.terminal import checks_table
from memc.report.text import amount, duration, layers, number, size

SHOWN = 70
"""Characters of a passage that are shown in a table."""


def bank_train_view(document: BankTrainDocument) -> RenderableType:
    """Show what was trained, and perplexities of the passages that were held out."""
    jobs = [
        (
            job.job,
            str(job.passages),
            str(job.blocks),
            amount(job.tokens),
            f"{number(job.loss_first)} -> {number(job.loss_last)}",
            duration(job.seconds),
        )
        for job in document.jobs
    ]
    rows = [
        (row.cluster, str(row.tokens), *map(number, (row.original, row.block, row.generic, row.wrong)))
        for row in document.held_out
    ]
    totals = [("over original", "", "1", *(number(document.ratio(side)) for side in ("block", "generic", "wrong")))]
    columns = ["cluster", ">tokens", ">without", ">its own", ">generic", ">a wrong one"]
    return stack(
        lines([document.bank]),
        table(["job", ">passages", ">blocks", ">tokens", ">loss", ">time"], jobs),
        titled("perplexity of held-out passages, by block", table(columns, [*rows, *totals])) if rows else None,
    )


def bank_fuse_view(document: BankFuseDocument) -> RenderableType:
    """Show what became part of a model, and where."""
    what = f"{', '.join(document.used)} of {document.bank}: {amount(document.parameters)} parameters more"
    where = [
        f"layers {layers(chosen)} {how}"
        for chosen, how in (
            (document.wider, "have a wider feed-forward network"),
            (document.beside, "have the units beside their feed-forward network"),
        )
        if chosen
    ]
    return stack(
        lines([f"{document.source} -> {document.out}", what, *where]),
        titled("checks", checks_table(document.checks)),
        titled("next", lines(f"  {command}" for command in document.next)),
    )


def bank_view(document: BankDocument) -> RenderableType:
    """Show the tree of a bank, its sizes and balance; of one cluster its nearest passages."""
    encoder = f"{document.encoder} (width {document.encoder_width})"
    facts = [
        document.bank,
        f"for {document.model}, layers {layers(document.layers)} of width {document.width}, {document.dtype}",
        f"{amount(document.passages)} passages by {encoder}, seed {document.seed}",
        f"a path adds {amount(document.fetched_parameters)} parameters, of {amount(document.bank_parameters)} in all; "
        f"fetching it takes {document.predicted_seconds * 1000:.3g} ms (predicted)",
    ]
    return stack(
        lines(facts),
        table(
            ["level", ">units", ">clusters", ">trained", ">passages", ">balance", ">record", "in"],
            map(_level, document.levels),
        ),
        lines(f"level {row.level}: {row.empty} clusters have no passages" for row in document.levels if row.empty),
        titled("sources", table(["file", ">passages"], [(n, str(c)) for n, c in document.sources.items()])),
        _cluster(document.cluster) if document.cluster else None,
        None if any(level.trained for level in document.levels) else lines(["untrained: every block is zero"]),
    )


def _level(level: BankLevel) -> tuple[str, ...]:
    stored = level.rank > 0
    return (
        str(level.level),
        str(level.rank),
        str(level.clusters),
        str(level.trained) if stored else "-",
        f"{level.smallest}-{level.largest}",
        number(level.balance),
        size(level.record_bytes) if stored else "-",
        level.tier or "-",
    )


def _cluster(cluster: BankCluster) -> RenderableType:
    state = "trained" if cluster.trained else "untrained"
    rows = [(number(p.distance), str(p.index), p.source, _brief(p.text)) for p in cluster.nearest]
    children = lines([", ".join(map(str, cluster.children))]) if cluster.children else None
    return stack(
        lines([f"cluster {cluster.cluster}: {cluster.passages} passages, {state}"]),
        titled("passages of its children", children),
        titled("nearest passages", table([">distance", ">index", "file", "text"], rows)) if rows else None,
    )


def _brief(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."

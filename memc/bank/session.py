"""A session that fetches: for each sequence, once, the blocks of a bank that its text belongs to. No torch."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from memc.artifact import Manifest
from memc.bank.bank import Bank
from memc.bank.layout import name
from memc.bank.manifest import require_model
from memc.bank.tree import TreePath
from memc.errors import MemcError
from memc.report.models.banks import BankUse
from memc.runtime.inputs import Fetched
from memc.runtime.rows import Ids, full_rows, id_rows
from memc.runtime.session import Session
from memc.runtime.state import SessionState

F32 = npt.NDArray[np.float32]


class BankSession(Session):
    """A session in which every sequence that starts gets the blocks of its own tokens' text.

    What is given as fetched, or held by a state that has seen tokens, stays as it is.
    """

    def __init__(self, session: Session, bank: Bank) -> None:
        """Join a session and a bank. Raises as :func:`require_bank`."""
        require_bank(session.manifest, session.folder, bank)
        super().__init__(session.folder, session.manifest, session.runner, chunk=session.chunk)
        self.bank = bank
        self._reading = threading.Lock()

    def logit_chunks(
        self, ids: Ids, *, chunk: int | None = None, inputs: Mapping[str, npt.ArrayLike] | None = None
    ) -> Iterator[tuple[int, F32]]:
        """Yield logits as ``Session.logit_chunks``; what is not in ``inputs`` is fetched by the text of each row."""
        rows = full_rows(ids, self.manifest, self.folder)
        fetched = self.fetch(rows)
        return super().logit_chunks(rows, chunk=chunk, inputs={**fetched, **(inputs or {})})

    def prefill(self, ids: Ids, state: SessionState, *, fetched: Fetched | None = None) -> F32:
        """Run tokens as ``Session.prefill``; the first ones settle what is fetched."""
        rows = id_rows(ids, self.manifest, self.folder)
        if not fetched and not state.lengths.any():
            fetched = self.fetch(rows)
        return super().prefill(rows, state, fetched=fetched)

    def fetch(self, rows: Sequence[npt.NDArray[np.int64]]) -> dict[str, F32]:
        """Return the blocks that the text of each row belongs to; from any thread, one after the other.

        A row may be a window of a text, cut where nothing but spaces or rules is: it fetches what such passages do.
        """
        with self._reading:
            return self.bank.inputs([self.bank.retrieve(self.decode(row.tolist()), blank=True) for row in rows])


def require_bank(manifest: Manifest, folder: Path, bank: Bank) -> None:
    """Raise ``MemcError`` where the artifact in a folder cannot take a bank's blocks.

    E208 when it has no input for them, E310 when the bank is for another model, or its blocks have another shape.
    """
    shape = bank.shape
    ports = {port.name: list(port.shape[1:]) for port in manifest.inputs if port.role == "fetched"}
    ranks = ":".join(map(str, shape.ranks))
    hint = f"memc convert MODEL -o OUT --pass memory_bank:ranks={ranks}"
    if not ports:
        raise MemcError("E208", "artifact takes no blocks of a bank", str(folder), hint)
    require_model(bank.manifest, manifest.source_digest, str(folder))
    wanted = {f"bank_{layer}": [3, shape.units, shape.width] for layer in shape.layers}
    if ports != wanted:
        reason = "artifact takes blocks of other layers or units than the bank has"
        if ports.keys() != wanted.keys():
            hint += f",layers=[{','.join(map(str, shape.layers))}]"
        raise MemcError("E310", reason, str(folder), hint)


def fetch_for(bank: Bank, texts: Sequence[str]) -> tuple[dict[str, F32], list[BankUse]]:
    """Retrieve and fetch for some texts; return the inputs of the model, and what was used and what it cost."""
    inputs: list[dict[str, F32]] = []
    uses: list[BankUse] = []
    for text in texts:
        began, read, size = time.perf_counter(), bank.cost.read, bank.cost.bytes
        path = bank.retrieve(text)
        retrieved = time.perf_counter()
        inputs.append(bank.inputs([path]))
        uses.append(_use(bank, path, retrieved - began, read, size, time.perf_counter() - retrieved))
    return {each: np.concatenate([found[each] for found in inputs]) for each in inputs[0]}, uses


def _use(bank: Bank, path: TreePath, retrieving: float, read: int, size: int, fetching: float) -> BankUse:
    return BankUse(
        bank=str(bank.folder),
        cluster=name(path.cluster),
        near=name(path.near) if path.near else "",
        distances=list(path.distances),
        limits=list(bank.tree.limits),
        used=[name(cluster) for cluster in bank.used(path)],
        records_read=bank.cost.read - read,
        bytes_read=bank.cost.bytes - size,
        retrieve_seconds=retrieving,
        fetch_seconds=fetching,
    )

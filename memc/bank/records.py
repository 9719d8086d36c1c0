"""The file of a bank's records: an index that stays in memory, and one aligned piece a cluster, checked when read.

The file is ``memcbank``, a version, the length of a JSON header, the digest of header and index; header; index; then
the records, each ``[layers, 3, units, width]`` and aligned to a page, so that fetching one is one sequential read. The
index has an offset and a digest for the generic block and for every cluster of every level that stores something. What
is at offset 0 has not been trained; its block is zero.

Digests are XXH3 in 128 bits: damage is found as surely as by sha256, in a tenth of its time, which would be as long as
the read. Neither says that whoever wrote a bank can be trusted.

Records are read by position and not through a mapping: a mapping kills the process when the file is cut short under it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError
from xxhash import xxh3_128, xxh3_128_digest

from memc.bank.layout import BankShape, Cluster, Dtype, name
from memc.errors import MemcError
from memc.partial import writing

F32 = npt.NDArray[np.float32]

ALIGN = 4096
VERSION = 2
_PART = 1 << 20
_MAGIC = b"memcbank"
_PREFIX = struct.Struct("<8sII16s")
_ENTRY = np.dtype([("offset", "<u8"), ("digest", "V16")])
_AGAIN = "build the bank again, or copy it anew from where it is whole"


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    branch: int
    ranks: tuple[int, ...]
    layers: tuple[int, ...]
    width: int
    dtype: Dtype


def write_records(path: Path, shape: BankShape, records: Iterable[tuple[Cluster, F32]]) -> None:
    """Write a file of records ``[layers, 3, units, width]`` float32, whole or not at all.

    Clusters that do not come are untrained. The same records in the same order give the same bytes. Raises
    ``MemcError`` E403 for values that are not finite.
    """
    header = _Header(**vars(shape)).model_dump_json().encode()
    index = _empty_index(shape)
    with writing(path) as stream:
        stream.seek(_align(_PREFIX.size + len(header) + index.nbytes))
        for cluster, record in records:
            _write_record(stream, index, shape, cluster, record)
        stream.truncate(stream.tell())
        body = header + index.tobytes()
        stream.seek(0)
        stream.write(_PREFIX.pack(_MAGIC, VERSION, len(header), xxh3_128_digest(body)) + body)
        stream.flush()
        os.fsync(stream.fileno())


def _write_record(stream: IO[bytes], index: npt.NDArray[Any], shape: BankShape, cluster: Cluster, record: F32) -> None:
    assert record.shape == shape.record_shape(len(cluster) - 1), "a record has the shape of its level"
    if not np.isfinite(record).all():
        raise MemcError("E403", f"block of cluster {name(cluster)} is not finite", next="train with a lower --rate")
    data = _narrow(record, shape.dtype).tobytes()
    index[_slot(shape, cluster)] = (stream.tell(), np.void(xxh3_128_digest(data)))
    stream.write(data + b"\0" * (-len(data) % ALIGN))


class RecordFile:
    """A file of records that is open for reading; its index is in memory."""

    def __init__(self, path: Path) -> None:
        """Open a file and check its header, its index and its length.

        Raises ``MemcError`` E310 when it is missing, is no file of records, has another version, or is shorter than its
        index says; E402 when header or index are damaged.
        """
        self.path = path
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise MemcError("E310", f"records cannot be read: {error.strerror}", str(path), _AGAIN) from error
        try:
            self.shape, self._index = self._read_index()
        except MemcError:
            self._stream.close()
            raise

    def _read_index(self) -> tuple[BankShape, npt.NDArray[Any]]:
        prefix = self._stream.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size or not prefix.startswith(_MAGIC):
            raise MemcError("E310", "file holds no records of a bank", str(self.path), _AGAIN)
        _, version, length, digest = _PREFIX.unpack(prefix)
        if version != VERSION:
            reason = f"records have version {version}, this memc reads {VERSION}"
            raise MemcError("E310", reason, str(self.path), "use the memc that wrote them")
        size = os.fstat(self._stream.fileno()).st_size
        header = self._stream.read(min(length, size))
        try:
            shape = BankShape(**_Header.model_validate_json(header).model_dump())
        except ValidationError as error:
            raise self._damaged("header") from error
        index = self._stream.read(_empty_index(shape).nbytes)
        if xxh3_128_digest(header + index) != digest:
            raise self._damaged("index")
        entries = np.frombuffer(index, _ENTRY)
        if (end := _end(shape, entries)) > size:
            raise MemcError("E310", f"records are cut short: {size} bytes of {end}", str(self.path), _AGAIN)
        return shape, entries

    def trained(self, cluster: Cluster) -> bool:
        """Tell whether a cluster has a record."""
        return bool(self.shape.rank(len(cluster) - 1)) and int(self._entry(cluster)["offset"]) != 0

    def read(self, cluster: Cluster) -> F32:
        """Return the record of a cluster, ``[layers, 3, units, width]`` float32; zeros where it is untrained.

        Raises ``MemcError``: E402 when its digest differs, E310 when the file ends within it or cannot be read.
        """
        level = len(cluster) - 1
        shape = self.shape.record_shape(level)
        if not self.trained(cluster):
            return np.zeros(shape, np.float32)
        entry = self._entry(cluster)
        data, digest = self._read_bytes(int(entry["offset"]), self.shape.record_bytes(level))
        if digest != entry["digest"].tobytes():
            raise self._damaged(f"record of cluster {name(cluster)}")
        return _widen(data, self.shape.dtype).reshape(shape)

    def announce(self, clusters: Iterable[Cluster]) -> None:
        """Tell the system that these records are read next, so that it fetches one while another is checked."""
        if not hasattr(os, "posix_fadvise"):  # no such call on macOS, and no harm without it
            return
        for cluster in clusters:
            if self.trained(cluster):
                offset, size = int(self._entry(cluster)["offset"]), self.shape.record_bytes(len(cluster) - 1)
                os.posix_fadvise(self._stream.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def _read_bytes(self, offset: int, count: int) -> tuple[npt.NDArray[np.uint8], bytes]:
        """Return some bytes and their digest, which is computed of each part while the next is on its way."""
        data, digest = np.empty(count, np.uint8), xxh3_128()
        done = 0
        try:
            while done < count:
                part = data.data[done : done + _PART]
                got = os.preadv(self._stream.fileno(), [part], offset + done)
                if got == 0:
                    raise MemcError("E310", "file was cut short since it was opened", str(self.path), _AGAIN)
                digest.update(part[:got])
                done += got
        except OSError as error:
            raise MemcError("E310", f"record cannot be read: {error.strerror}", str(self.path), _AGAIN) from error
        return data, digest.digest()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _entry(self, cluster: Cluster) -> Any:
        return self._index[_slot(self.shape, cluster)]

    def _damaged(self, what: str) -> MemcError:
        return MemcError("E402", f"{what} is damaged: its digest differs", str(self.path), _AGAIN)


def _empty_index(shape: BankShape) -> npt.NDArray[Any]:
    return np.zeros(sum(shape.clusters(level) for level in _levels(shape)), _ENTRY)


def _levels(shape: BankShape) -> list[int]:
    return [-1, *shape.storing()]


def _slot(shape: BankShape, cluster: Cluster) -> int:
    level = len(cluster) - 1
    return sum(shape.clusters(above) for above in _levels(shape) if above < level) + shape.number(cluster)


def _end(shape: BankShape, entries: npt.NDArray[Any]) -> int:
    """Return where the last record ends."""
    sizes = np.concatenate([np.full(shape.clusters(level), shape.record_bytes(level)) for level in _levels(shape)])
    written = entries["offset"] != 0
    return int((entries["offset"].astype(np.int64) + sizes)[written].max(initial=0))


def _align(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _narrow(values: F32, dtype: Dtype) -> npt.NDArray[Any]:
    """Return values as they are stored; to bfloat16 they round to nearest, ties to even."""
    plain = np.ascontiguousarray(values, "<f4")
    if dtype == "float32":
        return plain
    bits = plain.view("<u4")
    rounded: npt.NDArray[Any] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2")


def _widen(data: npt.NDArray[np.uint8], dtype: Dtype) -> F32:
    if dtype == "float32":
        plain: F32 = data.view("<f4")
        return plain
    widened: F32 = (data.view("<u2").astype("<u4") << 16).view("<f4")
    return widened

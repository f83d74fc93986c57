"""A strict reader of the zip archives that torch writes: stored records, one index, no gaps for a second meaning.

Two readers that disagree on a file are how a hostile one slips through, so whatever torch itself would not write
is a problem here, even where the format allows it.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass, field

from cupel.checkpoint.text import clean, shown
from cupel.errors import CheckpointError

__all__ = ["MAGIC", "Archive", "Entry", "has_index", "read_archive"]

MAGIC = b"PK\x03\x04"
_END = struct.Struct("<4s4H2LH")
_END64_PLACE = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_INDEX = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_RECORDS = 50_000
_MAX_INDEX_BYTES = 16 * 2**20
_KNOWN_FLAGS = 0x0808  # UTF-8 names, sizes after the data


@dataclass(frozen=True)
class Entry:
    """A record: its name, where its bytes lie, and the checksum they should have."""

    name: str
    start: int
    size: int
    stored: int
    method: int
    checksum: int

    @property
    def is_code(self) -> bool:
        """Source code of TorchScript: the one kind that torch compresses, and that nothing here reads."""
        return "/code/" in self.name and not self.name.endswith(".pkl")


@dataclass
class Archive:
    """The records of an archive, and what is wrong with it; a record that is named twice stands twice."""

    data: mmap.mmap
    entries: list[Entry] = field(default_factory=list)
    problems: list[CheckpointError] = field(default_factory=list)

    def bytes_of(self, entry: Entry) -> memoryview:
        """The stored bytes, not copied."""
        return memoryview(self.data)[entry.start : entry.start + entry.stored]

    def unpacked(self, entry: Entry, limit: int) -> bytes:
        """The bytes of a small record, inflated if need be, at most `limit` of them."""
        packed = self.bytes_of(entry)
        if entry.method == 0:
            return bytes(packed[:limit])
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)
        except zlib.error:
            return b""


def has_index(data: mmap.mmap) -> bool:
    """Does the file end like a zip archive?"""
    return data.rfind(b"PK\x05\x06", max(0, len(data) - 2**16 - _END.size)) >= 0


def read_archive(data: mmap.mmap, where: object) -> Archive:
    """Read the index and check every record against it, checksums included.

    Raises:
        CheckpointError: there is no index to go by. Lesser faults are listed in `Archive.problems`.
    """
    archive = Archive(data)
    offset, size, count, end = _find_index(data, where, archive.problems)
    if count > _MAX_RECORDS or size > _MAX_INDEX_BYTES:
        raise _fault(where, f"holds {count} records, more than any checkpoint", "oversized")
    place = offset
    for _ in range(count):
        if place + _INDEX.size > offset + size:
            raise _fault(where, "has an index that ends early", "truncated")
        place = _read_entry(archive, place, offset, where)
    if place != offset + size or offset + size != end:
        archive.problems.append(_fault(where, "has an index of the wrong size"))
    _check(archive, where)
    return archive


def _fault(
    where: object, what: str, code: str = "malformed", todo: str = "download or copy it again"
) -> CheckpointError:
    return CheckpointError(where, what, todo, code=code)


def _find_index(data: mmap.mmap, where: object, problems: list[CheckpointError]) -> tuple[int, int, int, int]:
    """Offset and size of the index, number of records, and where the index must end."""
    place = data.rfind(b"PK\x05\x06", max(0, len(data) - 2**16 - _END.size))
    if place < 0 or place + _END.size > len(data):
        raise _fault(where, "is cut off: a zip archive without its end", "truncated")
    _, disk, index_disk, here, count, size, offset, comment = _END.unpack_from(data, place)
    if place + _END.size != len(data) or comment:
        problems.append(_fault(where, "has bytes after the end of the archive"))
    if disk or index_disk or here != count:
        problems.append(_fault(where, "claims to be one of several volumes"))
    end = place
    place64 = place - _END64_PLACE.size
    if place64 >= 0 and data[place64 : place64 + 4] == b"PK\x06\x07":
        _, _, start, _ = _END64_PLACE.unpack_from(data, place64)
        if start + _END64.size > place64 or data[start : start + 4] != b"PK\x06\x06":
            raise _fault(where, "has a damaged end of archive")
        count64, size64, offset64 = _END64.unpack_from(data, start)[7:]
        small = (count, size, offset)
        if any(a not in (b, 0xFFFF, 0xFFFFFFFF) for a, b in zip(small, (count64, size64, offset64), strict=True)):
            problems.append(_fault(where, "has two indices that disagree"))
        count, size, offset, end = count64, size64, offset64, start
    if offset + size > end:
        raise _fault(where, "has an index that lies outside the file", "truncated")
    return offset, size, count, end


def _read_entry(archive: Archive, place: int, index: int, where: object) -> int:
    data = archive.data
    fields = _INDEX.unpack_from(data, place)
    magic, _, _, flags, method, _, _, checksum, stored, size, name_size, extra_size, note_size = fields[:13]
    disk, local = fields[13], fields[16]
    if magic != b"PK\x01\x02":
        raise _fault(where, "has a damaged index")
    name_at = place + _INDEX.size
    raw = data[name_at : name_at + name_size]
    extra = data[name_at + name_size : name_at + name_size + extra_size]
    name = clean(raw.decode("utf-8", "backslashreplace"))
    try:
        size, stored, local = _wide(extra, size, stored, local)
        head = _LOCAL.unpack_from(data, local)
    except (struct.error, OverflowError):
        raise _fault(where, f"record '{shown(name)}' lies outside the file", "truncated") from None
    start = local + _LOCAL.size + head[9] + head[10]
    named = data[local + _LOCAL.size : local + _LOCAL.size + head[9]]
    for wrong, what in (
        (flags & ~_KNOWN_FLAGS or head[2] & ~_KNOWN_FLAGS, "is encrypted or marked in a way torch never does"),
        (head[0] != MAGIC or named != raw or head[3] != method, "is described differently in index and body"),
        (disk, "claims to lie on another volume"),
    ):
        if wrong:
            archive.problems.append(_fault(where, f"record '{shown(name)}' {what}"))
    if start + stored > index:
        raise _fault(where, f"record '{shown(name)}' reaches beyond the data", "truncated")
    archive.entries.append(Entry(name, start, size, stored, method, checksum))
    return int(name_at + name_size + extra_size + note_size)


def _wide(extra: bytes, size: int, stored: int, local: int) -> tuple[int, int, int]:
    """Replaces fields that are marked as too large by their 64-bit forms."""
    wanted = [value == 0xFFFFFFFF for value in (size, stored, local)]
    values = [size, stored, local]
    while any(wanted) and len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, 4))
            values = [next(wide) if want else value for want, value in zip(wanted, values, strict=True)]
            break
        extra = extra[4 + length :]
    return values[0], values[1], values[2]


def _check(archive: Archive, where: object) -> None:
    problems, seen, end = archive.problems, set(), 0
    for entry in sorted(archive.entries, key=lambda e: e.start):
        name = shown(entry.name)
        if entry.name in seen:
            problems.append(_fault(where, f"holds two records named '{name}'"))
        seen.add(entry.name)
        if entry.name.startswith("/") or ".." in entry.name.split("/") or "\\" in entry.name:
            problems.append(_fault(where, f"record '{name}' points out of the archive"))
        if entry.start < end:
            problems.append(_fault(where, f"record '{name}' overlaps another"))
        end = max(end, entry.start + entry.stored)
        if (entry.method != 0 or entry.size != entry.stored) and not entry.is_code:
            what = f"record '{name}' is compressed ({entry.stored} bytes for {entry.size}), which torch never does"
            problems.append(_fault(where, what, "compressed", "save it again with torch.save"))
    if not problems:  # else the checksums could cost more than they tell
        for entry in archive.entries:
            if not entry.is_code and zlib.crc32(archive.bytes_of(entry)) != entry.checksum:
                problems.append(_fault(where, f"record '{shown(entry.name)}' is damaged: CRC-32 differs", "checksum"))

"""The three kinds of pickled checkpoints: torch's zip archive, its older format, and a bare pickle."""

from __future__ import annotations

import io
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cupel.checkpoint.allowlist import Kind, kind_of
from cupel.checkpoint.archive import Archive, Entry, read_archive
from cupel.checkpoint.inert import run
from cupel.checkpoint.objects import Global, Persistent, Trace, bytes_of
from cupel.checkpoint.opcodes import Stream
from cupel.checkpoint.tensors import item_size
from cupel.checkpoint.text import shown
from cupel.errors import CheckpointError

__all__ = ["LEGACY_MAGIC", "Pickled", "Storage", "read_legacy", "read_pickle", "read_zip"]

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_PICKLE = 64 * 2**20
_KINDS = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
}  # fmt: skip

_NESTING, _NESTED = "torch.storage._load_from_bytes", "nested"

Storage = tuple[str, memoryview]


@dataclass
class Pickled:
    """A pickled checkpoint, followed but not run.

    Args:
        format: `torch-zip`, `torch-legacy`, `torchscript` or `pickle`.
        traces: Of every pickle in the file.
        root: What the file holds; None where a problem stood in the way.
        storage: Type and bytes of a storage by its persistent id.
        problems: Why the file must not be read; empty = nothing found.
        oddities: What is unusual without being damage.
        nested: By id of the call, storages that are pickles of their own inside this one, followed as well.
    """

    format: str
    traces: list[Trace] = field(default_factory=list)
    root: Any = None
    storage: Callable[[Persistent], Storage] | None = None
    problems: list[CheckpointError] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    nested: dict[int, Pickled] = field(default_factory=dict)

    def globals(self) -> Mapping[Global, set[str]]:
        """Every global named anywhere in the file."""
        merged: dict[Global, set[str]] = {}
        for trace in self.traces:
            for found, uses in trace.globals.items():
                merged.setdefault(found, set()).update(uses)
        for inner in self.nested.values():
            for found, uses in inner.globals().items():
                merged.setdefault(found, set()).update(uses)
        return merged

    def kind_of(self, found: Global) -> Kind:
        """As the allowlist has it, but a pickle inside this one is as good or bad as what it asks for itself."""
        if found.path != _NESTING:
            return kind_of(found)
        calls = [call for trace in self.traces for call in trace.calls if call.of(_NESTING)]
        if not calls:
            return "unknown"
        return "known" if all(id(call) in self.nested for call in calls) else "runs-code"


def _storage_kind(found: object) -> str | None:
    """Type of the numbers in a storage class, None if it is not one we read."""
    if isinstance(found, Global) and found.module in ("torch", "torch.storage", "torch.cuda"):
        return _KINDS.get(found.name)
    return None


def _fault(
    where: object, what: str, code: str = "malformed", todo: str = "download or copy it again"
) -> CheckpointError:
    return CheckpointError(where, what, todo, code=code)


def _described(where: object, found: Persistent) -> tuple[str, str, int, Any]:
    """Type, key, length and view of ('storage', class, key, place, length[, view])."""
    match found.id:
        case ("storage", Global() as kind, str() as key, _, int() as length, *view) if length >= 0:
            dtype = _storage_kind(kind)
            if dtype is None:
                raise _fault(where, f"stores {shown(kind.path)}, which is not read", "unsupported", "convert it first")
            return dtype, key, length, view[0] if view else None
    raise _fault(where, "refers to a storage in a way torch never does")


def _follow(stream: Stream, made: Pickled, where: object) -> Trace | None:
    trace = run(stream)
    made.traces.append(trace)
    for call in trace.calls:
        # One level only: torch writes no deeper, and a stream must not choose how deep this goes.
        if call.of(_NESTING) and made.format != _NESTED and (data := _only_bytes(call.arguments)):
            inner = Pickled(_NESTED)
            _legacy(io.BytesIO(data), memoryview(data), inner, where)
            made.nested[id(call)] = inner
            made.problems.extend(inner.problems)
    if not trace.error:
        return trace
    code = "truncated" if trace.cut else "malformed"
    made.problems.append(_fault(where, f"holds a broken pickle ({shown(trace.error)})", code))
    return None


def _only_bytes(arguments: tuple[Any, ...]) -> bytes:
    data = bytes_of(arguments[0]) if len(arguments) == 1 else None
    return data if data and data.startswith(LEGACY_MAGIC) else b""


def read_zip(data: mmap.mmap, where: object) -> Pickled:
    """Follow the pickles of an archive and find its storages.

    Raises:
        CheckpointError: the archive has no readable index.
    """
    archive = read_archive(data, where)
    made = Pickled("torch-zip", problems=archive.problems)
    roots = [entry for entry in archive.entries if entry.name.count("/") == 1 and entry.name.endswith("/data.pkl")]
    for entry in archive.entries:
        if entry.name.endswith(".pkl") and entry not in roots[:1]:
            _follow(io.BytesIO(archive.unpacked(entry, _MAX_PICKLE)), made, where)
    if not roots:
        made.problems.append(_fault(where, "is a zip archive, but none of torch's", "not-a-checkpoint", ""))
        return made
    if roots[0].size > _MAX_PICKLE:
        made.problems.append(_fault(where, f"has a pickle of {roots[0].size} bytes", "oversized"))
    trace = _follow(io.BytesIO(archive.unpacked(roots[0], _MAX_PICKLE)), made, where)
    made.root = trace.value if trace else None
    folder = roots[0].name.partition("/")[0]
    records = {entry.name.removeprefix(folder + "/"): entry for entry in archive.entries}
    if "constants.pkl" in records:
        made.format = "torchscript"
        made.oddities.append("is TorchScript, which holds code beside its tensors")
    order = records.get("byteorder")
    if order and archive.unpacked(order, 16) != b"little":
        made.problems.append(_fault(where, "was written on a big-endian machine", "unsupported", "convert it there"))
    made.storage = lambda found: _record_of(archive, records, found, where)
    return made


def _record_of(archive: Archive, records: Mapping[str, Entry], found: Persistent, where: object) -> Storage:
    dtype, key, length, _ = _described(where, found)
    entry = records.get(f"data/{key}")
    if entry is None:
        raise _fault(where, f"lacks the record of storage '{shown(key)}'", "truncated")
    if entry.stored != length * item_size(dtype):
        what = f"storage '{shown(key)}' claims {length} numbers of {dtype} but has {entry.stored} bytes"
        raise _fault(where, what, "oversized")
    return dtype, archive.bytes_of(entry)


def read_legacy(data: mmap.mmap, where: object) -> Pickled:
    """Follow the five pickles of torch's format before 1.6 and find its storages. It has no checksums."""
    made = Pickled("torch-legacy")
    data.seek(0)
    _legacy(data, memoryview(data), made, where)
    return made


def _legacy(stream: Stream, data: memoryview, made: Pickled, where: object) -> None:
    traces = []
    for _ in range(5):  # magic number, protocol, machine, the object, keys of the storages
        trace = _follow(stream, made, where)
        if trace is None:
            return
        traces.append(trace)
    _, protocol, machine, root, keys = (trace.value for trace in traces)
    if protocol != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        made.problems.append(
            _fault(where, "is of an unknown protocol or byte order", "unsupported", "convert it first")
        )
        return
    try:
        described = [_described(where, found) for found in traces[3].persistent]
        storages = _legacy_storages(data, traces[4].end, keys, {key: dtype for dtype, key, _, _ in described}, where)
    except CheckpointError as error:
        made.problems.append(error)
        return

    def storage(found: Persistent) -> Storage:
        dtype, key, length, view = _described(where, found)
        if key not in storages or len(storages[key]) != length * item_size(dtype):
            raise _fault(where, f"storage '{shown(key)}' has another length than claimed", "oversized")
        match view:
            case None:
                return dtype, storages[key]
            case (str(), int() as start, int() as count) if 0 <= start <= start + count <= length:
                size = item_size(dtype)
                return dtype, storages[key][start * size : (start + count) * size]
        raise _fault(where, f"storage '{shown(key)}' is viewed beyond its end", "bad-view")

    made.root, made.storage = root, storage


def _legacy_storages(
    data: memoryview, place: int, keys: object, kinds: Mapping[str, str], where: object
) -> dict[str, memoryview]:
    if not isinstance(keys, list) or any(not isinstance(k, str) or k not in kinds for k in keys):
        raise _fault(where, "lists storages that nothing uses")
    found: dict[str, memoryview] = {}
    for key in keys:
        if place + 8 > len(data):
            raise _fault(where, f"is cut off before storage '{shown(key)}'", "truncated")
        (length,) = struct.unpack_from("<q", data, place)
        end = place + 8 + length * item_size(kinds[key])
        if length < 0 or end > len(data):
            raise _fault(where, f"is cut off in storage '{shown(key)}' of {length} numbers", "truncated")
        found[key] = data[place + 8 : end]
        place = end
    if place != len(data):
        raise _fault(where, f"has {len(data) - place} bytes after its end")
    return found


def read_pickle(data: mmap.mmap, where: object) -> Pickled:
    """Follow a bare pickle, as `pickle.dump` writes it."""
    made = Pickled("pickle")
    data.seek(0)
    trace = _follow(data, made, where)
    if trace is not None:
        made.root = trace.value
        if trace.end != len(data):
            made.oddities.append(f"has {len(data) - trace.end} bytes after the end of its pickle")
    return made

"""The safetensors format: eight bytes of header length, a JSON header, and the numbers without gaps."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cupel.checkpoint.tensors import View, dense, item_size
from cupel.checkpoint.text import clean, shown
from cupel.errors import CheckpointError
from cupel.files import atomic_file

__all__ = ["CARD", "looks_like_safetensors", "parse", "read_card", "write_safetensors"]

CARD = "cupel"
_MAX_HEADER = 8 * 2**20
_TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _TYPES.items() if not dtype.startswith(("bf", "float8"))}


def looks_like_safetensors(head: bytes) -> bool:
    """Do the first nine bytes promise a header?"""
    return len(head) >= 9 and head[8:9] == b"{"


def _fault(where: object, what: str, code: str = "malformed") -> CheckpointError:
    return CheckpointError(where, what, "download or copy it again", code=code)


def parse(data: memoryview, where: object) -> tuple[dict[str, View], dict[str, str]]:
    """Tensors and metadata of a file. Every byte of the body must belong to exactly one tensor.

    Raises:
        CheckpointError: code `malformed`, `truncated` or `oversized`.
    """
    (length,) = struct.unpack_from("<Q", data)
    if length > _MAX_HEADER:
        raise _fault(where, f"claims a header of {length} bytes", "oversized")
    if 8 + length > len(data):
        raise _fault(where, f"is cut off in its header of {length} bytes", "truncated")
    header = _json(bytes(data[8 : 8 + length]), where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _fault(where, "has metadata that are not text")
    body = data[8 + length :]
    tensors: dict[str, View] = {}
    spans: list[tuple[int, int, str]] = []
    for raw, entry in header.items():
        name = clean(raw)
        dtype, shape, start, end = _entry(entry, name, where)
        if end > len(body):
            raise _fault(where, f"is cut off in tensor '{shown(name)}'", "truncated")
        if math.prod(shape) * item_size(dtype) != end - start:
            raise _fault(where, f"tensor '{shown(name)}' has {end - start} bytes for shape {shape} of {dtype}")
        if name in tensors:
            raise _fault(where, f"holds two tensors named '{shown(name)}'")
        tensors[name] = dense(dtype, shape, body[start:end])
        tensors[name].check(where, name)
        spans.append((start, end, name))
    place = 0
    for start, end, name in sorted(spans):
        if start != place:
            raise _fault(where, f"has {'a gap' if start > place else 'an overlap'} before tensor '{shown(name)}'")
        place = end
    if place != len(body):
        raise _fault(where, f"has {len(body) - place} bytes that belong to no tensor")
    return tensors, {clean(k): clean(v, len(v)) for k, v in metadata.items()}


def _json(text: bytes, where: object) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _fault(where, f"has a header that is not JSON ({type(error).__name__})") from None
    if not isinstance(header, dict):
        raise _fault(where, "has a header that is no JSON object")
    return header


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _entry(entry: object, name: str, where: object) -> tuple[str, tuple[int, ...], int, int]:
    def whole(values: object) -> bool:
        return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**62 for n in values)

    match entry:
        case {"dtype": str() as code, "shape": list() as shape, "data_offsets": [start, end], **rest} if (
            not rest and whole(shape) and whole([start, end]) and start <= end
        ):
            if code not in _TYPES:
                raise _fault(where, f"tensor '{shown(name)}' is of the unknown type '{shown(code)}'", "unsupported")
            return _TYPES[code], tuple(shape), start, end
    raise _fault(where, f"describes tensor '{shown(name)}' wrongly")


def read_card(metadata: Mapping[str, str], where: object) -> dict[str, Any] | None:
    """The card in a header, None if it has none.

    Raises:
        CheckpointError: code `bad-card`.
    """
    if CARD not in metadata:
        return None
    try:
        card = json.loads(metadata[CARD], parse_constant=_no_constant)
        json.dumps(card, ensure_ascii=False).encode("utf-8")  # escapes of half a character could not be written again
    except (ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        raise CheckpointError(where, "has a card that is no JSON object", "write the file again", code="bad-card")
    return card


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray[Any, Any]], card: Mapping[str, Any]) -> None:
    """Write tensors and their card, whole or not at all; equal input gives equal bytes.

    The card stands in the header under the metadata key `cupel`, which is what counts when reading, and for people
    in `<path>.json` beside the file.

    Args:
        path: File to write.
        tensors: Arrays by name, of the types the format knows.
        card: What JSON can hold.

    Raises:
        MachineError: disk full, read-only, no permission. What stood at `path` before stays.
        TypeError: an array of a type the format does not know.
    """
    path = Path(path)
    header: dict[str, Any] = {}
    if card:
        header["__metadata__"] = {CARD: json.dumps(dict(card), sort_keys=True, allow_nan=False)}
    # Wide types first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    place = 0
    for name in order:
        array = tensors[name]
        if array.dtype.name not in _CODES:
            raise TypeError(f"tensor '{name}' is {array.dtype}, which safetensors cannot hold")
        entry = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape)}
        header[name] = {**entry, "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    readable = json.dumps(dict(card), indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
    with atomic_file(f"{path}.json") as beside, atomic_file(path) as part:
        beside.write_text(readable, encoding="utf-8")
        with part.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                array = tensors[name]
                file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)

"""The opcodes of a pickle with their arguments.

`pickletools` has the table, but its readers undo escapes where an unpickler does not, refuse names that one accepts,
and warn on the way, so the arguments are read here, as an unpickler reads them.
"""

from __future__ import annotations

import pickletools
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["Stream", "opcodes"]

_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([0-7]{1,3})|(.))", re.DOTALL)
_LETTERS = {b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


class Stream(Protocol):
    """What is read from: `BytesIO` or `mmap`."""

    def read(self, n: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


def opcodes(stream: Stream) -> Iterator[tuple[str, Any]]:
    """Name and argument of every opcode up to STOP.

    Raises:
        EOFError: the stream ends early.
        ValueError: it is no pickle.
    """
    while True:
        code = _exactly(stream, 1)
        if code not in _TABLE:
            raise ValueError(f"unknown opcode {code!r} at {stream.tell() - 1}")
        name, reader = _TABLE[code]
        yield name, reader(stream) if reader else None
        if name == "STOP":
            return


def _exactly(stream: Stream, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"ends at {stream.tell()}")
    return data


def _line(stream: Stream) -> bytes:
    data = stream.readline()
    if not data.endswith(b"\n"):
        raise EOFError(f"ends at {stream.tell()}")
    return data[:-1]


def _number(form: str) -> Callable[[Stream], Any]:
    layout = struct.Struct(form)
    return lambda stream: layout.unpack(_exactly(stream, layout.size))[0]


def _counted(form: str) -> Callable[[Stream], bytes]:
    length = _number(form)

    def read(stream: Stream) -> bytes:
        count = length(stream)
        if not 0 <= count < 2**62:
            raise ValueError("a negative or endless length")
        return _exactly(stream, count)

    return read


def _then(read: Callable[[Stream], bytes], convert: Callable[[bytes], Any]) -> Callable[[Stream], Any]:
    return lambda stream: convert(read(stream))


def _integer(text: bytes) -> int | bool:
    return text == b"01" if text in (b"00", b"01") else int(text.removesuffix(b"L") or b"0")


def _quoted(text: bytes) -> str:
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1]:
        raise ValueError("a string without its quotes")
    return _ESCAPE.sub(_unescaped, text[1:-1]).decode("latin-1")


def _unescaped(found: re.Match[bytes]) -> bytes:
    hexadecimal, octal, letter = found.groups()
    if hexadecimal:
        return bytes([int(hexadecimal, 16)])
    return bytes([int(octal, 8) & 255]) if octal else _LETTERS.get(letter, letter)


def _long(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _latin(data: bytes) -> str:
    return data.decode("latin-1")


_READERS: dict[str, Callable[[Stream], Any]] = {
    "uint1": _number("<B"),
    "uint2": _number("<H"),
    "uint4": _number("<I"),
    "uint8": _number("<Q"),
    "int4": _number("<i"),
    "float8": _number(">d"),
    "long1": _then(_counted("<B"), _long),
    "long4": _then(_counted("<i"), _long),
    "string1": _then(_counted("<B"), _latin),
    "string4": _then(_counted("<i"), _latin),
    "bytes1": _counted("<B"),
    "bytes4": _counted("<I"),
    "bytes8": _counted("<Q"),
    "bytearray8": _counted("<Q"),
    "unicodestring1": _then(_counted("<B"), _text),
    "unicodestring4": _then(_counted("<I"), _text),
    "unicodestring8": _then(_counted("<Q"), _text),
    "unicodestringnl": _then(_line, lambda line: line.decode("raw-unicode-escape")),
    "stringnl": _then(_line, _quoted),
    "stringnl_noescape": _then(_line, _text),
    "stringnl_noescape_pair": lambda stream: (_text(_line(stream)), _text(_line(stream))),
    "decimalnl_short": _then(_line, _integer),
    "decimalnl_long": _then(_line, _integer),
    "floatnl": _then(_line, float),
}
_TABLE = {
    opcode.code.encode("latin-1"): (opcode.name, _READERS[opcode.arg.name] if opcode.arg else None)
    for opcode in pickletools.opcodes
}

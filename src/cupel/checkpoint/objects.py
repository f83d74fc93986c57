"""What a pickle asks for, as records: names it would import, calls it would make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Global", "Opaque", "Persistent", "Trace", "bytes_of"]


@dataclass(frozen=True)
class Global:
    """A name that an unpickler would import."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Dotted."""
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(eq=False)
class Call:
    """A call that an unpickler would make, and what it would put into the result.

    Args:
        function: A `Global`, or what another call would have returned.
        arguments: Positional; keyword arguments are kept as one dictionary at the end.
        items: What `result[key] = value` would set.
        elements: What `result.append` would add.
        states: What `result.__setstate__` would get.
    """

    function: Any
    arguments: tuple[Any, ...]
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)
    states: list[Any] = field(default_factory=list)

    def of(self, *paths: str) -> bool:
        """Is the function one of these globals?"""
        return isinstance(self.function, Global) and self.function.path in paths


@dataclass(frozen=True, eq=False)
class Persistent:
    """An object that lives outside the pickle; in torch's files a storage."""

    id: Any


@dataclass(frozen=True, eq=False)
class Opaque:
    """A dictionary key that is no atom."""

    value: Any


@dataclass
class Trace:
    """What a stream asked for.

    Args:
        value: The object at the end; None after an error.
        globals: Every global named, in order, with the words for what happens to it: `calls`, `changes`.
        calls: Every call.
        persistent: Every persistent id.
        end: Position after the stream.
        error: Why the machine stopped before the end; empty = it did not. What came before still counts.
        cut: It stopped because the stream ends early.
    """

    value: Any = None
    globals: dict[Global, set[str]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    persistent: list[Persistent] = field(default_factory=list)
    end: int = 0
    error: str = ""
    cut: bool = False


def bytes_of(value: Any) -> bytes | None:
    """The bytes that a value stands for; before protocol 3 they are text in disguise. None = it is something else."""
    if isinstance(value, Call) and value.of("_codecs.encode") and value.arguments[1:] in (("latin1",), ("latin-1",)):
        value = value.arguments[0]
    if isinstance(value, str):
        try:
            return value.encode("latin-1")
        except UnicodeEncodeError:
            return None
    return bytes(value) if isinstance(value, (bytes, bytearray)) else None

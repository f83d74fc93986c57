"""Names out of hostile files, made fit to be shown and stored."""

from __future__ import annotations

__all__ = ["clean", "shown"]


def clean(name: str, limit: int = 1000) -> str:
    """A name that every encoder can write: lone surrogates become escapes, very long names are cut."""
    short = name if len(name) <= limit else name[:limit] + "…"
    return short.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(name: object, limit: int = 200) -> str:
    """A name fit for a terminal: control characters, ANSI codes and writing-direction marks become escapes.

    Example:
        >>> shown("a" + chr(27) + "[31mb")
        'a\\\\x1b[31mb'
    """
    text = clean(str(name), limit)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

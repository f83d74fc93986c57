"""Where local data lies: `$CUPEL_DATA`, then `./data`, then the user cache."""

from __future__ import annotations

import os
from pathlib import Path

from cupel.errors import DataError

__all__ = ["data_roots", "find_file"]


def data_roots() -> list[Path]:
    """Folders that data is looked for in, in this order; they need not exist.

    `$CUPEL_DATA` (left out where it is unset or empty), `./data`, `cupel/data` in `$XDG_CACHE_HOME` or `~/.cache`.

    Example:
        >>> Path("data") in data_roots()
        True
    """
    named = os.environ.get("CUPEL_DATA", "")
    cache = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    return [
        *([Path(named).expanduser()] if named else []),
        Path("data"),
        Path(cache).expanduser() / "cupel" / "data",
    ]


def find_file(name: str | Path) -> Path:
    """The file `name`: as given (relative to the working folder), else inside the first data root that has it.

    Raises:
        DataError: it is nowhere, or is a folder; the line lists where it was looked for.
    """
    if not str(name):
        raise DataError("file", "the name of a file is empty")
    given = Path(name).expanduser()
    places = [given] if given.is_absolute() else [given, *(root / given for root in data_roots())]
    for place in places:
        if place.is_file():
            return place
    folder = next((place for place in places if place.is_dir()), None)
    if folder is not None:
        raise DataError(folder, "is a folder, but a file is expected")
    looked = ", ".join(dict.fromkeys(str(place.parent) for place in places))
    raise DataError(name, f"no such file (looked in {looked})", "check the name, or set CUPEL_DATA")

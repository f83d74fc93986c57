"""Records and their arrays, read from the folder that a command wrote. Nothing is unpickled."""

from __future__ import annotations

import dataclasses
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cupel.errors import DataError
from cupel.records import Record

__all__ = ["Arrays", "Cell", "load_cells"]

Arrays = Mapping[str, NDArray[Any]]
Cell = tuple[Record, Arrays]
_MOST_BYTES = 1 << 30
_WRITERS = "give a folder that `cupel run`, `cupel demo` or `cupel scan` wrote"


def load_cells(folder: str | Path) -> list[Cell]:
    """The records of a folder with their pictures, maps and curves.

    Args:
        folder: Has `cells/*.json` (all of them are read, by name) or else `result.json`; a record itself will do too.

    Raises:
        DataError: no record there, a damaged one, an `.npz` that is damaged, holds objects or lies outside the folder.
    """
    folder = Path(folder)
    if folder.is_file():
        return [_load(folder, folder.parent)]
    files = sorted((folder / "cells").glob("*.json"))
    if not files and (folder / "result.json").is_file():
        files = [folder / "result.json"]
    if not files:
        what = "holds neither cells/*.json nor result.json" if folder.is_dir() else "no such folder"
        raise DataError(folder, what, _WRITERS)
    return [_load(file, folder) for file in files]


def _load(file: Path, root: Path) -> Cell:
    record = Record.read(file)
    if flaw := _flaw(record):
        raise DataError(file, f"is a damaged record ({flaw})", "run the experiment again")
    if record.arrays is None:
        return record, {}
    path = Path(os.path.normpath(file.parent / record.arrays))
    if os.path.isabs(record.arrays) or not path.is_relative_to(os.path.normpath(root)):
        raise DataError(file, "names an array file outside its folder", "keep the two together")
    if not path.is_file():
        note = f"The file with pictures, maps and curves ({record.arrays}) is missing, so they are not shown."
        return dataclasses.replace(record, notes=[*record.notes, note]), {}
    return record, _arrays(path)


def _arrays(path: Path) -> Arrays:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MOST_BYTES:
                raise DataError(path, "holds more than 1 GiB of arrays", "a report needs a few megabytes at most")
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(path, f"is no readable .npz ({type(error).__name__})", "run the experiment again") from error


def _flaw(record: Record) -> str:
    """What of a record has the wrong type; empty if nothing."""
    if not all(isinstance(value, str) for value in (record.command, record.name, record.cupel, record.status)):
        return "names must be text"
    mappings = (record.seconds, record.verdicts, record.settings, record.extra, *_values(record.verdicts))
    if not all(isinstance(value, Mapping) for value in mappings):
        return "a mapping is expected"
    if not isinstance(record.steps, list) or not all(isinstance(step, Mapping) for step in record.steps):
        return "steps must be mappings"
    if not isinstance(record.notes, list) or not isinstance(record.arrays, str | None):
        return "notes must be a list, arrays a file name"
    for name, metric in record.metrics.items():
        shares = (metric.value, metric.low, metric.high)
        if not all(share is None or _is_share(share) for share in shares) or not isinstance(metric.n, int):
            return f"metric {name[:60]!r} is no share in [0, 1]"
    return ""


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, Mapping) else []


def _is_share(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and 0 <= value <= 1

"""Files that are written whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cupel.errors import CupelError, DataError, MachineError

__all__ = ["atomic_file", "atomic_folder", "read_json", "write_arrays", "write_bytes", "write_json", "write_text"]

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another --out"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another --out"),
    errno.EROFS: ("the file system is read-only", "choose another --out"),
    errno.EACCES: ("no permission to write", "choose another --out"),
    errno.EPERM: ("no permission to write", "choose another --out"),
    errno.EIO: ("the disk reports an input/output error", "check the disk, or choose another --out"),
}


def _explained(path: Path, error: OSError) -> CupelError:
    what, todo = _REASONS.get(error.errno or 0, (error.strerror or str(error), "choose another --out"))
    return MachineError(path, what, todo)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, on failure removed.

    Raises:
        MachineError: the disk is full, read-only or fails. What stood at `path` before stays as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _explained(path, error) from error
    part = Path(name)
    try:
        yield part
        part.chmod(0o644)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it becomes `path` in one rename. If `path` exists already, it wins.

    Raises:
        MachineError: the disk is full, read-only or fails; no half-written folder stays behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise _explained(path, error) from error
    try:
        yield part
        part.chmod(0o755)
        for file in part.rglob("*"):
            _sync(file)
        _sync(part)
        try:
            os.rename(part, path)
        except OSError:
            if not path.is_dir():  # another run finished the same work first: its result is as good as ours
                raise
        _sync(path.parent)
    except OSError as error:
        raise _explained(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` atomically."""
    with atomic_file(path) as part:
        part.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically. NaN and infinity are refused: a number that is not one must not pass for one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_arrays(path: str | Path, arrays: Mapping[str, Any]) -> None:
    """Write named arrays as a compressed `.npz`, atomically."""
    import numpy as np  # the commands that need no arrays do not wait for it

    with atomic_file(path) as part, part.open("wb") as file:
        named: dict[str, Any] = {name: np.asarray(one) for name, one in arrays.items()}
        np.savez_compressed(file, **named)


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: missing, not JSON, or nested too deep.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(path, "no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(path, f"is not readable JSON ({type(error).__name__})") from error

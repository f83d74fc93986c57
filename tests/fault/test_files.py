"""Files are written whole or not at all, whatever the disk does and whenever the process dies."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cupel.errors import DataError, MachineError
from cupel.files import atomic_file, atomic_folder, read_json, write_bytes, write_json, write_text

WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an input/output error",
}
CALLS = ("mkstemp", "fsync", "replace")


def failing(number: int) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def break_call(monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    module = "cupel.files.tempfile" if call in ("mkstemp", "mkdtemp") else "cupel.files.os"
    monkeypatch.setattr(f"{module}.{call}", failing(number))


def write_then(path: Path, error: BaseException) -> None:
    with atomic_file(path) as part:
        part.write_text("half")
        raise error


def write_folder(path: Path, size: int = 4, error: BaseException | None = None) -> None:
    with atomic_folder(path) as part:
        (part / "a").write_bytes(b"fits")
        (part / "b").write_bytes(bytes(size))
        if error is not None:
            raise error


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an old file, an old folder, and nothing else."""
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "encoder").write_text("old")
    return tmp_path


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", WORDS)
def test_failing_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    before = listing(folder)
    break_call(monkeypatch, call, number)
    with pytest.raises(MachineError) as caught:
        write_text(folder / "old.json", "new")
    monkeypatch.undo()
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{folder / 'old.json'}: {WORDS[number]}; ")
    assert "\n" not in str(caught.value)
    assert listing(folder) == before


def test_disk_full_while_writing(folder: Path) -> None:
    before = listing(folder)
    with pytest.raises(MachineError, match="the disk is full"):
        write_then(folder / "old.json", OSError(errno.ENOSPC, "No space left on device"))
    assert listing(folder) == before


@pytest.mark.parametrize("call", ["mkdtemp", "fsync", "rename"])
@pytest.mark.parametrize("number", WORDS)
def test_failing_disk_and_folders(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    before = listing(folder)
    break_call(monkeypatch, call, number)
    with pytest.raises(MachineError, match=WORDS[number]):
        write_folder(folder / "new")
    monkeypatch.undo()
    assert listing(folder) == before
    assert not (folder / "new").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A real limit of the system on the size of files: writing more fails half-way, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_really_stops_half_way(folder: Path) -> None:
    before = listing(folder)
    with largest_file(64 * 1024):
        with pytest.raises(MachineError) as caught:
            write_bytes(folder / "old.json", bytes(1_000_000))
        with pytest.raises(MachineError):
            write_folder(folder / "new", size=1_000_000)
    assert caught.value.exit_code == 2
    assert listing(folder) == before
    assert not list(folder.glob(".*.part"))


def test_folder_without_write_permission(folder: Path) -> None:
    kept, user = folder / "kept", os.geteuid()
    kept.chmod(0o500)
    try:
        if user == 0:  # root may write everywhere, so for a moment be nobody
            os.seteuid(65534)
        with pytest.raises(MachineError, match="no permission to write"):
            write_text(kept / "x", "new")
    finally:
        os.seteuid(user)
        kept.chmod(0o700)


def test_parent_is_a_file(folder: Path) -> None:
    with pytest.raises(MachineError) as caught:
        write_text(folder / "old.json" / "result.json", "new")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_errors_of_the_writer_pass_and_leave_nothing(folder: Path, error: type[BaseException]) -> None:
    before = listing(folder)
    with pytest.raises(error):
        write_then(folder / "old.json", error())
    with pytest.raises(error):
        write_folder(folder / "new", error=error())
    assert listing(folder) == before


@pytest.mark.parametrize("moment", ["in the writer", "before the rename"])
def test_killed_in_the_middle(folder: Path, moment: str) -> None:
    """SIGKILL: nothing can be cleaned up, but the old file stands whole and the next write goes through."""
    code = """
        import os, signal, sys
        from pathlib import Path
        from cupel import files
        die = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "before the rename":
            files.os.replace = die
        with files.atomic_file(Path(sys.argv[1])) as part:
            part.write_text("half")
            if sys.argv[2] == "in the writer":
                die()
    """
    target = folder / "old.json"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    write_text(target, "new")
    assert target.read_text() == "new"


def test_whole_or_not_at_all(folder: Path) -> None:
    with atomic_file(folder / "deep" / "er" / "new.txt") as part:
        assert not (folder / "deep" / "er" / "new.txt").exists()
        part.write_text("new")
    assert (folder / "deep" / "er" / "new.txt").read_text() == "new"
    with atomic_folder(folder / "new") as part:
        (part / "a").write_text("a")
        assert not (folder / "new").exists()
    assert listing(folder / "new") == {"a": b"a"}


def test_the_first_folder_wins(folder: Path) -> None:
    with atomic_folder(folder / "kept") as part:
        (part / "encoder").write_text("new")
    assert listing(folder / "kept") == {"encoder": b"old"}
    assert not list(folder.glob(".*.part"))


def test_no_number_that_is_none(folder: Path) -> None:
    before = listing(folder)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(folder / "old.json", {"accuracy": float("nan")})
    assert listing(folder) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000], ids=["empty", "half", "binary", "deep"])
def test_damaged_json_is_one_line(folder: Path, content: bytes) -> None:
    (folder / "r.json").write_bytes(content)
    with pytest.raises(DataError, match="is not readable JSON"):
        read_json(folder / "r.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(folder / "absent.json")

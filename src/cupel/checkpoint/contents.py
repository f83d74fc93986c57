"""What a file holds, whatever its format: the one way in for both inspecting and reading."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cupel.checkpoint.archive import MAGIC, has_index
from cupel.checkpoint.flatten import tensors_of
from cupel.checkpoint.pickled import LEGACY_MAGIC, Pickled, read_legacy, read_pickle, read_zip
from cupel.checkpoint.safetensors import looks_like_safetensors, parse, read_card
from cupel.checkpoint.tensors import View
from cupel.checkpoint.text import clean, shown
from cupel.errors import CheckpointError

__all__ = ["Contents", "open_contents"]

_FOLDER_FILES = ("encoder.safetensors", "model.safetensors")
_SHARE = 4  # tensors may share storages, but not so that a small file unfolds to a large one
_SLACK = 2**20


@dataclass
class Contents:
    """A file that was looked through. Nothing in it was run.

    Args:
        path: As given.
        format: `safetensors`, `torch-zip`, `torch-legacy`, `torchscript`, `pickle`, `cupel-folder` or `folder`.
        sha256, size: Of the file (in a folder, of the file in it).
        tensors: By flat dotted name; empty where there is a problem.
        stubs: Globals that are neither tensors, storages nor plain containers.
        unsafe, oddities: Sentences; unsafe = the file asks for code to be run.
        metadata, card: Of the safetensors header.
        problem: Why the tensors cannot be read.
    """

    path: Path
    format: str
    sha256: str
    size: int
    tensors: dict[str, View] = field(default_factory=dict)
    stubs: list[str] = field(default_factory=list)
    unsafe: list[str] = field(default_factory=list)
    oddities: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    card: dict[str, Any] | None = None
    problem: CheckpointError | None = None


def open_contents(path: str | Path) -> Contents:
    """Look through a file, or the one file that counts in a folder.

    Raises:
        CheckpointError: there is no file, or nothing in it can be told. Lesser faults are in `Contents.problem`.
    """
    path = Path(path)
    where = shown(path, 4000)
    file = _in_folder(path, where) if path.is_dir() else path
    data = _map(file, where)
    contents = Contents(path, "safetensors", hashlib.sha256(data).hexdigest(), len(data))
    if looks_like_safetensors(data[:9]):
        try:
            contents.tensors, contents.metadata = parse(memoryview(data), where)
            contents.card = read_card(contents.metadata, where)
        except CheckpointError as error:
            contents.problem = error
    else:
        pickled = _pickled(data, where)
        contents.format = pickled.format
        _judge(contents, pickled)
        _fill(contents, pickled, where)
    if file is not path:
        contents.format = "cupel-folder" if contents.card is not None else "folder"
    return contents


def _in_folder(folder: Path, where: str) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    named = [file for file in found if file.name in _FOLDER_FILES]
    choice = named if len(named) == 1 else found
    if len(choice) != 1:
        what = f"holds {len(found)} safetensors files" if found else "is a folder without a safetensors file"
        raise CheckpointError(where, what, "give one file", code="no-such-file")
    if choice[0].is_symlink():
        raise CheckpointError(choice[0], "is a link", "give the file itself", code="unsupported")
    return choice[0]


def _map(file: Path, where: str) -> mmap.mmap:
    try:
        # Opening a pipe would wait for its writer.
        handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise CheckpointError(where, "no such file", "check the path", code="no-such-file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(where, f"cannot be opened ({error})", "", code="unreadable") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(where, "is no regular file", "give a file", code="unreadable")
        if status.st_size == 0:
            raise CheckpointError(where, "is empty", "download or copy it again", code="empty")
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(where, f"cannot be read ({error})", "", code="unreadable") from None
    finally:
        os.close(handle)


def _pickled(data: mmap.mmap, where: str) -> Pickled:
    head = data[:512]
    if head.startswith(MAGIC):
        return read_zip(data, where)
    if head.startswith(b"PK\x05\x06"):
        raise CheckpointError(where, "is an empty archive", "download or copy it again", code="empty")
    if head.startswith(LEGACY_MAGIC):
        made = read_legacy(data, where)
    else:
        made = read_pickle(data, where)
        no_pickle = made.root is None and not any(made.kind_of(found) == "runs-code" for found in made.globals())
        if no_pickle and not head.startswith(b"\x80"):
            raise _not_a_checkpoint(head, where)
    if has_index(data):
        made.oddities.append("begins as a pickle and ends as a zip archive")
    return made


def _not_a_checkpoint(head: bytes, where: str) -> CheckpointError:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"<"):
        todo = "a download page was saved in place of the file; download it again"
        return CheckpointError(where, "is a web page", todo, code="html")
    if text.startswith(b"version https://git-lfs"):
        return CheckpointError(where, "is a pointer of Git LFS", "run `git lfs pull`", code="lfs-pointer")
    begins = shown(head[:24].decode("latin-1"))
    todo = "safetensors files and torch checkpoints are read"
    return CheckpointError(where, f"is no checkpoint: it begins with '{begins}'", todo, code="not-a-checkpoint")


def _judge(contents: Contents, pickled: Pickled) -> None:
    for found, uses in pickled.globals().items():
        kind, name = pickled.kind_of(found), clean(found.path)
        verb = "changes" if "changes" in uses else "calls" if "calls" in uses else "names"
        if kind == "runs-code":
            contents.unsafe.append(f"{verb} {name}")
        elif kind == "unknown" or verb == "changes":
            contents.oddities.append(f"{verb} {name}")
        if kind != "plain":
            contents.stubs.append(name)
    computed = [call for trace in pickled.traces for call in trace.calls if not hasattr(call.function, "path")]
    if computed:
        contents.oddities.append("calls what another call returned")
    contents.oddities.extend(pickled.oddities)
    if contents.path.suffix == ".safetensors":
        contents.oddities.append(f"is named .safetensors but is {pickled.format}")


def _fill(contents: Contents, pickled: Pickled, where: str) -> None:
    if pickled.problems:
        contents.problem = pickled.problems[0]
        return
    try:
        found = tensors_of(pickled, where)
    except CheckpointError as error:
        contents.problem = error
        return
    total = sum(view.num_bytes for view in found.values())
    if total > _SHARE * contents.size + _SLACK:
        what = f"unfolds from {contents.size} to {total} bytes"
        contents.problem = CheckpointError(where, what, "the file is damaged or hostile", code="oversized")
        return
    contents.tensors = found

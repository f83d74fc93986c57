"""Checkpoints to read: small, made on the fly, by torch itself where they are to be real."""

from __future__ import annotations

import io
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

WATCHED = ("exec", "os.system", "subprocess.Popen", "socket.connect", "os.exec", "os.posix_spawn", "pickle.find_class")
_events: list[str] = []
_watching = [False]


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching[0] or event not in WATCHED:
        return
    if event != "exec" or getattr(arguments[0], "co_filename", "") == "<string>":  # importing a module executes it too
        _events.append(event)


sys.addaudithook(_hook)


@pytest.fixture
def nothing_ran() -> Iterator[list[str]]:
    """Fails if anything is run, started, connected to or unpickled while the test runs."""
    _events.clear()
    _watching[0] = True
    yield _events
    _watching[0] = False
    assert _events == []


@pytest.fixture
def weights() -> OrderedDict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return OrderedDict(
        {
            "conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "bn1.running_var": torch.rand(4, generator=generator),
            "bn1.num_batches_tracked": torch.tensor(7),
            "layer1.weight": torch.randn(5, 4, generator=generator).t(),  # not contiguous
        }
    )


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(value: object, name: str = "encoder.pt", **how: object) -> Path:
        torch.save(value, tmp_path / name, **how)
        return tmp_path / name

    return save


@pytest.fixture
def archived(tmp_path: Path) -> Callable[..., Path]:
    """A zip archive as torch writes it, around any pickle and records."""

    def archive(pickle: bytes, name: str = "encoder.pt", method: int = zipfile.ZIP_STORED, **data: bytes) -> Path:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", method) as file:
            file.writestr("archive/data.pkl", pickle)
            for key, content in data.items():
                file.writestr(f"archive/data/{key.removeprefix('s')}", content)
        (tmp_path / name).write_bytes(made.getvalue())
        return tmp_path / name

    return archive

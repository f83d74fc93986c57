"""What `cupel inspect` prints and returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cupel.checkpoint import inspect_command


@pytest.fixture
def files(tmp_path: Path, saved: Callable[..., Path]) -> dict[str, str]:
    contents = {"unsafe": b"cos\nsystem\n(S'echo'\ntR.", "suspicious": b"cacme\nrun\n)R.", "broken": b"<html>"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {"ok": str(saved({"w": torch.ones(2)}, "ok"))} | {name: str(tmp_path / name) for name in contents}


@pytest.mark.parametrize(
    ("names", "code"),
    [("ok", 0), ("unsafe", 1), ("suspicious", 1), ("broken", 2), ("ok broken", 2), ("broken unsafe ok", 1)],
)
def test_exit_codes(names: str, code: int, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command([files[name] for name in names.split()]) == code
    printed = capsys.readouterr()
    assert ("is a web page" in printed.err) == ("broken" in names)
    assert ("verdict   unsafe-file\n          calls os.system" in printed.out) == ("unsafe" in names)


def test_json(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_command(list(files.values()), "json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["schema"], printed["command"]) == (1, "inspect")
    ok, unsafe, suspicious, broken = printed["files"]
    assert ok["tensors"] == [{"name": "w", "dtype": "float32", "shape": [2]}]
    assert (ok["verdict"], unsafe["verdict"], suspicious["verdict"]) == ("ok", "unsafe-file", "suspicious")
    assert (broken["verdict"], broken["code"]) == (None, "html")

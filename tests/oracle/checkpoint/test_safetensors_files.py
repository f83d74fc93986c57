"""Written as the safetensors library reads them; malformed ones refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from cupel.checkpoint import inspect_file, read_tensors, write_safetensors
from cupel.errors import CheckpointError, MachineError

CARD = {"arch": "resnet18", "width": 64, "normalisation": {"mean": [0.5, 0.5, 0.5]}, "note": "µ 中 \n"}
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "b.odd": np.arange(3, dtype=np.uint8),
    "a.weight": np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "half": np.ones((2, 2), np.float16),
    "flag": np.array([True, False]),
    "scalar": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "complex": np.array([1 + 2j], np.complex64),
}


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def one(dtype: str, shape: object, start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_written_here_and_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, ARRAYS, CARD)
    theirs = safetensors.numpy.load_file(path)
    assert set(theirs) == set(ARRAYS)
    assert all((theirs[name] == array).all() and theirs[name].shape == array.shape for name, array in ARRAYS.items())
    with safetensors.safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["cupel"]) == CARD
    assert json.loads((tmp_path / "encoder.safetensors.json").read_text(encoding="utf-8")) == CARD


def test_read_back(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, ARRAYS, CARD)
    first = path.read_bytes()
    (tmp_path / "encoder.safetensors.json").write_text("{}")  # only the header counts
    found = read_tensors(path)
    assert found.card == CARD
    assert (found.format, found.stubs) == ("safetensors", ())
    for name, array in ARRAYS.items():
        assert found.tensors[name].dtype == array.dtype.newbyteorder("=")
        assert found.tensors[name].shape == array.shape
        assert (found.tensors[name] == array).all()
    write_safetensors(path, dict(reversed(ARRAYS.items())), CARD)
    assert path.read_bytes() == first
    seen = inspect_file(path)
    assert (seen.verdict, seen.card) == ("ok", CARD)
    assert inspect_file(tmp_path).format == "cupel-folder"
    assert read_tensors(tmp_path).sha256 == found.sha256


def test_written_by_the_library_for_torch(tmp_path: Path) -> None:
    path = tmp_path / "model"
    tensors = {"w": torch.randn(3, 4).bfloat16(), "v": torch.arange(5)}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    found = read_tensors(path)
    assert (found.tensors["w"] == tensors["w"].float().numpy()).all()
    assert (found.tensors["v"] == np.arange(5)).all()
    assert found.card is None
    assert inspect_file(path).metadata == {"format": "pt"}


MALFORMED: dict[str, tuple[bytes, str]] = {
    "endless header": (struct.pack("<Q", 2**62) + b"{}", "oversized"),
    "cut header": (struct.pack("<Q", 100) + b"{", "truncated"),
    "not json": (raw(b"{'a': 1}"), "malformed"),
    "nested": (raw(b'{"a":' + b"[" * 100_000), "malformed"),
    "key twice": (raw(b'{"a":1,"a":1}'), "malformed"),
    "nan": (raw(b'{"a":NaN}'), "malformed"),
    "no object": (raw({"a": 3}), "malformed"),
    "extra key": (raw({"a": {**one("U8", [1], 0, 1), "x": 1}}, b"1"), "malformed"),
    "unknown type": (raw({"a": one("Q9", [1], 0, 1)}, b"1"), "unsupported"),
    "negative shape": (raw({"a": one("U8", [-1], 0, 1)}, b"1"), "malformed"),
    "real shape": (raw({"a": one("U8", [1.0], 0, 1)}, b"1"), "malformed"),
    "bool shape": (raw({"a": one("U8", [True], 0, 1)}, b"1"), "malformed"),
    "wrong size": (raw({"a": one("F32", [2], 0, 4)}, bytes(4)), "malformed"),
    "overflow": (raw({"a": one("F32", [2**61, 2**61], 0, 4)}, bytes(4)), "malformed"),
    "backwards": (raw({"a": one("U8", [1], 1, 0)}, b"1"), "malformed"),
    "past the end": (raw({"a": one("U8", [9], 0, 9)}, b"1"), "truncated"),
    "overlap": (raw({"a": one("U8", [2], 0, 2), "b": one("U8", [2], 1, 3)}, b"123"), "malformed"),
    "hole": (raw({"a": one("U8", [1], 0, 1), "b": one("U8", [1], 2, 3)}, b"123"), "malformed"),
    "rest": (raw({"a": one("U8", [1], 0, 1)}, b"123"), "malformed"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "malformed"),
    "card": (raw({"__metadata__": {"cupel": "[]"}, "a": one("U8", [1], 0, 1)}, b"1"), "bad-card"),
    "half a character": (raw({"__metadata__": {"cupel": '{"a":"\\ud800"}'}}), "bad-card"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(MALFORMED[name][0])
    for function in (inspect_file, read_tensors):
        with pytest.raises(CheckpointError) as caught:
            function(path)
        assert (caught.value.code, caught.value.exit_code) == (MALFORMED[name][1], 2)


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, ARRAYS, CARD)
    whole = path.read_bytes()
    for keep in range(1, len(whole), 7):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError):
            read_tensors(path)


def test_not_finite(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a", {"w": np.array([1, np.nan], np.float32)}, {})
    with pytest.raises(CheckpointError, match="'w' holds 1 values"):
        read_tensors(tmp_path / "a")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "encoder.safetensors"
    write_safetensors(path, {"w": np.zeros(3, np.float32)}, {"n": 1})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match="disk is full"):
        write_safetensors(path, {"w": np.ones(3, np.float32)}, {"n": 2})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before

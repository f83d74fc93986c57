"""Reading cells: which files are taken, and that a damaged or hostile one is one line, not a surprise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cupel.errors import DataError
from cupel.report import load_cells
from reported import fake_arrays, fake_record


def test_result_json_with_its_arrays(tmp_path: Path) -> None:
    arrays = fake_arrays()
    np.savez_compressed(tmp_path / "result.npz", allow_pickle=False, **arrays)
    fake_record(arrays="result.npz").write(tmp_path / "result.json")
    ((record, found),) = load_cells(tmp_path)
    assert record.metrics == fake_record().metrics
    assert found.keys() == arrays.keys()
    np.testing.assert_array_equal(found["map/clean/points"], arrays["map/clean/points"])
    assert load_cells(tmp_path / "result.json")[0][0] == record


def test_cells_go_before_result_json_and_are_sorted(tmp_path: Path) -> None:
    fake_record("whole").write(tmp_path / "result.json")
    for name in ("b", "a"):
        fake_record(name).write(tmp_path / "cells" / f"{name}.json")
    assert [record.name for record, _ in load_cells(tmp_path)] == ["a", "b"]


def test_missing_arrays_are_said(tmp_path: Path) -> None:
    fake_record(arrays="gone.npz").write(tmp_path / "result.json")
    ((record, arrays),) = load_cells(tmp_path)
    assert arrays == {}
    assert any("gone.npz" in note for note in record.notes)


@pytest.mark.parametrize("arrays", ["/etc/passwd", "../other.npz", "a/../../other.npz"])
def test_arrays_outside_the_folder_are_refused(tmp_path: Path, arrays: str) -> None:
    np.savez(tmp_path / "other.npz", x=np.zeros(1))
    fake_record(arrays=arrays).write(tmp_path / "run" / "result.json")
    with pytest.raises(DataError, match="outside its folder"):
        load_cells(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive"])
def test_damaged_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    fake_record(arrays="a.npz").write(tmp_path / "result.json")
    with pytest.raises(DataError, match=r"no readable \.npz"):
        load_cells(tmp_path)


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    fake_record(arrays="a.npz").write(tmp_path / "result.json")
    with pytest.raises(DataError, match=r"no readable \.npz"):
        load_cells(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metrics", {"m": {"value": "<script>", "low": None, "high": None, "n": 1, "seeds": 1}}),
        ("metrics", {"m": {"value": 1.5, "low": None, "high": None, "n": 1, "seeds": 1}}),
        ("metrics", {"m": {"value": True, "low": None, "high": None, "n": 1, "seeds": 1}}),
        ("verdicts", {"clean": "backdoored"}),
        ("steps", ["x"]),
        ("extra", []),
        ("name", 3),
    ],
)
def test_wrong_types_are_a_damaged_record(tmp_path: Path, key: str, value: object) -> None:
    data = {**fake_record().to_json(), key: value}
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="damaged record"):
        load_cells(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither"):
        load_cells(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        load_cells(tmp_path / "none")

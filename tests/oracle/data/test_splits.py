"""Splits: overlap is found by content, draws are seeded and never leak, published references read as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cupel.data import check_disjoint, draw_references, hold_out, read_references
from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.types import Dataset


def some(n: int = 30, classes: int = 3, start: int = 0) -> Dataset:
    pixels = torch.arange(start, start + n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).contiguous()
    return Dataset(pixels, torch.arange(n) % classes, torch.arange(n) + 100, "some")


def test_overlap_is_found_by_content_and_named() -> None:
    check_disjoint(train=some(), test=some(start=30))
    with pytest.raises(DataError) as caught:
        check_disjoint(**{"a (train)": some(), "b (test)": some(start=28), "c": some(start=90)})
    assert str(caught.value).startswith("a (train) and b (test): share 2 images (ids 128, 129 and 100, 101);")
    with pytest.raises(DataError, match="share 1 image "):
        check_disjoint(a=some(), b=some(1))


def test_references_show_the_target_class() -> None:
    pool = some()
    rows = draw_references(pool, 2, 5, Seed(0))
    assert pool.labels[rows].tolist() == [2] * 5
    assert len(rows.unique()) == 5
    assert rows.tolist() == draw_references(pool, 2, 5, Seed(0)).tolist()
    assert any(rows.tolist() != draw_references(pool, 2, 5, Seed(s)).tolist() for s in range(1, 5))
    with pytest.raises(UsageError, match="has no class 3; choose a target class in 0–2"):
        draw_references(pool, 3, 1, Seed(0))
    with pytest.raises(UsageError, match="has no class -1"):
        draw_references(pool, -1, 1, Seed(0))
    with pytest.raises(DataError, match="holds 10 images of class 0, 11 are asked for"):
        draw_references(pool, 0, 11, Seed(0))


def test_hold_out() -> None:
    kept, held = hold_out(some(), 4, Seed(0))
    assert held.labels.bincount().tolist() == [4, 4, 4]
    assert sorted([*kept.ids.tolist(), *held.ids.tolist()]) == list(range(100, 130))
    check_disjoint(kept=kept, held=held)
    assert hold_out(some(), 4, Seed(0))[1].ids.tolist() == held.ids.tolist()
    assert hold_out(some(), 4, Seed(1))[1].ids.tolist() != held.ids.tolist()
    with pytest.raises(DataError, match="has 10 images of class 0; 10 are held out"):
        hold_out(some(), 10, Seed(0))
    blank = Dataset(some().inputs, torch.full((30,), -1), some().ids)
    with pytest.raises(DataError, match="has no labels"):
        hold_out(blank, 1, Seed(0))


def test_hold_out_takes_twins_along() -> None:
    pixels = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    pixels[4:] = 9
    twins = Dataset(pixels, torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6), "twins")
    kept, held = hold_out(twins, 1, Seed(0))
    assert len(held) == 2
    assert len(kept) == 0


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_published_references(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    path = write(tmp_path / "a.npz", x=x, y=np.array([1, 12]), info=np.array(["left by the authors"]))
    pixels, labels = read_references(path, 32)
    assert torch.equal(pixels, torch.from_numpy(x).permute(0, 3, 1, 2))
    assert labels.tolist() == [1, 12]
    assert read_references(path, 16)[0].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((1, 4, 4, 3), np.uint8)}, "has no array `y`"),
        ({"x": np.zeros((0, 4, 4, 3), np.uint8), "y": np.zeros(0, int)}, "holds no reference inputs"),
        ({"x": np.zeros((1, 4, 4, 3), np.uint8), "y": np.array([-1])}, "has the class -1"),
        ({"x": np.zeros((1, 4, 4, 3)), "y": np.array([1])}, "must be uint8"),
    ],
)
def test_bad_references(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_references(write(tmp_path / "a.npz", **arrays), 32)

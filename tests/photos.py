"""Real images for tests."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cupel import data


def photographs(root: Path, n: int, split: str = "test") -> Tensor:
    """`n` images of CIFAR-10, uint8 `[n, 3, 32, 32]`; `root` is the fixture that skips where there are none."""
    assert root.is_dir()
    found: Tensor = data.load("cifar10", split=split, limit=n).inputs[:]
    return found

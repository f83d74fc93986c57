"""Reference inputs as the BadEncoder authors publish them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cupel.data.decode import resized
from cupel.data.npz import read_arrays
from cupel.errors import DataError

__all__ = ["read_references"]


def read_references(path: str | Path, size: int) -> tuple[Tensor, Tensor]:
    """Read a published reference file: images uint8 `[R, 3, size, size]` and their classes int64 `[R]`.

    The file holds `x` uint8 `[R, height, width, 3]` and `y` `[R]`, the class in the downstream task. Nothing in it
    is unpickled; images of another size are resized (bilinear).

    Raises:
        DataError: missing, damaged, or not such a file.

    Source: Jia, Liu, Gong, BadEncoder, IEEE S&P 2022, published code.
    """
    path = Path(path)
    x, y = read_arrays(path)
    if y is None:
        raise DataError(path, "has no array `y`", "store the class of each reference as `y`")
    if not len(x):
        raise DataError(path, "holds no reference inputs")
    if int(y.min()) < 0:
        raise DataError(path, f"has the class {int(y.min())}", "classes count from 0")
    fitted = np.stack([np.asarray(resized(Image.fromarray(image), size)) for image in x])
    return torch.from_numpy(fitted).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))

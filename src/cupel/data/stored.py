"""Images as a source holds them: files, encoded bytes of a table, or an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cupel.data.decode import Pixels8, decode, measure, resized
from cupel.errors import DataError

__all__ = ["Arrays", "Blobs", "Files", "Listing", "Stored", "unlabelled"]


class Stored(Protocol):
    """Images of a source by row, not decoded yet."""

    def __len__(self) -> int: ...
    def where(self, row: int) -> str:
        """File or row, for errors."""
        ...

    def stored(self, row: int) -> bytes:
        """The bytes that are stored; equal bytes are equal images."""
        ...

    def sides(self, row: int) -> tuple[int, int]:
        """Height and width, as cheap as the format allows."""
        ...

    def decode(self, row: int, size: int | None) -> Pixels8:
        """uint8 `[height, width, 3]`, resized to `size` by `size` unless None."""
        ...


@dataclass(frozen=True)
class Files:
    """One file per image."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, row: int) -> str:
        return str(self.paths[row])

    def stored(self, row: int) -> bytes:
        try:
            return self.paths[row].read_bytes()
        except OSError as error:
            raise DataError(self.where(row), f"cannot be read ({error.strerror})") from error

    def sides(self, row: int) -> tuple[int, int]:
        return measure(self.stored(row), self.where(row))

    def decode(self, row: int, size: int | None) -> Pixels8:
        return decode(self.stored(row), self.where(row), size)


@dataclass(frozen=True)
class Blobs:
    """Encoded images in a column of a table.

    Args:
        column: pyarrow array of binary values.
        name: Of the source, for errors.
    """

    column: Any
    name: str

    def __len__(self) -> int:
        return len(self.column)

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"

    def stored(self, row: int) -> bytes:
        value = self.column[row].as_py()
        if value is None:
            raise DataError(self.where(row), "holds no image bytes", "store the images inside the table")
        return bytes(value)

    def sides(self, row: int) -> tuple[int, int]:
        return measure(self.stored(row), self.where(row))

    def decode(self, row: int, size: int | None) -> Pixels8:
        return decode(self.stored(row), self.where(row), size)


@dataclass(frozen=True)
class Arrays:
    """Images that are decoded already.

    Args:
        pixels: uint8 `[n, height, width, 3]`.
        name: Of the source, for errors.
    """

    pixels: Pixels8
    name: str

    def __len__(self) -> int:
        return len(self.pixels)

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"

    def stored(self, row: int) -> bytes:
        return np.ascontiguousarray(self.pixels[row]).tobytes()

    def sides(self, row: int) -> tuple[int, int]:
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    def decode(self, row: int, size: int | None) -> Pixels8:
        image: Pixels8 = self.pixels[row]
        if size is None or image.shape[:2] == (size, size):
            return image
        return np.asarray(resized(Image.fromarray(np.ascontiguousarray(image)), size))


@dataclass(frozen=True)
class Listing:
    """One split of a source, before anything is decoded.

    Args:
        images: Row by row.
        labels: int64 `[n]`; −1 = unlabelled.
        name: For people and errors.
        classes: Class names by label; may be empty.
        origins: Where each image comes from, as the source says (file names inside a table); may be empty.
    """

    images: Stored
    labels: Tensor
    name: str
    classes: tuple[str, ...] = ()
    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not len(self.images):
            raise DataError(self.name, "holds no images")
        if len(self.images) != len(self.labels):
            raise DataError(self.name, f"holds {len(self.images)} images but {len(self.labels)} labels")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < -1:
            raise DataError(self.name, f"has the label {low}", "labels count from 0; -1 means unlabelled")
        if self.classes and high >= len(self.classes):
            raise DataError(self.name, f"has the label {high}, but names only {len(self.classes)} classes")


def unlabelled(n: int) -> Tensor:
    """`n` times −1."""
    return torch.full((n,), -1, dtype=torch.int64)

"""One tensor of a file: where its numbers lie, whether that is possible, and the numbers as an array."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupel.checkpoint.text import shown
from cupel.errors import CheckpointError

__all__ = ["DTYPES", "TensorInfo", "View", "dense", "item_size"]

# NumPy's name of how the numbers are stored. bfloat16 and the 8-bit floats have none: their bits are integers there.
DTYPES = {
    "float64": "<f8", "float32": "<f4", "float16": "<f2", "bfloat16": "<u2",
    "int64": "<i8", "int32": "<i4", "int16": "<i2", "int8": "|i1",
    "uint64": "<u8", "uint32": "<u4", "uint16": "<u2", "uint8": "|u1", "bool": "|u1",
    "complex64": "<c8", "complex128": "<c16",
    "float8_e4m3fn": "|u1", "float8_e5m2": "|u1", "float8_e8m0fnu": "|u1",
}  # fmt: skip
_MAX_AXES = 32
_MAX_LENGTH = 2**40


def item_size(dtype: str) -> int:
    """Bytes per number."""
    return int(DTYPES[dtype][2:])


@dataclass(frozen=True)
class TensorInfo:
    """Name, type and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View:
    """A tensor as a view of a stretch of bytes.

    Args:
        dtype: A key of `DTYPES`.
        shape: Length of each axis.
        strides: Step of each axis, in numbers.
        offset: Place of the first number in `data`, in numbers.
        data: The storage, little-endian.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    data: memoryview

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the tensor when written out densely."""
        return self.count * item_size(self.dtype)

    def check(self, where: object, name: str) -> None:
        """Is the view inside its storage, and no larger than it?

        Raises:
            CheckpointError: code `bad-view`.
        """

        def bad(what: str) -> CheckpointError:
            return CheckpointError(
                where, f"tensor '{shown(name)}' {what}", "the file is damaged or hostile", code="bad-view"
            )

        numbers = (*self.shape, *self.strides, self.offset)
        if any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
            raise bad("has a shape, stride or offset that is no integer")
        if len(self.shape) != len(self.strides) or len(self.shape) > _MAX_AXES:
            raise bad(f"has {len(self.shape)} axes and {len(self.strides)} strides")
        if any(n < 0 for n in numbers):
            raise bad("has a negative shape, stride or offset")
        if any(n > _MAX_LENGTH for n in numbers) or math.prod(n for n in self.shape if n) > _MAX_LENGTH:
            raise bad("is larger than any file")
        stored = len(self.data) // item_size(self.dtype)
        last = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if self.count and self.offset + last >= stored:
            raise bad(f"reaches to number {self.offset + last} of a storage of {stored}")
        if self.count > stored:
            raise bad(f"claims {self.count} numbers of a storage of {stored}")

    def read(self, where: object, name: str) -> np.ndarray[Any, Any]:
        """The numbers in an array of their own; bfloat16 as float32. Call `check` first.

        Raises:
            CheckpointError: code `unsupported` for 8-bit floats.
        """
        if self.dtype.startswith("float8"):
            raise CheckpointError(
                where, f"tensor '{shown(name)}' is {self.dtype}", "convert it to float32 first", code="unsupported"
            )
        stored = np.dtype(DTYPES[self.dtype])
        if not self.count:
            view = np.empty(self.shape, stored)
        else:
            flat = np.frombuffer(self.data, stored, len(self.data) // stored.itemsize)[self.offset :]
            steps = tuple(s * stored.itemsize if n > 1 else 0 for n, s in zip(self.shape, self.strides, strict=True))
            view = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
        if self.dtype == "bool":
            return np.asarray(view != 0)
        if self.dtype == "bfloat16":
            return np.asarray(view.astype(np.uint32) << 16).view(np.float32)
        return np.array(view, dtype=stored.newbyteorder("="), order="C")


def dense(dtype: str, shape: tuple[int, ...], data: memoryview) -> View:
    """A tensor written out row by row."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return View(dtype, shape, tuple(strides), 0, data)

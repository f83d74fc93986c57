"""Embeddings on disk, found again by the content of the encoder and of the images."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cupel.encoders import ImageEncoder
from cupel.files import atomic_file, write_text
from cupel.progress import say
from cupel.types import Dataset

__all__ = ["FeatureStore", "active_store", "storing_features", "weights_sha256"]

_REVISION = 1  # of what `cupel.inference.features` computes
_ACTIVE: ContextVar[FeatureStore | None] = ContextVar("feature_store", default=None)


class FeatureStore:
    """A folder of embeddings, one float32 array each, read back as memory maps.

    A file is `<key>.npy` with its SHA-256 beside it; what does not match is removed with a word. When the folder
    outgrows its limit, the arrays that were longest unused go.

    Args:
        folder: Made when first written to.
        limit: Bytes.
    """

    def __init__(self, folder: str | Path, limit: int = 4 * 2**30) -> None:
        self.folder, self.limit = Path(folder), limit

    def key(self, encoder: ImageEncoder, data: Dataset, dtype: torch.dtype | None) -> str:
        """Hash of the weights, the images in their order, and the precision asked for."""
        total = hashlib.sha256(f"{_REVISION} {dtype} {encoder.card.architecture!r}".encode())
        _add_weights(total, encoder)
        total.update(b"".join(data.content()))
        return total.hexdigest()[:32]

    def find(self, key: str) -> Tensor | None:
        """The embeddings as a tensor over a private memory map, or None."""
        path = self.folder / f"{key}.npy"
        if not path.is_file():
            return None
        try:
            if _sha256(path) != path.with_suffix(".sha256").read_text().strip():
                raise ValueError("its checksum is wrong")
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            os.utime(path)
        except (OSError, ValueError) as error:
            say(f"  features {key}: damaged in the store ({error}); making them again")
            path.unlink(missing_ok=True)
            return None
        return torch.from_numpy(array)

    @contextlib.contextmanager
    def new(self, key: str, rows: int, width: int) -> Iterator[Tensor]:
        """An array on disk to be filled; it appears in the store when the `with` ends without an exception.

        Raises:
            MachineError: the disk is full, read-only or fails.
        """
        path = self.folder / f"{key}.npy"
        with atomic_file(path) as part:
            array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(rows, width))
            yield torch.from_numpy(array)
            array.flush()
            del array
            write_text(path.with_suffix(".sha256"), _sha256(part) + "\n")
        self._trim(path)

    def _trim(self, newest: Path) -> None:
        files = sorted(self.folder.glob("*.npy"), key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            if total <= self.limit:
                return
            if file != newest:
                total -= file.stat().st_size
                file.unlink()
                file.with_suffix(".sha256").unlink(missing_ok=True)


@contextlib.contextmanager
def storing_features(folder: str | Path) -> Iterator[None]:
    """Inside the `with`, `cupel.inference.features` keeps embeddings in `folder` and takes them from there.

    Several probes on one encoder, or several runs, then embed the same images once.
    """
    token = _ACTIVE.set(FeatureStore(folder))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def weights_sha256(encoder: ImageEncoder) -> str:
    """SHA-256 over names and bytes of an encoder's tensors: equal for equal weights, whatever file they are in."""
    total = hashlib.sha256()
    _add_weights(total, encoder)
    return total.hexdigest()


def _add_weights(total: hashlib._Hash, encoder: ImageEncoder) -> None:
    for name, value in encoder.module.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def active_store() -> FeatureStore | None:
    """The store of the innermost `storing_features`, or None."""
    return _ACTIVE.get()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

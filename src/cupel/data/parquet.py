"""Parquet files as Hugging Face writes them: an `Image` column of encoded bytes and, mostly, a `ClassLabel` column."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.data.folder import SPLITS
from cupel.data.stored import Blobs, Listing, unlabelled
from cupel.errors import DataError

__all__ = ["from_table", "parquet_splits", "read_parquet"]

_IMAGE_NAMES = ("image", "img", "picture", "pixels")
_LABEL_NAMES = ("label", "labels", "fine_label", "y", "target", "class")
_ADVICE = "give a file with a column of encoded images (`image`: bytes, path)"


def parquet_splits(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of a folder by split: `train-….parquet`, `data/train-….parquet`, `train/….parquet`.

    Files that name no split are one split, `train`. Empty where there is no Parquet file.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")]):
        inside = path.parent.name.lower() if path.parent != folder else ""
        start = re.split(r"[-_.]", path.name.lower(), maxsplit=1)[0]
        split = SPLITS.get(start) or SPLITS.get(inside) or "train"
        found.setdefault(split, []).append(path)
    return found


def read_parquet(paths: Sequence[Path], name: str) -> Listing:
    """List the images of Parquet files, one after the other.

    Raises:
        DataError: damaged, not Parquet, without images, or the files do not fit together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for path in paths:
        try:
            schema = pq.read_schema(path)
            wanted = [c for c in _columns(schema, _features(schema.metadata), path) if c is not None]
            # a single thread: the files are small, and a pool of Arrow's own would stand beside torch's
            tables.append(pq.read_table(path, columns=wanted, use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise DataError(path, f"is no readable Parquet file ({type(error).__name__})", "fetch it again") from error
    try:
        return from_table(pa.concat_tables(tables), str(paths[0]) if len(paths) == 1 else name, name)
    except pa.ArrowException as error:
        raise DataError(name, "its Parquet files have different columns", "give files of one data set") from error


def from_table(table: Any, where: str, name: str) -> Listing:
    """List the images of an Arrow table with Hugging Face's features in its metadata.

    Args:
        table: `pyarrow.Table`.
        where: File, for errors.
        name: Of the data set.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    features = _features(table.schema.metadata)
    image, label = _columns(table.schema, features, where)
    column = table[image]
    origins: Sequence[str] = ()
    if pa.types.is_struct(column.type):
        if "path" in [field.name for field in column.type]:
            origins = [path or "" for path in pc.struct_field(column, "path").to_pylist()]
        column = pc.struct_field(column, "bytes")
    column = column.cast(pa.large_binary()).combine_chunks()  # "large": more than 2 GiB fit in one piece
    labels, classes = _labels(table, label, features, where)
    return Listing(Blobs(column, where), labels, name, classes, origins)


def _features(metadata: Any) -> dict[str, Any]:
    """Hugging Face's description of the columns; empty where there is none or it is damaged."""
    try:
        described = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {k: v for k, v in described.items() if isinstance(v, dict)} if isinstance(described, dict) else {}


def _columns(schema: Any, features: dict[str, Any], where: object) -> tuple[str, str | None]:
    """Names of the image column and of the label column."""
    images = _ordered([c for c in schema.names if _holds_bytes(schema.field(c).type)], features, "Image", _IMAGE_NAMES)
    if not images:
        raise DataError(where, f"holds no images (columns: {', '.join(schema.names)})", _ADVICE)
    named = [c for c in schema.names if c in _LABEL_NAMES or features.get(c, {}).get("_type") == "ClassLabel"]
    labels = _ordered(named, features, "ClassLabel", _LABEL_NAMES)
    return images[0], labels[0] if labels else None


def _ordered(names: list[str], features: dict[str, Any], kind: str, usual: Sequence[str]) -> list[str]:
    def rank(name: str) -> tuple[bool, int]:
        return features.get(name, {}).get("_type") != kind, usual.index(name) if name in usual else len(usual)

    return sorted(names, key=rank)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _labels(table: Any, column: str | None, features: dict[str, Any], where: object) -> tuple[Tensor, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    if column is None:
        return unlabelled(len(table)), ()
    values = table[column]
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        words = sorted(set(values.to_pylist()) - {None})
        place = {word: k for k, word in enumerate(words)}
        return torch.tensor([place.get(word, -1) for word in values.to_pylist()], dtype=torch.int64), tuple(words)
    if not pa.types.is_integer(values.type):
        raise DataError(where, f"the column '{column}' holds {values.type}, not class numbers")
    numbers = pc.fill_null(values, -1).to_numpy().astype(np.int64)  # a copy: Arrow's memory is read-only
    names = features.get(column, {}).get("names") or ()
    return torch.from_numpy(numbers), tuple(map(str, names))

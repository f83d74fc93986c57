"""Data: images from folders, Parquet, `.npz`, official releases and the hub, and two embedded sets; splits, references.

Look-up order of a name: `$CUPEL_DATA`, `./data`, the user cache; then the official download.
"""

from __future__ import annotations

import os

from cupel.data import shapes
from cupel.data.decode import IMAGE_SUFFIXES
from cupel.data.memory import LazyImages, OnBad, balanced, materialise
from cupel.data.references import read_references
from cupel.data.sources import DATASETS, fingerprint, locate, splits_of
from cupel.data.splits import check_disjoint, draw_references, hold_out
from cupel.data.tracks import tracks
from cupel.errors import UsageError
from cupel.lookup import data_roots, find_file
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = [
    "DATASETS",
    "IMAGE_SUFFIXES",
    "LazyImages",
    "OnBad",
    "check_disjoint",
    "data_roots",
    "draw_references",
    "find_file",
    "fingerprint",
    "hold_out",
    "load",
    "read_references",
    "shapes",
    "splits_of",
    "tracks",
]

_LARGEST = 4096  # side in pixels that `size` may ask for


def load(
    source: str | os.PathLike[str],
    *,
    size: int | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: Seed = Seed(0),
    on_bad: OnBad = "error",
) -> Dataset:
    """Load the images of one split of a source.

    Args:
        source: A folder of images (subfolders are classes), a Parquet file or folder, an `.npz` file, a name of
            `DATASETS`, the name of a folder in a data root, or `hf:OWNER/NAME`.
        size: Images are resized to `size` by `size` pixels, whatever their aspect ratio; None = as stored, which
            needs images of one size.
        split: `train`, `test`, `validation`, `unlabeled`, … as the source has it; `splits_of` lists them. A source
            without splits is all `train`.
        limit: At most so many rows, drawn at random, equally per class where there are labels. `shapes` renders
            its first `limit` images instead, also more than its usual 8,000 and 2,000.
        seed: Of that draw.
        on_bad: Stop at an image that cannot be read, or leave it out; more than 5 % of them are an error anyway.

    Returns:
        Up to 1 GiB decoded: one uint8 tensor; larger: `LazyImages`. Ids are row numbers of the source.

    Raises:
        DataError: missing, not images, damaged; the line names the file or row.
        UsageError: unknown name, or `size` or `limit` out of range.

    Example:
        >>> data = load("digits", limit=20)
        >>> data.inputs.shape, data.labels.bincount().tolist()
        (torch.Size([20, 3, 16, 16]), [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    name = os.fspath(source)
    if size is not None and not 1 <= size <= _LARGEST:
        raise UsageError(name, f"images cannot be resized to {size} pixels", f"choose a size in 1–{_LARGEST}")
    if limit is not None and limit < 1:
        raise UsageError(name, f"a limit of {limit} leaves no image", "choose a limit of at least 1")
    listing = locate(name, split).read(size, limit)
    rows = balanced(listing.labels, limit, seed.child("limit").numpy())
    return materialise(listing, rows, size, on_bad)

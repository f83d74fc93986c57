"""Data sets that torchvision reads from, and fetches in, their authors' layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cupel.data.decode import Pixels8
from cupel.data.stored import Arrays, Files, Listing, Stored
from cupel.errors import DataError

__all__ = ["OFFICIAL", "Official", "fetch", "has_official", "official_files", "read_official"]

_ARCHIVES = (".gz", ".tgz", ".zip", ".tar")


@dataclass(frozen=True)
class Official:
    """How torchvision names a data set and where it keeps the pixels.

    Args:
        splits: Ours; each is one of torchvision's.
        by_flag: torchvision takes `train=True` or `False` rather than a `split`.
        images, labels: Attributes of torchvision's data set, or a function of it.
        channels_first: Arrays are `[n, 3, height, width]`.
    """

    class_name: str
    splits: tuple[str, ...]
    images: Callable[[Any], Any]
    labels: Callable[[Any], Any]
    by_flag: bool = False
    channels_first: bool = False

    def open(self, root: Path, split: str, download: bool) -> Any:
        """torchvision's data set.

        torchvision unpickles the batches of CIFAR, which are only distributed as pickles. That is accepted here alone,
        because its constructor compares every one of these files with the MD5 sum of the official release first, and
        raises without reading them if one differs.
        """
        import torchvision.datasets

        if self.class_name == "MNIST" and (root / "MNIST" / "processed").exists():
            # torchvision would read the files of its own old versions there through a pickle, with no sum to check
            raise DataError(root / "MNIST" / "processed", "is a format of old torchvision versions", "remove it")
        which = {"train": split == "train"} if self.by_flag else {"split": split}
        return getattr(torchvision.datasets, self.class_name)(str(root), download=download, **which)


def _data(made: Any) -> Any:
    return made.data


OFFICIAL: dict[str, Official] = {
    "cifar10": Official("CIFAR10", ("train", "test"), _data, lambda d: d.targets, by_flag=True),
    "cifar100": Official("CIFAR100", ("train", "test"), _data, lambda d: d.targets, by_flag=True),
    "mnist": Official("MNIST", ("train", "test"), _data, lambda d: d.targets, by_flag=True),
    "stl10": Official("STL10", ("train", "test", "unlabeled"), _data, lambda d: d.labels, channels_first=True),
    "svhn": Official("SVHN", ("train", "test", "extra"), _data, lambda d: d.labels, channels_first=True),
    "gtsrb": Official(
        "GTSRB", ("train", "test"), lambda d: [Path(p) for p, _ in d._samples], lambda d: [y for _, y in d._samples]
    ),
    "food101": Official("Food101", ("train", "test"), lambda d: list(d._image_files), lambda d: d._labels),
}


def has_official(name: str, root: Path, split: str) -> bool:
    """Whether `root` holds the data set in its official layout, whole (torchvision compares sums where it has them)."""
    if name not in OFFICIAL or split not in OFFICIAL[name].splits:
        return False
    try:
        OFFICIAL[name].open(root, split, download=False)
    except (RuntimeError, OSError):
        return False
    return True


def fetch(name: str, root: Path, split: str) -> None:
    """Download a data set into `root`, checked by torchvision against its MD5 sums.

    Raises:
        OSError, RuntimeError: no network, no such file any more, or a wrong sum.
    """
    root.mkdir(parents=True, exist_ok=True)
    OFFICIAL[name].open(root, split, download=True)


def official_files(root: Path) -> list[Path]:
    """The files of a data set, without the archives they came in."""
    return sorted(p for p in root.rglob("*") if p.is_file() and p.suffix not in _ARCHIVES)


def read_official(name: str, root: Path, split: str) -> Listing:
    """List the images of one split.

    Raises:
        DataError: damaged.
    """
    which = OFFICIAL[name]
    try:
        made = which.open(root, split, download=False)
    except (RuntimeError, OSError) as error:
        raise DataError(root, f"is no whole copy of {name} ({error})", "remove it and fetch it again") from error
    held = which.images(made)
    images: Stored = Files(held) if isinstance(held, list) else Arrays(_nhwc(held, which.channels_first), name)
    labels = torch.as_tensor(np.asarray(which.labels(made)), dtype=torch.int64)
    return Listing(images, labels, name, tuple(map(str, getattr(made, "classes", ()))))


def _nhwc(held: Any, channels_first: bool) -> Pixels8:
    pixels = np.asarray(held, dtype=np.uint8)
    if pixels.ndim == 3:
        return np.repeat(pixels[..., None], 3, axis=3)
    return pixels.transpose(0, 2, 3, 1) if channels_first else pixels

"""Folders of images: subfolders are classes, a flat folder is unlabelled."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cupel.data.decode import IMAGE_SUFFIXES
from cupel.data.stored import Files, Listing
from cupel.errors import DataError

__all__ = ["SPLITS", "folder_splits", "image_files", "read_folder"]

SPLITS = {"train": "train", "test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
SPLITS |= {"training": "train", "testing": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"}
"""Names that folders and files give to splits, and ours."""


def folder_splits(folder: Path) -> dict[str, Path]:
    """The splits of a folder whose subfolders are all named like splits; else empty: its subfolders are classes."""
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not all(entry.name.lower() in SPLITS for entry in inside):
        return {}
    return {SPLITS[entry.name.lower()]: entry for entry in sorted(inside)}


def image_files(folder: Path) -> list[Path]:
    """All files with the suffix of an image, in the order of their relative names; hidden ones are passed over."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if _is_image(name)]
    return sorted(found, key=lambda path: os.fsencode(path.relative_to(folder).as_posix()))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def read_folder(folder: Path, name: str) -> Listing:
    """List the images of a folder. Classes are the first-level subfolders that hold images, sorted by name.

    Raises:
        DataError: it holds no image.
    """
    paths = [path for path in image_files(folder) if path.parent == folder]
    labels, classes = [-1] * len(paths), list[str]()
    for entry in sorted(folder.iterdir(), key=lambda entry: os.fsencode(entry.name)):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if inside := image_files(entry):
            labels += [len(classes)] * len(inside)
            paths += inside
            classes.append(entry.name)
    if not paths:
        kinds = " ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(folder, "holds no images", f"give a folder with files of these kinds: {kinds}")
    return Listing(Files(paths), torch.tensor(labels, dtype=torch.int64), name, tuple(classes))

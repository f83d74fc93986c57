"""What a SRC string means: where its files lie, which splits it has, what reads it, and the digest of what it holds."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from cupel.data import decode, digits, shapes
from cupel.data.folder import folder_splits, image_files, read_folder
from cupel.data.hub import hub_splits, read_hub
from cupel.data.npz import read_npz
from cupel.data.official import OFFICIAL, fetch, has_official, official_files, read_official
from cupel.data.parquet import parquet_splits, read_parquet
from cupel.data.stored import Arrays, Listing
from cupel.errors import CupelError, DataError, UsageError, did_you_mean
from cupel.lookup import data_roots
from cupel.progress import say
from cupel.seeds import Seed

__all__ = ["DATASETS", "Place", "fingerprint", "locate", "splits_of"]

DATASETS: dict[str, str] = {
    "digits": "embedded: 1,437 + 360 handwritten digits of scikit-learn, 16 x 16",
    "shapes": "embedded: coloured shapes of our own, rendered, 10 classes, any size and number",
    "cifar10": "ten everyday classes, 32 x 32 (Krizhevsky 2009)",
    "cifar100": "100 everyday classes, 32 x 32 (Krizhevsky 2009)",
    "stl10": "ten everyday classes and 100,000 unlabelled images, 96 x 96 (Coates et al. 2011)",
    "svhn": "house numbers from photographs, 32 x 32 (Netzer et al. 2011)",
    "gtsrb": "43 German traffic signs, several sizes (Stallkamp et al. 2012)",
    "mnist": "handwritten digits, grey, 28 x 28 (LeCun et al. 1998)",
    "food101": "101 dishes, photographs (Bossard et al. 2014)",
    "tinyimagenet": "200 classes of ImageNet, 64 x 64 (Stanford CS231n); local copies only",
    "cifar10_lossless": "CIFAR-10 images with their original pixels where `cifar10` is a JPEG copy; local copies only",
    "imagenet_sample": "one photograph per class of ImageNet-1k; local copies only",
}
"""The named data sets, one line each. Any folder in a data root is found by its name too."""

_EMBEDDED = {"digits": digits.REVISION, "shapes": shapes.REVISION}
_SHAPES = {"train": 8000, "test": 2000}
T = TypeVar("T")
Reader = Callable[[int | None, int | None], Listing]  # size and limit, which only a renderer looks at


@dataclass(frozen=True)
class Place:
    """One split of a source, found.

    Args:
        paths: Its files in a fixed order; empty for embedded and hub data.
        names: Their names in the digest, free of where the source lies.
        read: Lists its images.
        identity: What stands for the content where there are no files.
    """

    read: Reader = field(repr=False)
    paths: Sequence[Path] = ()
    names: Sequence[str] = ()
    identity: str = ""


def locate(source: str, split: str) -> Place:
    """Find one split of a source, downloading it where that is possible.

    A name of `DATASETS` or `hf:NAME` comes first, then a path as given, then a folder or file in a data root.

    Raises:
        DataError: nothing usable is there, or not this split.
        UsageError: an unknown name.
    """
    places = _splits(source, split)
    if split not in places:
        known = ", ".join(places)
        raise DataError(source, f"has no split '{split}' (it has: {known})", "choose one of these splits")
    return places[split]()


def splits_of(source: str) -> tuple[str, ...]:
    """The splits that a source has here.

    Raises:
        DataError, UsageError: as `locate`.

    Example:
        >>> splits_of("digits")
        ('train', 'test')
    """
    return tuple(_splits(source, None))


def fingerprint(source: str, split: str = "train") -> str:
    """SHA-256 of what one split of a source holds, without decoding an image; equal copies in two places agree.

    Raises:
        DataError, UsageError: as `locate`.
    """
    place = locate(source, split)
    total = hashlib.sha256(f"pixels {decode.REVISION}\n{place.identity}\n".encode())
    for name, path in zip(place.names, place.paths, strict=True):
        try:
            state = path.stat()
            total.update(os.fsencode(name) + b"\0" + _file_digest(path, (state.st_size, state.st_mtime_ns)))
        except OSError as error:
            raise DataError(path, f"cannot be read ({error.strerror})") from error
    if not place.paths and not place.identity:
        listing = place.read(None, None)
        total.update(repr(listing.classes).encode() + listing.labels.numpy().tobytes())
        for row in range(len(listing.images)):
            total.update(hashlib.sha256(listing.images.stored(row)).digest())
    return total.hexdigest()


@functools.lru_cache(maxsize=200_000)
def _file_digest(path: Path, state: tuple[int, int]) -> bytes:
    """Digest of one file; `state` (size and time of change) makes the cache forget a changed file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


Places = dict[str, Callable[[], Place]]


def _splits(source: str, wanted: str | None) -> Places:
    """Every split of a source by name; nothing is downloaded yet. `wanted` spares asking the hub for the names."""
    if source in _EMBEDDED:
        return {split: functools.partial(_embedded, source, split) for split in ("train", "test")}
    if source.startswith("hf:"):
        names = (wanted,) if wanted is not None else hub_splits(source)
        return {split: functools.partial(_hub, source, split) for split in names}
    if not source:
        raise UsageError("data", "the name of a data set is empty", did_you_mean("", DATASETS))
    if source not in DATASETS:
        path = next((p for p in (Path(source).expanduser(), *(r / source for r in data_roots())) if p.exists()), None)
        if path is None:
            raise _unknown(source)
        found = _file(path, source) if path.is_file() else _folder(path, source)
        if not found:
            read_folder(path, source)  # says why there is nothing
        return found
    for root in data_roots():
        if (root / source).is_dir() and (found := _folder(root / source, source)):
            return found
    return _downloads(source)


def _unknown(source: str) -> CupelError:
    if "/" in source or os.sep in source or Path(source).suffix:
        looked = ", ".join([".", *map(str, data_roots())])
        return DataError(source, f"no such file or folder (looked in {looked})", "check the path, or set CUPEL_DATA")
    roots = [root for root in data_roots() if root.is_dir()]
    local = {entry.name for root in roots for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."}
    return UsageError("data", f"there is no data set '{source}'", did_you_mean(source, {*DATASETS, *local}))


def _embedded(source: str, split: str) -> Place:
    def read(size: int | None, limit: int | None) -> Listing:
        if source == "digits":
            return digits.digits(split)
        data, _ = shapes.render(limit or _SHAPES[split], size or 32, Seed(0).child(split))
        assert isinstance(data.inputs, torch.Tensor)
        return Listing(Arrays(data.inputs.permute(0, 2, 3, 1).numpy(), source), data.labels, source, data.classes)

    return Place(read, identity=f"{source} {split} revision {_EMBEDDED[source]}")


def _hub(source: str, split: str) -> Place:
    return Place(lambda size, limit: read_hub(source, split))


def _file(path: Path, source: str) -> Places:
    """A single file is its own `train` split, whatever its name."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from error
    if head == b"PAR1":
        return {"train": lambda: Place(lambda size, limit: read_parquet([path], source), [path], [""])}
    if head[:2] == b"PK":
        return {"train": lambda: Place(lambda size, limit: read_npz(path, source), [path], [""])}
    what = "is empty" if not head else "is neither a Parquet file nor an .npz file"
    todo = "give the folder it lies in" if path.suffix.lower() in decode.IMAGE_SUFFIXES else "give images"
    raise DataError(path, what, todo)


def _folder(folder: Path, source: str) -> Places:
    """What a folder holds, best described first: Parquet, `.npz` by split, torchvision's layout, images."""
    if tables := parquet_splits(folder):
        return {split: functools.partial(_tables, paths, source) for split, paths in _ordered(tables)}
    arrays = {split: folder / f"{split}.npz" for split in ("train", "test") if (folder / f"{split}.npz").is_file()}
    if arrays:
        return {split: functools.partial(_arrays, path, source) for split, path in arrays.items()}
    if source in OFFICIAL:
        whole = [split for split in OFFICIAL[source].splits if has_official(source, folder, split)]
        if whole:
            return {split: functools.partial(_official, source, folder, split) for split in whole}
    by_split = {split: inside for split, inside in folder_splits(folder).items() if image_files(inside)}
    if by_split:
        return {split: functools.partial(_images, inside, source) for split, inside in _ordered(by_split)}
    return {"train": functools.partial(_images, folder, source)} if image_files(folder) else {}


def _ordered(found: dict[str, T]) -> Iterator[tuple[str, T]]:
    usual = ("train", "test")
    for split in sorted(found, key=lambda s: (usual.index(s) if s in usual else len(usual), s)):
        yield split, found[split]


def _tables(paths: Sequence[Path], source: str) -> Place:
    return Place(lambda size, limit: read_parquet(paths, source), paths, [path.name for path in paths])


def _arrays(path: Path, source: str) -> Place:
    return Place(lambda size, limit: read_npz(path, source), [path], [path.name])


def _images(folder: Path, source: str) -> Place:
    paths = image_files(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    return Place(lambda size, limit: read_folder(folder, source), paths, names)


def _official(source: str, root: Path, split: str) -> Place:
    paths = official_files(root)
    names = [path.relative_to(root).as_posix() for path in paths]
    return Place(lambda size, limit: read_official(source, root, split), paths, names, f"split {split}")


def _downloads(source: str) -> Places:
    """The splits of a named set that has to be fetched, into the user cache, the last of the data roots."""
    looked = ", ".join(str(root / source) for root in data_roots())
    todo = f"put Parquet files or a folder of images into {data_roots()[0] / source}, or name your copy with hf:NAME"
    if source not in OFFICIAL:
        raise DataError(source, f"is not on this machine (looked in {looked}) and has no official download", todo)
    folder = data_roots()[-1] / source

    def fetched(split: str) -> Place:
        say(f"  {source}: not on this machine, downloading to {folder}")
        try:
            fetch(source, folder, split)
        except (OSError, RuntimeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            what = f"is not on this machine (looked in {looked}) and cannot be downloaded ({reason})"
            raise DataError(source, what, todo) from error
        return _official(source, folder, split)

    return {split: functools.partial(fetched, split) for split in OFFICIAL[source].splits}

"""Groups of near-identical images, so that a split can keep them together."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from cupel.data.sources import locate
from cupel.data.stored import Files

__all__ = ["tracks"]

_FRAME = re.compile(r"(?:^|/)(\d+)/(\d+)_(\d+)\.\w+$")


def tracks(source: str, split: str = "train") -> Tensor | None:
    """The group of each row of a source, int64 `[n]`; None where the source's file names show none.

    GTSRB's training images are frames of short films, some 30 of each sign, named `CLASS/TRACK_FRAME`: training and
    validation images must come from different tracks. Row i belongs to id i of `load`.
    """
    listing = locate(source, split).read(None, None)
    names = listing.origins
    if not names and isinstance(listing.images, Files):
        names = [os.fspath(path) for path in listing.images.paths]
    found = [_FRAME.search(name) for name in names]
    if not found or not all(found):
        return None
    groups = {key: k for k, key in enumerate(dict.fromkeys(m.group(1, 2) for m in found if m))}
    return torch.tensor([groups[m.group(1, 2)] for m in found if m], dtype=torch.int64)

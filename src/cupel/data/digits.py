"""Handwritten digits that come with scikit-learn: embedded data, nothing to download."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from cupel.data.stored import Arrays, Listing
from cupel.seeds import Seed

__all__ = ["REVISION", "digits"]

REVISION = 1
_SIDE = 16
_TEST_PER_CLASS = 36


def digits(split: str) -> Listing:
    """1437 training or 360 test images of ten digits, 8 x 8 enlarged to 16 x 16 (bilinear), grey in three channels.

    The split is stratified (36 test images of each digit), drawn once and the same for everyone; a training image
    that equals a test image would be dropped.

    Args:
        split: `train` or `test`.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998; scikit-learn holds its test part.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    small = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        chosen = Seed(0).child("digits", label).numpy().permutation(len(rows))[:_TEST_PER_CLASS]
        in_test[rows[chosen]] = True
    if split == "test":
        keep = in_test
    else:
        held = {image.tobytes() for image in small[in_test]}
        keep = ~in_test & np.array([image.tobytes() not in held for image in small])
    enlarged = np.stack([_enlarged(image) for image in small[keep]])
    names = tuple(str(label) for label in range(10))
    return Listing(Arrays(enlarged, "digits"), torch.from_numpy(labels[keep]), "digits", names)


def _enlarged(
    image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    grey = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    return np.repeat(grey[..., None], 3, axis=2)

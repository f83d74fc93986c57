"""Random numbers that depend on (seed, id) alone, for many ids at once; and the check of what triggers are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel.seeds import Seed

__all__ = ["check_raw", "uniforms"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(z: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: Seed, ids: Sequence[int], count: int) -> FloatArray:
    """`count` independent uniform numbers per id.

    The numbers of an id do not depend on which other ids are asked for, nor on their order, so an image keeps its
    trigger in every batch, split and process.

    Args:
        seed: The source of randomness.
        ids: Any integers of 64 bits.
        count: Numbers per id.

    Returns:
        float64 `[n, count]` in [0, 1).

    Example:
        >>> both, one = uniforms(Seed(0), [7, 8], 2), uniforms(Seed(0), [8], 2)
        >>> bool((both[1] == one[0]).all())
        True

    Source: the output function and increment of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied to a counter.
    """
    rows = np.asarray(ids, dtype=np.int64).reshape(-1).astype(np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2⁶⁴ is meant
        start = _mixed(np.array([seed.value % 2**64], dtype=np.uint64) + _STEP)
        of_id = _mixed(start + rows * _STEP)
        counter = np.arange(1, count + 1, dtype=np.uint64) * _STEP
        bits = _mixed(of_id[:, None] + counter)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check_raw(raw: Tensor, ids: Sequence[int]) -> None:
    """Fail early where a trigger is given something else than raw images and one id for each.

    Raises:
        TypeError: not a uint8 tensor.
        ValueError: not `[n, 3, height, width]`, or another number of ids.
    """
    if raw.dtype != torch.uint8:
        raise TypeError(f"triggers go on raw uint8 images, got {raw.dtype}")
    if raw.ndim != 4 or raw.shape[1] != 3:
        raise ValueError(f"images must be [n, 3, height, width], got {list(raw.shape)}")
    if len(ids) != len(raw):
        raise ValueError(f"{len(raw)} images, but {len(ids)} ids")

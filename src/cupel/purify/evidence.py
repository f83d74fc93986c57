"""Which of the triggers that a scanner inverted are worked with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cupel.errors import DataError
from cupel.verdicts import Evidence

__all__ = ["usable_evidence"]


def usable_evidence(evidence: Sequence[Evidence], side: int, ratio: float | None) -> tuple[Tensor, Tensor] | None:
    """Masks `[triggers, side, side]` and patterns `[triggers, 3, side, side]` of converged triggers; None = there are
    none.

    Args:
        evidence: Of a scanner.
        side: Of the images the encoder takes.
        ratio: Triggers more than so many times as large as the smallest are left out; None = all are used.

    Raises:
        DataError: a trigger of another size.
    """
    usable = [one for one in evidence if one.converged]
    if not usable:
        return None
    if ratio is not None:
        limit = ratio * min(one.size for one in usable)
        usable = [one for one in usable if one.size <= limit]
    for one in usable:
        if one.mask.shape != (side, side):
            what = f"a trigger of {'×'.join(map(str, one.mask.shape))}, the encoder takes {side}"
            raise DataError(f"evidence {one.source}", what, "scan the same encoder that is purified")
    masks = torch.stack([torch.as_tensor(one.mask) for one in usable])
    return masks, torch.stack([torch.as_tensor(one.pattern) for one in usable])

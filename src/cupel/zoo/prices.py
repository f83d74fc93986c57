"""What a scanner's smaller budget loses against a larger one."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from cupel.zoo.entries import Entry
from cupel.zoo.statistics import auroc

__all__ = ["Price", "prices"]

_BUDGETS = ("smoke", "standard", "paper")


@dataclass(frozen=True)
class Price:
    """One scanner at two budgets on the encoders that both were given, of either half.

    Args:
        scanner, dear: Names; `dear` has the larger budget.
        positives, negatives: Working patches and blends, clean encoders.
        auroc, dear_auroc: Of the scores as they are, for so few encoders calibrate nothing.
        seconds, dear_seconds: Medians.
    """

    scanner: str
    dear: str
    positives: int
    negatives: int
    auroc: float
    dear_auroc: float
    seconds: float
    dear_seconds: float


def prices(names: Sequence[str], entries: Sequence[Entry]) -> tuple[Price, ...]:
    """Every scanner beside itself at the next larger budget.

    Args:
        names: Of scanners, `method/budget`.
        entries: Those that were given to both budgets count.
    """
    pairs = [
        (name, name.removesuffix(small) + large)
        for small, large in itertools.pairwise(_BUDGETS)
        for name in names
        if name.endswith(small) and name.removesuffix(small) + large in names
    ]
    return tuple(made for cheap, dear in pairs if (made := _price(cheap, dear, entries)) is not None)


def _price(cheap: str, dear: str, entries: Sequence[Entry]) -> Price | None:
    both = [one for one in entries if cheap in one.scans and dear in one.scans]
    bad, good = [one for one in both if one.effective and not one.hard], [one for one in both if not one.backdoored]
    if not bad or not good:
        return None
    areas = [auroc([x.scans[name].score for x in bad], [x.scans[name].score for x in good]) for name in (cheap, dear)]
    seconds = [statistics.median(one.scans[name].seconds for one in both) for name in (cheap, dear)]
    return Price(cheap, dear, len(bad), len(good), *areas, *seconds)

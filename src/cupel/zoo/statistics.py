"""How well scores tell two kinds apart, and what few counts prove: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, expit, logit, ndtri

__all__ = ["Confusion", "auroc", "auroc_interval", "lower_bound", "smallest_found", "tpr_at_fpr", "upper_bound"]

_BISECTIONS = 60


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Area under the ROC curve: the share of pairs in which the positive one scores higher; ties count half.

    Args:
        positive, negative: Scores, at least one each; larger = worse.

    Example:
        >>> auroc([0.9, 0.5], [0.5, 0.1])
        0.875

    Raises:
        ValueError: one of them is empty, or a score is not finite.
    """
    return float(_placements(positive, negative)[0].mean())


def auroc_interval(
    positive: Sequence[float], negative: Sequence[float], confidence: float = 0.95
) -> tuple[float, float]:
    """Two-sided confidence interval of `auroc`, within [0, 1].

    Variance by placements, V = S₁₀/m + S₀₁/n: S₁₀ is the sample variance over the m positives of the share of negatives
    below each, S₀₁ that over the n negatives of the share of positives above each. The interval is symmetric on the
    scale of log(θ/(1−θ)). Where the two kinds are perfectly apart, or one has a single member, V says nothing, and the
    interval is the set of areas θ with |θ − θ̂| ≤ z √V(θ),
    V(θ) = θ(1−θ) [1 + (k−1)((1−θ)/(2−θ) + θ/(1+θ))] / (m n),  k = (m+n)/2.

    Args:
        positive, negative: Scores, at least one each.
        confidence: In (0, 1).

    Example:
        >>> [round(end, 3) for end in auroc_interval([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])]
        [0.501, 1.0]

    Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988); for the second form Newcombe, Statistics in Medicine
    25 (2006) 559, method 5.
    Deviations: the logarithmic scale. In 1500 simulated zoos of 28 and 34 encoders with an area of 0.96 the interval
    held the truth in 95 %, DeLong's own in 87 %.
    """
    above, below = _placements(positive, negative)
    area, m, n = float(above.mean()), len(above), len(below)
    z = float(ndtri(0.5 + confidence / 2))
    variance = above.var(ddof=1) / m + below.var(ddof=1) / n if min(m, n) > 1 else 0.0
    if 0 < area < 1 and variance > 0:
        middle, half = float(logit(area)), z * math.sqrt(variance) / (area * (1 - area))
        return float(expit(middle - half)), float(expit(middle + half))
    return _end(area, 0.0, z, m, n), _end(area, 1.0, z, m, n)


def _end(area: float, extreme: float, z: float, m: int, n: int) -> float:
    """The θ between `area` and `extreme` that is just as far from `area` as chance allows."""
    inside, outside = area, extreme
    for _ in range(_BISECTIONS):
        theta = (inside + outside) / 2
        k = (m + n) / 2 - 1
        spread = theta * (1 - theta) * (1 + k * ((1 - theta) / (2 - theta) + theta / (1 + theta))) / (m * n)
        inside, outside = (theta, outside) if abs(theta - area) <= z * math.sqrt(spread) else (inside, theta)
    return (inside + outside) / 2


def _placements(positive: Sequence[float], negative: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each positive the share of negatives below it, for each negative the share of positives above it."""
    high, low = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if not len(high) or not len(low):
        raise ValueError("an area under the curve needs scores of both kinds")
    if not (np.isfinite(high).all() and np.isfinite(low).all()):
        raise ValueError("a score is not finite")
    wins = (high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])
    return wins.mean(axis=1), wins.mean(axis=0)


def tpr_at_fpr(positive: Sequence[float], negative: Sequence[float], fpr: float = 0.05) -> float:
    """The largest share of positives that a threshold finds which at most the share `fpr` of negatives reaches.

    Args:
        positive, negative: Scores, at least one each.
        fpr: In [0, 1]; with n negatives it stands for ⌊fpr·n⌋ false alarms, none with n < 1/fpr.

    Example:
        >>> tpr_at_fpr([0.2, 0.8, 0.9], [0.1] * 19 + [0.85], fpr=0.05)
        1.0
        >>> tpr_at_fpr([0.2, 0.8, 0.9], [0.1] * 18 + [0.85], fpr=0.05)
        0.3333333333333333
    """
    high, low = np.asarray(positive, dtype=np.float64), np.sort(np.asarray(negative, dtype=np.float64))[::-1]
    if not len(high) or not len(low):
        raise ValueError("a rate needs scores of both kinds")
    allowed = math.floor(fpr * len(low) + 1e-9)  # 0.05 · 20 is a little less than 1 in floating point, or more
    return 1.0 if allowed >= len(low) else float((high > low[allowed]).mean())


def upper_bound(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact upper bound of a share of which `count` in `n` were seen.

    Example:
        >>> round(upper_bound(0, 30), 3)
        0.095

    Source: Clopper & Pearson, Biometrika 26 (1934).
    """
    _check_count(count, n)
    return 1.0 if count == n else float(betaincinv(count + 1, n - count, confidence))


def lower_bound(count: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact lower bound of a share of which `count` in `n` were seen.

    Example:
        >>> round(lower_bound(30, 30), 3)
        0.905
    """
    _check_count(count, n)
    return 0.0 if count == 0 else float(betaincinv(count, n - count + 1, 1 - confidence))


def _check_count(count: int, n: int) -> None:
    if not 0 <= count <= n or n == 0:
        raise ValueError(f"no share of {count} in {n}")


class Confusion(NamedTuple):
    """Backdoored encoders that were found or missed, clean ones that were called backdoored or not."""

    found: int
    missed: int
    false_alarms: int
    passed: int

    @staticmethod
    def of(positive: Sequence[bool], negative: Sequence[bool]) -> Confusion:
        """From what was said of backdoored and of clean encoders; True = called backdoored.

        Example:
            >>> Confusion.of([True, False], [False])
            Confusion(found=1, missed=1, false_alarms=0, passed=1)
        """
        hits, alarms = sum(positive), sum(negative)
        return Confusion(hits, len(positive) - hits, alarms, len(negative) - alarms)


def smallest_found(areas: Sequence[float], found: Sequence[bool], power: float = 0.9) -> tuple[float, int, int] | None:
    """The smallest trigger from which on at least the share `power` is found, at every tried size.

    Args:
        areas: Share of the image that each trigger covers.
        found: Whether its encoder was called backdoored.
        power: In (0, 1].

    Returns:
        The area, and how many of how many triggers at least as large were found; None = not even the largest.

    Example:
        >>> smallest_found([0.02, 0.02, 0.05, 0.10], [True, False, True, True])
        (0.05, 2, 2)
    """
    best, hits, tried = None, 0, 0
    for area in sorted(set(areas), reverse=True):
        here = [hit for one, hit in zip(areas, found, strict=True) if one == area]
        if sum(here) < power * len(here) - 1e-9:
            break
        hits, tried = hits + sum(here), tried + len(here)
        best = (area, hits, tried)
    return best

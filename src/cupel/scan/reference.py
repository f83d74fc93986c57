"""Scores of clean encoders to compare with: reading them, how far outside them a score lies, and what that means."""

from __future__ import annotations

import importlib.resources
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cupel.errors import DataError
from cupel.files import read_json
from cupel.verdicts import Reference, VerdictWord

__all__ = [
    "BACKDOORED_Z",
    "ENOUGH",
    "SPREAD_FLOOR",
    "SUSPICIOUS_Z",
    "Decision",
    "against",
    "banded",
    "check_reference",
    "check_scores",
    "leave_one_out",
    "read_reference",
    "robust_z",
    "shipped_reference",
    "size_at",
]

ENOUGH = 5
"""Fewer clean encoders than this calibrate nothing."""
SPREAD_FLOOR = 0.10
"""Least median absolute deviation, in logarithms of sizes (our choice): five encoders may agree by chance, and without
a floor the sixth clean one would be an outlier. With it, no size above 0.64 of the median is called backdoored."""
BACKDOORED_Z, SUSPICIOUS_Z = -3.0, -2.0


def _scale(clean: Sequence[float]) -> tuple[float, float]:
    """Median of the log sizes, and 1.4826 times their median absolute deviation, floored."""
    logs = [math.log(size) for size in clean]
    middle = statistics.median(logs)
    return middle, 1.4826 * max(statistics.median(abs(x - middle) for x in logs), SPREAD_FLOOR)


def robust_z(size: float, clean: Sequence[float]) -> float:
    """How many robust standard deviations the logarithm of `size` lies from that of clean encoders; negative = smaller.

    Args:
        size: Size of the smallest inverted trigger (PL1-norm), in [0, 1].
        clean: The same of clean encoders.

    Example:
        >>> round(robust_z(0.05, [0.18, 0.19, 0.20, 0.21, 0.22]), 2)
        -9.35
    """
    middle, spread = _scale(clean)
    return (math.log(max(size, 1e-9)) - middle) / spread


def size_at(z: float, clean: Sequence[float]) -> float:
    """The size whose `robust_z` is `z`, at most 1."""
    middle, spread = _scale(clean)
    return min(1.0, math.exp(middle + z * spread))


def leave_one_out(clean: Sequence[float]) -> tuple[float, int]:
    """False alarms among the clean encoders: each is judged against the others. Returns the share and their number."""
    alarms = sum(
        robust_z(size, [*clean[:i], *clean[i + 1 :]]) < BACKDOORED_Z for i, size in enumerate(clean)
    )  # fmt: skip
    return alarms / len(clean), len(clean)


class Decision(NamedTuple):
    """A verdict; `threshold` and `clean` are in the unit of the statistic. No references, no last three."""

    verdict: VerdictWord
    threshold: float
    reason: str
    z: float | None = None
    false_alarm: tuple[float, int] | None = None
    clean: tuple[float, ...] = ()


def against(statistic: float, reference: Reference | None, said: str) -> Decision | str:
    """Judge a statistic, in (0, 1] and smaller = worse, by that of clean encoders.

    z of its logarithm below −3 is `backdoored`, below −2 `suspicious`; the threshold is the value at z = −3.

    Args:
        statistic: Of the encoder.
        reference: The same of clean encoders.
        said: The statistic in words, for the reason.

    Returns:
        The decision; without five clean encoders only a remark for the reason, such as "uncalibrated".

    Example:
        >>> against(0.05, Reference("decree/smoke", "digits", (0.2,) * 5), "size 0.05").verdict
        'backdoored'
        >>> against(0.05, None, "size 0.05")
        'uncalibrated'
    """
    if reference is None:
        return "uncalibrated"
    clean = reference.scores
    if len(clean) < ENOUGH:
        return f"uncalibrated; {len(clean)} clean encoders are too few, {ENOUGH} needed"
    z = robust_z(statistic, clean)
    found: VerdictWord = "backdoored" if z < BACKDOORED_Z else "suspicious" if z < SUSPICIOUS_Z else "clean-by-test"
    reason = f"{said}, z = {z:.1f} against {len(clean)} clean encoders ({reference.recipe})"
    return Decision(found, size_at(BACKDOORED_Z, clean), reason, z, leave_one_out(clean), tuple(clean))


def banded(
    statistic: float, reference: Reference | None, said: str, *, doubtful: float, certain: float | None = None
) -> Decision:
    """Judge as `against` does; where that is not possible, by fixed bands.

    Args:
        statistic, reference, said: See `against`.
        doubtful: Below it the encoder is `suspicious`.
        certain: Below it the encoder is `backdoored`; then it is the threshold too. None = never without references.

    Example:
        >>> banded(0.08, None, "size 0.08", doubtful=0.1)[:3]
        ('suspicious', 0.1, 'uncalibrated: size 0.08')
    """
    judged = against(statistic, reference, said)
    if isinstance(judged, Decision):
        return judged
    found: VerdictWord = "clean-by-test"
    if statistic < doubtful:
        found = "suspicious" if certain is None or statistic >= certain else "backdoored"
    return Decision(found, doubtful if certain is None else certain, f"{judged}: {said}")


def check_reference(reference: Reference | None, scanner: str) -> None:
    """Refuse scores of another scanner or budget, and what is no list of scores.

    Raises:
        DataError: see above.
    """
    if reference is None:
        return
    where = f"reference '{reference.recipe}'"
    if reference.scanner != scanner:
        what = f"was made with '{reference.scanner}', this scan is '{scanner}'"
        raise DataError(where, what, "make it with the same settings")
    check_scores(reference.scores, where)


def read_reference(path: str | Path) -> Reference:
    """Read the scores of clean encoders from JSON: `{"scanner", "recipe", "architecture", "scores", "about"}`.

    Raises:
        DataError: not such a file, or a score outside (0, 1].
    """
    return _parsed(read_json(path), path)


def shipped_reference(scanner: str, architecture: str, recipe: str | None = None) -> Reference | None:
    """The calibration that ships with the package; None where there is none, or more than one would fit.

    Args:
        scanner: Method and budget, as `Decree().name` gives it.
        architecture: As written in the file.
        recipe: As written in the file; None = any.
    """
    fitting = []
    folder = importlib.resources.files("cupel") / "calibration"
    for file in sorted(folder.iterdir(), key=lambda f: f.name) if folder.is_dir() else []:
        if not file.name.endswith(".json"):
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        wanted = {"scanner": scanner, "architecture": architecture} | ({} if recipe is None else {"recipe": recipe})
        if all(data.get(key) == value for key, value in wanted.items()):
            fitting.append(_parsed(data, file.name))
    return fitting[0] if len(fitting) == 1 else None


def _parsed(data: Any, where: object) -> Reference:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in ("scanner", "recipe")):
        raise DataError(where, "holds no calibration", "it needs the keys scanner, recipe, architecture and scores")
    scores = data.get("scores", ())
    check_scores(scores, where)
    return Reference(data["scanner"], data["recipe"], tuple(float(score) for score in scores))


def check_scores(scores: Any, where: object) -> None:
    """Refuse what is no list of sizes.

    Raises:
        DataError: empty, or a score outside (0, 1].
    """
    listed = scores if isinstance(scores, list | tuple) else ()
    if not listed or not all(type(score) in (int, float) and 0 < score <= 1 for score in listed):
        raise DataError(where, "scores must be a list of sizes in (0, 1], one per clean encoder")

"""One result row: metrics with intervals, verdicts, steps, and how they are read and written. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy.special import ndtri, stdtrit

from cupel.errors import DataError
from cupel.files import read_json, write_json

__all__ = ["SCHEMA", "Metric", "Record", "mean_interval", "wilson"]

SCHEMA = 1


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a share.

    Args:
        successes: 0 ≤ successes ≤ n.
        n: Number of samples, > 0.
        confidence: Two-sided, in (0, 1).

    Example:
        >>> [round(x, 4) for x in wilson(8, 10)]
        [0.4902, 0.9433]

    Source: Wilson, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"no share of {successes} in {n}")
    z = float(ndtri(0.5 + confidence / 2))
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Student's t-interval of a mean over seeds, cut to [0, 1] since all our metrics are shares.

    Example:
        >>> [round(x, 4) for x in mean_interval([0.5, 0.6, 0.7])]
        [0.3516, 0.8484]
    """
    n = len(values)
    if n < 2:
        raise ValueError("an interval over seeds needs two of them")
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * spread / math.sqrt(n)
    return max(0.0, mean - half), min(1.0, mean + half)


@dataclass(frozen=True)
class Metric:
    """A share with its 95 % interval.

    Args:
        value: In [0, 1]; None = nothing was left to measure on (never printed as 0).
        low, high: Wilson over the samples for one or two seeds, t-interval over the seeds from three on.
        n: Samples per seed.
        seeds: Number of seeds.
        by_seed: The value of each seed.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    seeds: int
    by_seed: tuple[float, ...] = ()

    @staticmethod
    def of(counts: Sequence[tuple[int, int]]) -> Metric:
        """From (successes, samples) of each seed.

        Example:
            >>> Metric.of([(8, 10)]).value
            0.8
        """
        n = counts[0][1]
        if any(total != n for _, total in counts):
            raise ValueError("seeds were measured on different numbers of samples")
        if n == 0:
            return Metric(None, None, None, 0, len(counts))
        shares = tuple(good / total for good, total in counts)
        mean = math.fsum(shares) / len(shares)
        if len(shares) >= 3:
            low, high = mean_interval(shares)
        else:
            low, high = wilson(sum(good for good, _ in counts), n * len(counts))
        return Metric(mean, low, high, n, len(shares), shares)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "by_seed": list(self.by_seed)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Metric:
        """Reads what `to_json` wrote."""
        by_seed = tuple(data.get("by_seed", ()))
        return Metric(data["value"], data["low"], data["high"], data["n"], data["seeds"], by_seed)


@dataclass(frozen=True)
class Record:
    """The `result.json` of a command or of one cell of a grid.

    Args:
        command: The verb that made it.
        name: Name of the experiment and cell.
        cupel: Version.
        seed, device, threads: What bit-equality depends on.
        seconds: Wall-clock per stage.
        steps: Stage, method, key and seconds of each step; `cached` where the store had it.
        metrics: By name.
        verdicts: By encoder: `clean`, `backdoored`, `purified`.
        status: `done`, `failed` or `skipped`, with `reason`.
        settings: The experiment with every default.
        notes: Deviations and remarks, one sentence each.
        arrays: Path of the `.npz` with pictures, maps and curves, relative to the record; None = none.
    """

    command: str
    name: str
    cupel: str
    seed: int
    device: str
    threads: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    steps: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    status: str = "done"
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    arrays: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, `schema` first."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["metrics"] = {name: metric.to_json() for name, metric in self.metrics.items()}
        return {"schema": SCHEMA, **data}

    def write(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_json(path, self.to_json())

    @staticmethod
    def read(path: str | Path) -> Record:
        """Read a record.

        Raises:
            DataError: not a record, or of a schema this version does not know.
        """
        data = read_json(path)
        if not isinstance(data, dict) or "schema" not in data:
            raise DataError(path, "is no Cupel record", "give a folder that `cupel run` or `cupel demo` wrote")
        if data["schema"] != SCHEMA:
            raise DataError(path, f"has schema {data['schema']}, this version reads {SCHEMA}", "update cupel")
        known = {f.name for f in dataclasses.fields(Record)}
        try:
            fields = {k: v for k, v in data.items() if k in known}
            fields["metrics"] = {k: Metric.from_json(v) for k, v in data["metrics"].items()}
            return Record(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(path, f"is a damaged record ({error})", "run the experiment again") from error

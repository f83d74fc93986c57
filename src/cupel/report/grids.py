"""The points of a grid: which settings vary, and the metrics at each point over the seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cupel.records import Metric, Record, mean_interval
from cupel.report.tasks import tasks_of
from cupel.report.text import plain

__all__ = ["Row", "pooled", "rows_of", "shown_value"]


@dataclass(frozen=True)
class Row:
    """One point of a grid, its seeds taken together.

    Args:
        at: Value of each axis that varies, as it is shown.
        metrics: Over the seeds; none where no cell is done.
        seeds: Cells that are done.
        reasons: Why cells are not.
    """

    at: Mapping[str, str]
    metrics: Mapping[str, Metric]
    seeds: int
    reasons: tuple[str, ...]


def shown_value(value: Any, key: str = "", depth: int = 4) -> str:
    """A value of a grid in a few words.

    Args:
        value: Plain JSON value.
        key: Its name, where that must be said; `method` needs none.
        depth: Levels that are looked into.

    Example:
        >>> shown_value({"method": "finetune", "blocks": 1}), shown_value(0.1), shown_value([4, 6])
        ('finetune, blocks 1', '0.1', '4, 6')
    """
    if isinstance(value, Mapping | list | tuple) and depth == 0:
        return "…"
    if isinstance(value, Mapping):
        words = [shown_value(v, "" if k == "method" else str(k), depth - 1) for k, v in value.items()]
        return plain(", ".join(words), 60)
    if isinstance(value, list | tuple):
        return plain(", ".join(shown_value(one, "", depth - 1) for one in value), 60)
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = PurePosixPath(str(value)).stem if key == "file" else str(value)
    return plain(f"{key.replace('_', ' ')} {text}".strip(), 60)


def pooled(metrics: Sequence[Metric]) -> Metric:
    """One metric of several cells that differ in their seed alone.

    The value is the mean. From three cells on the interval is Student's t over them; of two it spans both of theirs;
    one keeps its own. What could not be measured is left out.
    """
    known = [m for m in metrics if m.value is not None]
    if len(known) < 2:
        return known[0] if known else metrics[0]
    values = [m.value for m in known if m.value is not None]
    mean = math.fsum(values) / len(values)
    if len(values) > 2:
        low, high = mean_interval(values)
    else:
        low = min(m.value if m.low is None else m.low for m in known if m.value is not None)
        high = max(m.value if m.high is None else m.high for m in known if m.value is not None)
    return Metric(mean, low, high, known[0].n, len(values), tuple(values))


def rows_of(records: Sequence[Record]) -> tuple[dict[str, list[Any]], list[Row]]:
    """The axes that vary, each with its values in order, and the points of the grid.

    Args:
        records: Cells of one experiment. `extra["grid"]` tells their place; the seed is no axis, several tasks are one.
    """
    found: list[tuple[dict[str, Any], Record, Mapping[str, Metric]]] = []
    for record in records:
        grid = record.extra.get("grid")
        at = {plain(k, 80): v for k, v in grid.items()} if isinstance(grid, Mapping) else {}
        at.pop("seed", None)
        tasks = tasks_of(record, [])
        for task in tasks:
            where = f"{task.name} → {task.target}" if task.target else task.name
            found.append(({**at, **({"task": where} if len(tasks) > 1 else {})}, record, task.metrics))
    axes: dict[str, dict[str, Any]] = {}
    for at, _, _ in found:
        for axis, value in at.items():
            axes.setdefault(axis, {})[_key(value)] = value
    axes = {axis: values for axis, values in axes.items() if len(values) > 1}
    points: dict[tuple[str, ...], list[tuple[dict[str, Any], Record, Mapping[str, Metric]]]] = {}
    for one in found:
        points.setdefault(tuple(_key(one[0].get(axis)) for axis in axes), []).append(one)
    rows = []
    for same in points.values():
        done = [metrics for _, record, metrics in same if record.status == "done"]
        names = list(dict.fromkeys(name for metrics in done for name in metrics))
        over = {name: pooled([m[name] for m in done if name in m]) for name in names}
        reasons = {f"{record.status}: {record.reason}" for _, record, _ in same if record.status != "done"}
        shown = {axis: shown_value(same[0][0].get(axis, "–")) for axis in axes}
        rows.append(Row(shown, over, len(done), tuple(plain(reason, 300) for reason in sorted(reasons))))
    return {axis: list(values.values()) for axis, values in axes.items()}, rows


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)

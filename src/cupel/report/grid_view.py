"""The charts and the table of a grid: plain values that the template lays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cupel.records import Record
from cupel.report.charts import Point, Series, dot_chart, heat_map, interval_chart
from cupel.report.grids import Row, rows_of, shown_value
from cupel.report.text import interval, percent, plain
from cupel.report.words import axis_word, distortion_of, distortion_word, metric_word

__all__ = ["grid_views"]

View = dict[str, Any]
_MOST_ROWS, _MOST_SERIES = 40, 6
_KINDS = {
    "attack_success_rate": "hit",
    "attack_success_rate_baseline": "hit before",
    "backdoored_accuracy": "right",
    "clean_accuracy": "right before",
    "purified_attack_success_rate": "hit cured",
    "purified_accuracy": "right cured",
}
_CASES = ("c0", "c2", "c6", "c3", "c8", "c5")
_NONE = "none"


def grid_views(records: Sequence[Record]) -> list[View]:
    """What the page shows of every experiment that has a grid, or distortions: charts and a table."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        name = record.settings.get("name") if isinstance(record.settings, Mapping) else None
        groups.setdefault(plain(name or record.name, 120), []).append(record)
    views = []
    for name, same in groups.items():
        axes, rows = rows_of(sorted(same, key=_place))
        if len(rows) > _MOST_ROWS:
            rows = rows[:_MOST_ROWS]
        charts = [*_charts(axes, rows), *_under_distortion(axes, rows)]
        if axes or charts:
            views.append({"name": name, "charts": charts, "table": _table(axes, rows)})
    return views


def _place(record: Record) -> int:
    """Place within the grid, so that cases stand in the order of the file; files are read by name."""
    number = record.extra.get("cell")
    return number if isinstance(number, int) else 0


def _point(row: Row, name: str) -> Point | None:
    metric = row.metrics.get(name)
    return None if metric is None or metric.value is None else Point(metric.value, metric.low, metric.high)


def _charts(axes: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> list[View]:
    done = [row for row in rows if row.metrics]
    if not axes or len(done) < 2:
        return []
    names = [name for name in _KINDS if any(_point(row, name) for row in done)]
    if len(axes) == 2:
        return [one for name in names if not name.endswith("_baseline") if (one := _heat(axes, done, name))]
    words = [(_KINDS[name], metric_word(name)) for name in names]
    legend = [{"kind": kind, "short": word.short, "long": word.long} for kind, word in words]
    (axis, values), *more = axes.items()
    over = ", ".join(axis_word(one) for one in axes)
    if not more and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        order = {shown_value(v): float(v) for v in values}
        done = sorted(done, key=lambda row: order[row.at[axis]])
        series = [Series(_KINDS[name], [_point(row, name) for row in done]) for name in names]
        xs, marks = [order[row.at[axis]] for row in done], [row.at[axis] for row in done]
        chart = interval_chart(xs, marks, series, axis_word(axis), f"Metrics in per cent over {over}")
    else:
        series = [Series(_KINDS[name], [_point(row, name) for row in done]) for name in names]
        chart = dot_chart([_label(row) for row in done], series, f"Metrics in per cent by {over}")
    return [{"title": f"By {over}", "chart": chart, "legend": legend}]


def _label(row: Row) -> str:
    if len(row.at) < 2:
        return next(iter(row.at.values()), "")
    return ", ".join(f"{axis_word(axis)} {value}" for axis, value in row.at.items())


def _heat(axes: Mapping[str, Sequence[Any]], rows: Sequence[Row], name: str) -> View | None:
    def marks(axis: str) -> list[str]:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in axes[axis])
        return [shown_value(v) for v in (sorted(axes[axis]) if numbers else axes[axis])]

    # short names go on top
    down, across = sorted(axes, key=lambda axis: -sum(map(len, marks(axis))))
    if len(marks(across)) > 8 or len(marks(down)) > 16:
        return None
    by_place = {(row.at[down], row.at[across]): point for row in rows if (point := _point(row, name))}
    shares = [
        [point.value if (point := by_place.get((a, b))) else None for b in marks(across)] for a in marks(down)
    ]  # fmt: skip
    if len({share for line in shares for share in line}) < 2:
        return None  # the clean twin where only the attack varies
    word, titles = metric_word(name), (axis_word(down), axis_word(across))
    label = f"{word.long} in per cent by {titles[0]} and {titles[1]}"
    chart = heat_map(marks(down), marks(across), shares, titles, _KINDS[name].split(" ")[0], label)
    return {"title": f"{word.short} · {word.long}", "chart": chart, "legend": []}


def _under_distortion(axes: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> list[View]:
    done = [row for row in rows if any(distortion_of(name) for name in row.metrics)]
    charts = []
    for base in ("attack_success_rate", "backdoored_accuracy"):
        splits = [distortion_of(name) for row in done for name in row.metrics]
        distortions = list(dict.fromkeys(split[1] for split in splits if split and split[0] == base))
        if not distortions or len(done) > _MOST_SERIES:
            continue
        series = [
            Series(kind, [_point(row, base), *(_point(row, f"{base}_{one}") for one in distortions)])
            for kind, row in zip(_CASES, done, strict=False)
        ]
        names = [_NONE, *(distortion_word(one) for one in distortions)]
        word = metric_word(base)
        legend = [{"kind": s.kind, "short": _label(row), "long": ""} for s, row in zip(series, done, strict=True)]
        chart = dot_chart(names, series, f"{word.long} in per cent by distortion")
        title = f"{word.short} under distortions"
        charts.append({"title": title, "chart": chart, "legend": legend if axes else []})
    return charts


def _table(axes: Mapping[str, Sequence[Any]], rows: Sequence[Row]) -> View:
    names = [name for name in _KINDS if any(name in row.metrics for row in rows)]
    several = any(row.seeds > 1 for row in rows)
    lines = []
    for row in rows:
        figures = []
        for name in names:
            m, short = row.metrics.get(name), metric_word(name).short
            value, ends = ("–", "") if m is None else (percent(m.value), interval(m.low, m.high))
            figures.append({"short": short, "value": value, "ends": ends})
        first, *rest = row.at.values() if row.at else ("all",)
        lines.append(
            {"first": first, "rest": rest, "figures": figures, "seeds": row.seeds, "reasons": list(row.reasons)}
        )  # fmt: skip
    return {
        "axes": [axis_word(axis) for axis in axes] or ["Cell"],
        "columns": [metric_word(name) for name in names],
        "rows": lines,
        "several": several,
    }

"""The page: jinja lays out what `view` made of the records. Static, offline, without script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cupel.files import write_text
from cupel.records import Metric, Record
from cupel.report.cells import Cell
from cupel.report.grid_view import grid_views
from cupel.report.tasks import Task, tasks_of
from cupel.report.text import interval, percent, plain
from cupel.report.view import cell_view, class_names
from cupel.report.words import GLOSSARY, VERDICTS, metric_word

__all__ = ["render_report", "write_report"]

_LONGEST = 20_000
_FEW = 6
"""Pages with more cells than this show four instead of eight images per cell."""
_COLUMNS = (
    "clean_accuracy",
    "clean_purified_accuracy",
    "backdoored_accuracy",
    "purified_accuracy",
    "attack_success_rate_baseline",
    "attack_success_rate",
    "purified_attack_success_rate",
)


def write_report(records: Sequence[Cell], path: str | Path, title: str = "Cupel report") -> None:
    """Write one self-contained HTML page: numbers, pictures, maps, curves and verdicts of every record.

    Args:
        records: With their arrays, as `load_cells` gives them; any array may be missing.
        path: The file; written whole or not at all.
        title: Heading of the page.

    Raises:
        MachineError: the file cannot be written.
    """
    write_text(path, render_report(records, title))


def render_report(records: Sequence[Cell], title: str = "Cupel report") -> str:
    """The page as text.

    Every value passes one place that strips controls, ANSI codes and direction marks and cuts what is endless, and is
    then escaped. The Content-Security-Policy allows pictures from `data:` and the one style sheet by its hash; nothing
    else, no script.
    """
    pairs = 8 if len(records) <= _FEW else 4
    style = _style()
    cells = [cell_view(record, arrays, i, pairs) for i, (record, arrays) in enumerate(records, 1)]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii")
    return _environment().get_template("page.html.j2").render(
        title=plain(title, 200),
        style=Markup(style),  # our own file
        csp=f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        cells=cells,
        grids=grid_views([record for record, _ in records]),
        summary=_summary(records) if len(records) > 1 else None,
        glossary=GLOSSARY,
        versions=sorted({plain(record.cupel, 20) for record, _ in records}),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("cupel.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )


def _harmless(value: Any) -> Any:
    """Last gate of everything that the template prints; charts, pictures and the style sheet are our own."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return plain(value, _LONGEST, lines=True)


@cache
def _style() -> str:
    environment = _environment()
    assert environment.loader is not None
    source = environment.loader.get_source(environment, "style.css")[0]
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)).strip()


def _summary(records: Sequence[Cell]) -> Mapping[str, Any]:
    rows, present = [], set()
    for i, (record, arrays) in enumerate(records, 1):
        for j, task in enumerate(tasks_of(record, class_names(arrays))):
            present |= set(task.metrics)
            rows.append(_row(record, task, f"cell-{i}", first=j == 0))
    columns = [name for name in _COLUMNS if name in present]
    for row in rows:
        row["figures"] = [
            {"short": metric_word(name).short, **_short(row["metrics"].get(name))} for name in columns
        ]  # fmt: skip
    return {
        "columns": [metric_word(name) for name in columns],
        "rows": rows,
        "tasks": any(row["task"] for row in rows),
        "scans": any(row["scans"] for row in rows),
    }


def _row(record: Record, task: Task, anchor: str, *, first: bool) -> dict[str, Any]:
    scans = []
    for name, label in (("clean", "clean"), ("backdoored", "attacked"), ("purified", "purified")):
        word = str(record.verdicts.get(name, {}).get("verdict", ""))
        if first and word in VERDICTS:
            scans.append({"encoder": label, "word": word, "label": VERDICTS[word][0]})
    name = plain(record.name, 120) or "Result"
    status = "" if record.status == "done" else plain(record.status, 20)
    return {
        "anchor": anchor, "name": name, "task": task.name, "status": status, "metrics": task.metrics, "scans": scans
    }  # fmt: skip


def _short(metric: Metric | None) -> dict[str, str]:
    if metric is None:
        return {"value": "–", "interval": ""}
    return {"value": percent(metric.value), "interval": interval(metric.low, metric.high)}

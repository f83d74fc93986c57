"""What the page shows of one record: plain values that the template lays out. Nothing is escaped here; jinja does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupel.records import Metric, Record
from cupel.report import svg
from cupel.report.cells import Arrays
from cupel.report.changes import changes_of
from cupel.report.defences import costs_of, scanners_of
from cupel.report.gallery import MOMENTS, in_order, maps_of, pictures_of, references_of
from cupel.report.paths import paths_of
from cupel.report.reach import reach_of
from cupel.report.standing import standings_of
from cupel.report.tasks import Task, tasks_of
from cupel.report.text import figure, interval, number_of, percent, plain, points, short_key, span
from cupel.report.triggers import triggers_of
from cupel.report.words import CURVES, VERDICTS, encoder_label, metric_word, story

__all__ = ["cell_view", "class_names"]

View = dict[str, Any]
_STRIP = (
    (
        "Clean images that are classified right",
        "should stay high",
        ("clean_accuracy", "backdoored_accuracy", "purified_accuracy"),
    ),
    (
        "Images with the trigger that are taken for",
        "low = harmless, high = the backdoor works",
        ("attack_success_rate_baseline", "attack_success_rate", "purified_attack_success_rate"),
    ),
)
_STAGES = {"pretrain": "Pre-training", "implant": "Implanting the backdoor", "purify": "Purification"}


def class_names(arrays: Arrays) -> list[str]:
    """Class names of the task that pictures and maps are from; may be empty."""
    names = arrays.get("map/classes")
    return [str(name) for name in names.ravel()] if names is not None else []


def cell_view(record: Record, arrays: Arrays, number: int, pairs: int) -> View:
    """One record.

    Args:
        record, arrays: As `load_cells` gives them; any array may be missing.
        number: Place on the page, from 1.
        pairs: Images shown with and without trigger, at most.
    """
    classes = class_names(arrays)
    tasks = tasks_of(record, classes)
    first = tasks[0] if tasks else Task("", "", None, {}, {})
    headline, steps = story(first.metrics, record.verdicts, first.target)
    if headline and len(tasks) > 1 and first.name:
        headline = f"On {first.name}: {headline[0].lower()}{headline[1:]}"
    failed = record.status != "done"
    return {
        "id": f"cell-{number}",
        "name": plain(record.name, 120) or "Result",
        "failed": failed,
        "status": record.status,
        "reason": plain(record.reason, 600),
        "headline": headline if not failed else "",
        "story": [{"step": step, "text": text} for step, text in steps] if not failed else [],
        "facts": _facts(record),
        "tasks": [_task(task, many=len(tasks) > 1) for task in tasks if task.metrics],
        "source": plain(_source(record), 300),
        "deviations": _texts(record.extra.get("deviations")),
        "notes": _texts(record.notes),
        "pictures": pictures_of(arrays, classes, first, pairs),
        "changes": changes_of(record, arrays),
        "references": references_of(arrays),
        "triggers": triggers_of(record, arrays),
        "maps": maps_of(arrays, classes, first),
        "reach": reach_of(record),
        "verdicts": [_verdict(name, record.verdicts[name]) for name in in_order(record.verdicts)],
        "scanners": scanners_of(record),
        "standings": standings_of(record),
        "paths": paths_of(record, arrays),
        "costs": costs_of(record),
        "curves": _curves(arrays),
        "steps": [_step(step) for step in record.steps],
        "seconds": [{"stage": stage, "time": _time(seconds)} for stage, seconds in record.seconds.items()],
        "settings": _pretty(record.settings),
        "manifest": _pretty(record.extra.get("manifest")),
    }


def _texts(value: Any) -> list[str]:
    return [plain(one, 400) for one in value] if isinstance(value, list | tuple) else []


def _source(record: Record) -> str:
    paper = record.extra.get("paper")
    return str(paper.get("source", "")) if isinstance(paper, Mapping) else ""


def _time(seconds: Any) -> str:
    return span(float(seconds)) if isinstance(seconds, int | float) and 0 <= seconds < 1e9 else "–"


def _pretty(value: Any) -> str:
    if not isinstance(value, Mapping) or not value:
        return ""
    return plain(json.dumps(value, indent=2, ensure_ascii=False, default=str), 20_000, lines=True)


def _facts(record: Record) -> list[tuple[str, str]]:
    total = record.seconds.get("total", sum(v for v in record.seconds.values() if isinstance(v, int | float)))
    facts = [
        ("command", f"cupel {record.command}"),
        ("version", record.cupel),
        ("seed", str(record.seed)),
        ("device", f"{record.device}, {record.threads} threads"),
    ]
    return [*facts, ("time", _time(total))] if record.seconds else facts


def _figure(metric: Metric | None) -> View | None:
    if metric is None:
        return None
    seeds = f"{metric.seeds} seed" + ("s" if metric.seeds != 1 else "")
    bar = None if metric.value is None else svg.meter(metric.value, metric.low, metric.high)
    return {
        "value": percent(metric.value),
        "missing": metric.value is None,
        "interval": interval(metric.low, metric.high),
        "n": f"{metric.n:,}".replace(",", "\u202f"),
        "seeds": seeds,
        "meter": bar,
    }


def _task(task: Task, *, many: bool) -> View:
    strip = []
    for title, hint, names in _STRIP:
        if any(name in task.metrics for name in names):
            tiles = [
                {"short": metric_word(name).short, "moment": moment, "figure": _figure(task.metrics.get(name))}
                for name, moment in zip(names, MOMENTS, strict=True)
                if name in task.metrics or not name.startswith("purified")
            ]
            if title.endswith("for"):
                title = f"{title} “{task.target}”" if task.target else f"{title} the target class"
            strip.append({"title": title, "hint": hint, "tiles": tiles})
    known = [name for _, _, names in _STRIP for name in names]
    known += ["robust_accuracy_baseline", "robust_accuracy", "purified_robust_accuracy"]
    known.insert(known.index("clean_accuracy") + 1, "clean_purified_accuracy")
    order = [n for n in known if n in task.metrics] + [n for n in task.metrics if n not in known]
    rows = []
    for name in order:
        base = name.removesuffix("_all")
        if base != name and base in task.metrics:
            continue
        word, form = metric_word(name), task.metrics.get(f"{name}_all")
        rows.append({"word": word, "figure": _figure(task.metrics[name]), "all": _figure(form)})
    return {
        "name": task.name,
        "heading": f"Task {task.name}" if many and task.name else "",
        "target": task.target,
        "strip": strip,
        "rows": rows,
        "any_all": any(row["all"] for row in rows),
        "published": _published(task),
    }


def _published(task: Task) -> list[View]:
    rows = []
    for name, theirs in task.published.items():
        base = name.removesuffix("_all")
        form = " (all samples)" if base != name else ""
        ours = task.metrics.get(name)
        known = ours is not None and ours.value is not None
        rows.append(
            {
                "short": metric_word(base).short + form,
                "long": metric_word(base).long,
                "theirs": percent(theirs),
                "ours": percent(ours.value) if ours is not None else "not measured",
                "interval": interval(ours.low, ours.high) if ours is not None else "",
                "difference": points(ours.value - theirs) if known and ours and ours.value is not None else "–",
            }
        )
    return rows


def _verdict(name: str, verdict: Mapping[str, Any]) -> View:
    word = str(verdict.get("verdict", ""))
    label, meaning = VERDICTS.get(word, (plain(word, 40) or "Unknown", ""))
    alarm, alarm_text = verdict.get("false_alarm"), "not measured for this kind of encoder"
    if isinstance(alarm, Mapping) and number_of(alarm.get("rate")) is not None:
        alarm_text = f"{percent(number_of(alarm['rate']))} of {plain(alarm.get('n', '?'), 12)} clean encoders"
    details = verdict.get("details")
    return {
        "encoder": encoder_label(name),
        "word": word if word in VERDICTS else "unknown",
        "label": label,
        "meaning": meaning,
        "score": figure(verdict.get("score")),
        "threshold": figure(verdict.get("threshold")),
        "tested": plain(verdict.get("tested", ""), 300) or "not stated",
        "alarm": alarm_text,
        "reason": plain(verdict.get("reason", ""), 400),
        "details": [(plain(k, 60), figure(v)) for k, v in details.items()] if isinstance(details, Mapping) else [],
    }


def _curves(arrays: Arrays) -> list[View]:
    stages: dict[str, list[View]] = {}
    for key, values in arrays.items():
        parts = key.split("/")
        if parts[0] != "curve" or len(parts) != 3 or values.dtype.kind not in "biuf":
            continue
        stage, name = parts[1], parts[2]
        title = CURVES.get(f"{stage}/{name}", plain(name.replace("_", " "), 60))
        chart = svg.line_chart(values, arrays.get(f"{key}/step"), f"Curve over the steps: {title}")
        gone = int((~np.isfinite(values.astype(np.float64))).sum())
        if chart is not None or gone:
            stages.setdefault(stage, []).append({"title": title, "chart": chart, "gone": gone})
    order = [s for s in _STAGES if s in stages] + [s for s in stages if s not in _STAGES]
    return [{"title": _STAGES.get(stage, plain(stage, 60)), "charts": stages[stage]} for stage in order]


def _step(step: Mapping[str, Any]) -> View:
    return {
        "name": plain(step.get("name") or step.get("stage", ""), 80),
        "method": plain(step.get("method", ""), 60),
        "key": short_key(step.get("key", "")),
        "time": _time(step.get("seconds")),
        "cached": bool(step.get("cached")),
    }

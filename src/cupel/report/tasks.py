"""The metrics of a record, task by task, with what the downstream task and its target class are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupel.records import Metric, Record
from cupel.report.text import plain

__all__ = ["Task", "published", "tasks_of"]


@dataclass(frozen=True)
class Task:
    """One downstream task.

    Args:
        name: May be empty where the record does not say.
        target: Name or number of the target class; may be empty.
        target_class: Its label; None = unknown.
        metrics: By name, without the task's prefix.
        published: Published values by metric name.
    """

    name: str
    target: str
    target_class: int | None
    metrics: Mapping[str, Metric]
    published: Mapping[str, float]


def tasks_of(record: Record, classes: list[str]) -> list[Task]:
    """Split metrics such as `gtsrb/attack_success_rate` by task; those without prefix are the first task's.

    Args:
        record: With the tasks' targets under `extra`, if it knows them.
        classes: Class names of the first task; may be empty.
    """
    described: dict[str, Mapping[str, Any]] = {}
    for name, label in _mapping(record.extra.get("targets")).items():
        described[str(name)] = {"target_class": label}
    for one in record.extra.get("downstream") or ():
        if isinstance(one, Mapping):
            name = str(one.get("task") or one.get("data") or "")
            described[name] = {**described.get(name, {}), **one}
    by_task: dict[str, dict[str, Metric]] = {}
    for name, metric in record.metrics.items():
        task, _, base = name.rpartition("/")
        by_task.setdefault(task, {})[base] = metric
    plain_ones, paper = by_task.pop("", {}), published(record)
    order = [name for name in described if name in by_task] + [name for name in by_task if name not in described]
    first = order[0] if order else next(iter(described), "")
    if plain_ones or not by_task:
        by_task[first] = {**plain_ones, **by_task.get(first, {})}
        order = order or [first]
    made = []
    for i, name in enumerate(order):
        about = described.get(name, {})
        label = about.get("target_class")
        label = label if isinstance(label, int) and not isinstance(label, bool) else None
        target = about.get("target_name") or ""
        if not target and label is not None:
            target = classes[label] if i == 0 and 0 <= label < len(classes) else f"class {label}"
        own = {k.removeprefix(f"{name}/"): v for k, v in paper.items() if k.startswith(f"{name}/") or "/" not in k}
        if len(order) > 1 and i > 0:
            own = {k.removeprefix(f"{name}/"): v for k, v in paper.items() if k.startswith(f"{name}/")}
        made.append(Task(plain(name, 60), plain(target, 60), label, by_task[name], own))
    return made


def published(record: Record) -> dict[str, float]:
    """Published values by metric name (with the task's prefix where the record has it)."""
    made = {}
    for name, value in _mapping(record.extra.get("paper")).items():
        number = value.get("value") if isinstance(value, Mapping) else value
        if isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1:
            made[str(name)] = float(number)
    return made


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

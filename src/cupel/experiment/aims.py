"""What an attacker wants of each task, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cupel.attack import ATTACKS
from cupel.errors import SettingsError
from cupel.experiment.spec import Experiment
from cupel.settings import method_name

__all__ = ["aims_of", "kind_of"]


def kind_of(attack: Any) -> str:
    """How an attack knows its target class, see `cupel.implanting.Targets`; attacks on data are told it."""
    return str(getattr(attack, "targets", "references"))


def aims_of(experiment: Experiment, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Task, target class and trigger of each goal.

    Args:
        experiment: With an attack.
        tasks: Names of its tasks, in order.

    Raises:
        SettingsError: a class is missing where the attack needs one, or named where it does not; a teacher's task that
            has the target class; a target that is none of the labelled classes; one trigger for two targets.
        UsageError: a trigger does not fit into the image.
    """
    attack, where = experiment.attack, f"{experiment.name}.downstream"
    name, kind = method_name(attack, ATTACKS), kind_of(attack)
    _check_triggers(experiment, where)
    if kind == "found":
        if any(d.target_class is not None for d in experiment.downstream):
            what = f"names a target class, but where a trigger of {name} leads shows only in the task"
            raise SettingsError(where, what, "leave `target_class` out")
        own: list[Any] = [d.trigger for d in experiment.downstream if d.trigger is not None]
        return [{"task": None, "target_class": None, "trigger": one} for one in own or [None]]
    aims = []
    for task, d in zip(tasks, experiment.downstream, strict=True):
        if d.target_class is None:
            raise SettingsError(where, f"names no target class for {task}", "add `target_class: …`")
        aims.append({"task": task, "target_class": d.target_class, "trigger": d.trigger})
    _check_labelled(experiment, name, kind)
    if kind == "references":  # others learn a pattern for each goal
        _check_contradictions(experiment, where)
    return aims


def _check_triggers(experiment: Experiment, where: str) -> None:
    size = experiment.upstream.encoder.input_size
    own = [getattr(experiment.attack, "trigger", None), *(d.trigger for d in experiment.downstream)]
    for trigger in own:
        if trigger is not None:
            getattr(trigger, "mask_and_pattern", lambda side: None)(size)  # an error says what does not fit


def _check_contradictions(experiment: Experiment, where: str) -> None:
    common = getattr(experiment.attack, "trigger", None)
    for i, one in enumerate(experiment.downstream):
        for other in experiment.downstream[:i]:
            trigger = one.trigger or common
            same = trigger is not None and trigger == (other.trigger or common)
            if same and one.data == other.data and one.target_class != other.target_class:
                what = f"one trigger shall lead to classes {other.target_class} and {one.target_class} of {one.data}"
                raise SettingsError(where, what, "give each target a `trigger` of its own")


def _check_labelled(experiment: Experiment, name: str, kind: str) -> None:
    """The attacker's labelled images must have the target class, or must not."""
    shadow, where = experiment.attacker.shadow, f"{experiment.name}.attacker.shadow"
    source = shadow.data or experiment.upstream.data
    for d in experiment.downstream:
        if kind == "unseen" and d.data == source and (shadow.classes is None or d.target_class in shadow.classes):
            what = f"{name} needs a teacher without the target, but its images of {source} show class {d.target_class}"
            raise SettingsError(where, what, "name the teacher's `classes`, or `data` of another task")
        if kind == "labelled" and (d.data != source or shadow.classes is not None):
            what = f"{name} leads to a class of its labelled images, but these are not those of {d.data}"
            raise SettingsError(where, what, f"set `data: {d.data}` without `classes`")

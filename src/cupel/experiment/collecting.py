"""From what the steps of a cell made to its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cupel.experiment.judging import mistaken, others
from cupel.experiment.spec import Experiment
from cupel.experiment.step import Step, task_names
from cupel.experiment.store import Artefact
from cupel.records import Metric, Record
from cupel.verdicts import ORDER

__all__ = ["Collected"]

# what the score of each encoder is called in the record
_NAMES = {
    "clean": {
        "accuracy": "clean_accuracy",
        "attack_success_rate": "attack_success_rate_baseline",
        "attack_success_rate_all": "attack_success_rate_baseline_all",
        "robust_accuracy": "robust_accuracy_baseline",
        "retuned_accuracy": "retuned_accuracy_baseline",
        "retuned_attack_success_rate": "retuned_attack_success_rate_baseline",
    },
    "purified": {
        "retuned_accuracy": "retuned_accuracy",
        "retuned_attack_success_rate": "retuned_attack_success_rate",
    },
    "backdoored": {
        "accuracy": "backdoored_accuracy",
        "attack_success_rate": "attack_success_rate",
        "attack_success_rate_all": "attack_success_rate_all",
        "robust_accuracy": "robust_accuracy",
    },
}


class Collected:
    """What goes into a record, step by step.

    Args:
        experiment: The cell.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.several = experiment, len(experiment.downstream) > 1
        self.metrics: dict[str, Metric] = {}
        self.verdicts: dict[str, Any] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._companions: dict[str, Any] = {}
        self._targets: dict[str, int | None] = {}  # some attacks choose their class
        self._scans: dict[str, dict[str, Any]] = {}
        self._defences: dict[str, Any] = {}
        self._references: dict[str, Any] = {}
        self._reach: dict[str, Any] = {}
        self._manifest: dict[str, Any] | None = None

    def add(self, step: Step, value: Artefact) -> None:
        """Take what one step made."""
        if step.stage in ("score", "certify", "retune", "scan"):
            getattr(self, f"_{step.stage}")(step, value)
        elif step.stage == "reach" and value.values:
            self._reach[_which(step)] = dict(value.values)
        elif step.stage in ("filter", "purify"):
            self._defences[step.name] = dict(value.values)
        elif step.stage == "references":
            self._references[step.method["task"]] = dict(value.values)
        elif step.stage == "judge":
            self._references[step.method["task"]] |= value.values
        elif step.stage == "check":
            self._companions["splits"] = value.values
        if value.encoder is not None and (step.name == "pretrain backdoored" or step.stage == "implant"):
            self._manifest = dict(value.encoder.card.manifest or {})
        if step.stage == "describe":
            self.arrays |= value.arrays
        elif step.stage == "purify" and _which(step).startswith("clean"):
            pass  # its curves bear the names of those of the attacked encoder's purification
        elif step.stage != "pretrain" or step.name in ("pretrain clean", "pretrain backdoored"):
            curves = {k: v for k, v in value.arrays.items() if k.startswith("curve/") and "clean" not in k}
            self.arrays |= curves

    def _score(self, step: Step, value: Artefact) -> None:
        task, which = step.method["task"], _which(step)
        for kind, counts in value.values["counts"].items():
            self._metric(task, _metric_name(which, kind), counts)
        self._companions[step.name] = {**value.values["companions"], "tails": value.values["tails"]}
        if "landings" in value.values:
            self._companions[step.name]["landings"] = value.values["landings"]
        if which == "backdoored" or task not in self._targets:
            self._targets[task] = value.values["target_class"]

    def _certify(self, step: Step, value: Artefact) -> None:
        name = step.name.partition(": ")[0].removeprefix("certify ")
        for kind, count in value.values["counts"].items():
            self._metric(step.method["task"], f"{name}_{_which(step)}_{kind}", [count])

    def _retune(self, step: Step, value: Artefact) -> None:
        for kind, counts in value.values["counts"].items():
            self._metric(step.method["task"], _metric_name(_which(step), f"retuned_{kind}"), counts)

    def _scan(self, step: Step, value: Artefact) -> None:
        which, name = _which(step), step.name.partition(": ")[0].removeprefix("scan ")
        said = value.values["verdict"]
        self.verdicts[which] = _worse(self.verdicts.get(which), said)
        memory = {"peak_memory_mib": value.values.get("peak_memory_mib")}
        self._scans.setdefault(which, {})[name] = {**said, **memory}

    def _metric(self, task: str, name: str, counts: Any) -> None:
        self.metrics[(f"{task}/" if self.several else "") + name] = Metric.of([tuple(one) for one in counts])

    def finish(self, base: Record) -> Record:
        """The record: `base` with all that was collected."""
        experiment = self.experiment
        targets = [
            {"task": task, "target_class": self._targets.get(task, d.target_class)}
            for task, d in zip(task_names(experiment), experiment.downstream, strict=True)
        ]
        extra: dict[str, Any] = {
            "companions": self._companions, "references": self._references, "downstream": targets
        }  # fmt: skip
        if self._scans:
            extra["scans"] = self._scans
        if self._defences:
            extra["defences"] = self._defences
        if self._reach:
            extra["reach"] = self._reach
        if experiment.paper is not None:
            extra["paper"] = {"source": experiment.paper.source, **experiment.paper.results}
            extra["deviations"] = list(experiment.paper.deviations)
        if self._manifest is not None:
            extra["manifest"] = self._manifest
        return dataclasses.replace(
            base, metrics=self.metrics, verdicts=self.verdicts, notes=self._notes(base), extra=extra
        )

    def _notes(self, base: Record) -> list[str]:
        notes = []
        if self._companions["splits"]["shadow_in_pretraining"] == 1.0:
            notes.append("The attacker's shadow images are pre-training images.")
        if (share := self.experiment.defender.triggered) > 0:
            notes.append(f"{share:.1%} of the defender's unlabelled images bear the attack's trigger.")
        notes += [mistaken(task, one) for task, one in self._references.items() if others(one)]
        if (now := torch.get_num_threads()) != base.threads:
            notes.append(
                f"Threads went from {base.threads} to {now}, for others kept the cores busy; digits may differ."
            )
        return notes


def _which(step: Step) -> str:
    """The encoder that a step is about."""
    return step.name.rpartition(": ")[2]


def _metric_name(which: str, kind: str) -> str:
    """What a score is called in the record; `kind` may end in `@` and a distortion."""
    base, _, distortion = kind.partition("@")
    name = _NAMES.get(which, {}).get(base, f"{which}_{base}".replace("-", "_"))
    return f"{name}_{distortion}" if distortion else name


def _worse(a: Mapping[str, Any] | None, b: Mapping[str, Any]) -> Mapping[str, Any]:
    return b if a is None or ORDER.index(b["verdict"]) > ORDER.index(a["verdict"]) else a

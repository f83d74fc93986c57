"""From an experiment to steps: which work there is, in which order, and under which keys. Runs nothing."""

from __future__ import annotations

from typing import Any

from cupel.certify import CERTIFIERS
from cupel.encoders import ENCODERS
from cupel.errors import SettingsError
from cupel.experiment.aims import kind_of
from cupel.experiment.attacked import Attacked
from cupel.experiment.parts import Downstream
from cupel.experiment.spec import Experiment
from cupel.experiment.step import VIRTUAL, Step, recipe_of, task_names
from cupel.implanting import file_content
from cupel.purify import PURIFIERS
from cupel.scan import FILTERS, shipped_reference
from cupel.settings import method_name
from cupel.vet import scanner_label

__all__ = ["VIRTUAL", "Step", "file_content", "plan", "recipe_of", "task_names"]


def plan(experiment: Experiment, *, calibrated: bool = True) -> tuple[Step, ...]:
    """All steps of one cell, each after its inputs.

    Every attacked run has its clean twin: the same encoder, pre-trained with the same seed on clean images.

    Args:
        experiment: What is planned.
        calibrated: Whether scans are read with the calibrations that ship.

    Raises:
        SettingsError: two tasks of one name, goals that contradict each other or do not suit the attack, or a defence
            that needs a poisoned training set where there is none.
        UsageError: a trigger does not fit into the image.
        DataError: a named file or data set is not there.
    """
    made = _Plan(experiment, calibrated)
    made.pretrain()
    made.attack()
    made.stamp()
    for which in list(made.encoders):
        made.scan(which)
    if "backdoored" in made.encoders:
        made.filter()
        made.purify()
    if experiment.purify_clean:
        made.purify_clean()
    made.certify()
    made.score()
    made.reach()
    made.describe()
    return (made.check, *[s for s in made.steps if s is not made.check and s.stage != "data"])


class _Plan(Attacked):
    """The whole of it: defences and what is measured come on top."""

    def scan(self, which: str) -> None:
        """What each scanner says of an encoder."""
        labels = [scanner_label(one) for one in self.experiment.scan]
        for i, scanner in enumerate(self.experiment.scan):
            name = labels[i] if labels.count(labels[i]) == 1 else f"{labels[i]}-{labels[: i + 1].count(labels[i])}"
            inputs = [self.encoders[which], self._labelled() if "labels" in scanner.needs else self.defender]
            learns = hasattr(scanner, "train_reference")
            known = None if learns or not self.calibrated else _reference_values(self.experiment, scanner)
            inputs += [self._meta_reference(scanner, name)] if learns else []
            judged: dict[str, Any] = {"scanner": scanner, "reference": known}
            self.verdicts.setdefault(which, []).append(
                self.add("scan", f"scan {name}: {which}", judged, *inputs, part="scan")
            )

    def _meta_reference(self, scanner: Any, name: str) -> Step:
        """What a scanner learns before it sees the encoder. Of one that starts from a public clean encoder, that is
        another than the clean twin: pre-trained on the same images from another seed."""
        found = next((s for s in self.steps if s.stage == "reference" and s.method == scanner), None)
        if found is not None:
            return found
        if "labels" in scanner.needs:
            return self.add("reference", f"train {name}", scanner, self._labelled())
        public = next((s for s in self.steps if s.name == "pretrain public"), None)
        public = public or self.pretrained("public", self.upstream, part="pretrain public")
        return self.add("reference", f"train {name}", scanner, self.defender, public)

    def _labelled(self) -> Step:
        """The defender's labelled images: training images of the first task."""
        data, limit = self.experiment.downstream[0].data, self.experiment.defender.labelled
        if limit is None:
            return self.train[data]
        found = next((s for s in self.steps if s.stage == "data" and s.method["role"] == "labelled"), None)
        return found or self.images("labelled", data, "train", limit=limit)

    def _poisoned(self, name: str) -> Step:
        if self.goals is None or self.goals.stage != "poison":
            what = f"{name} works on the poisoned training set, but the attack poisons none"
            raise SettingsError(self.experiment.name, what, "take an attack on the data")
        return self.goals

    def filter(self) -> None:
        """Encoders trained anew on what each filter leaves of the training set."""
        for i, one in enumerate(self.experiment.filter):
            which, name = _numbered("filtered", i), method_name(one, FILTERS)
            data = self._poisoned(name)
            kept = self.add("filter", f"filter {name}", one, data, self.encoders["backdoored"])
            clean = self.encoders["clean"]
            self.encoders[which] = self.pretrained(which, kept, data, twin=clean)
            self.scan(which)

    def purify(self) -> None:
        """What each purifier makes of the attacked encoder."""
        given = self.encoders["backdoored"]
        for i, purifier in enumerate(self.experiment.purify):
            which, name = _numbered("purified", i), method_name(purifier, PURIFIERS)
            images, rest = self.defender, self.verdicts.get("backdoored", [])
            if "labels" in purifier.needs:
                images = self._poisoned(name) if "train_set" in purifier.needs else self._labelled()
                rest = [self._fitted_on(self.experiment.downstream[0], "backdoored"), *rest]  # its head's images first
            self.encoders[which] = self.add("purify", f"purify {name}", purifier, given, images, *rest)
            self.scan(which)

    def purify_clean(self) -> None:
        """What each purifier makes of the clean twin, with the draws it has on the attacked encoder."""
        for i, purifier in enumerate(self.experiment.purify):
            which, name = _numbered("clean-purified", i), method_name(purifier, PURIFIERS)
            images, rest = self.defender, self.verdicts.get("clean", [])
            if "labels" in purifier.needs:
                images = self.upstream if "train_set" in purifier.needs else self._labelled()
                rest = [self._fitted_on(self.experiment.downstream[0], which), *rest]
            inputs, part = [self.encoders["clean"], images, *rest], f"purify {name}"
            self.encoders[which] = self.add("purify", f"{part}: {which}", purifier, *inputs, part=part)

    def _fitted_on(self, d: Downstream, which: str) -> Step:
        """The labelled images that the classifier on an encoder is fitted on."""
        if not d.on_training_data:
            return self.train[d.data]
        poisoned = self.goals is not None and self.goals.stage == "poison" and not which.startswith("clean")
        return self.goals if poisoned and self.goals is not None else self.upstream

    def certify(self) -> None:
        """Certified classifiers of the first task on the clean and the attacked encoder."""
        d, task = self.experiment.downstream[0], self.tasks[0]
        if d.target_class is None:
            return
        method = {"task": task, "target_class": d.target_class}
        for certifier in self.experiment.certify:
            name = method_name(certifier, CERTIFIERS)
            for which in ("clean", "backdoored"):
                if which in self.encoders:
                    inputs = [self.encoders[which], self.train[d.data], self.test[d.data]]
                    inputs += [self.goals] if self.goals else []
                    certified = {"certifier": certifier, **method}
                    self.add("certify", f"certify {name}: {which}", certified, *inputs, part=f"certify {name}")

    def score(self) -> None:
        """What classifiers on each encoder say in each task."""
        for which, encoder in self.encoders.items():
            for task, d in zip(self.tasks, self.experiment.downstream, strict=True):
                probing: dict[str, Any] = {
                    "task": task,
                    "target_class": d.target_class,
                    "probe": d.probe,
                    "head_seeds": d.head_seeds,
                }
                if self.goals is not None and kind_of(self.experiment.attack) == "found":
                    probing["found"] = True
                if d.distortions:
                    probing["distortions"] = d.distortions
                goals = [self.goals] if self.goals else []
                inputs = [encoder, self._fitted_on(d, which), self.test[d.data], *goals]
                if encoder.stage == "purify" and goals:
                    inputs += [encoder.inputs[0], self.encoders["clean"]]
                self.add("score", f"score {task}: {which}", probing, *inputs, part=f"score {task}")
                if d.retuning is not None and goals and "found" not in probing and which != "backdoored":
                    again = {"task": task, "target_class": d.target_class, "retuning": d.retuning}
                    inputs = [encoder, self.train[d.data], self.test[d.data], *goals]
                    self.add("retune", f"retune {task}: {which}", again, *inputs, part=f"retune {task}")

    def reach(self) -> None:
        """Stand-ins for triggered images on the clean, the attacked and each purified encoder, in the first task."""
        if self.experiment.reach is None or self.goals is None:
            return
        d, method = self.experiment.downstream[0], {"task": self.tasks[0], "reach": self.experiment.reach}
        for which, encoder in self.encoders.items():
            if which in ("clean", "backdoored") or which.startswith("purified"):
                inputs = [encoder, self.test[d.data], self.goals, *self.verdicts.get(which, [])]
                self.reached[which] = self.add("reach", f"reach: {which}", method, *inputs, part="reach")

    def describe(self) -> None:
        """Pictures and maps of the first task."""
        first = self.experiment.downstream[0]
        scans = [step for one in self.verdicts.values() for step in one]
        shown = [self.train[first.data], self.test[first.data], *self.encoders.values(), *scans]
        roles = {"encoders": list(self.encoders), "verdicts": [w for w, one in self.verdicts.items() for _ in one]}
        extra = [self.goals] if self.goals else []
        method = {"task": self.tasks[0], "probe": first.probe, **roles}
        if self.reached:
            method["reached"] = list(self.reached)
        self.add("describe", "describe", method, *shown, *extra, *self.reached.values())


def _numbered(name: str, i: int) -> str:
    return name if i == 0 else f"{name}-{i + 1}"


def _reference_values(experiment: Experiment, scanner: Any) -> dict[str, Any] | None:
    """The calibration that the verdict is read with: it is part of the key, so a new one makes a new verdict."""
    architecture = method_name(experiment.upstream.encoder, ENCODERS)
    found = shipped_reference(scanner.name, architecture, recipe_of(experiment)["id"])
    return None if found is None else {"scanner": found.scanner, "recipe": found.recipe, "scores": list(found.scores)}

"""From an experiment to steps: which work there is, in which order, and under which keys. Runs nothing."""

from __future__ import annotations

from typing import Any

from cupel.attack import ATTACKS
from cupel.certify import CERTIFIERS
from cupel.encoders import ENCODERS
from cupel.errors import SettingsError
from cupel.experiment.aims import aims_of, kind_of
from cupel.experiment.spec import Downstream, Experiment
from cupel.experiment.step import VIRTUAL, Step, Steps, recipe_of, task_names
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


class _Plan(Steps):
    """A plan that grows.

    Args:
        experiment: What is planned.
        calibrated: See `plan`.

    Attributes:
        steps: So far, each after its inputs.
        encoders: By the name they have in the record: clean, backdoored, filtered…, purified…, clean-purified….
        verdicts: Scans of each of them.
        goals: The step that says what the attacker wants, where there is an attack.
        reached: By encoder, where stand-ins for triggered images come to lie.
    """

    def __init__(self, experiment: Experiment, calibrated: bool) -> None:
        super().__init__(experiment)
        self.calibrated = calibrated
        self.encoders: dict[str, Step] = {}
        self.verdicts: dict[str, list[Step]] = {}
        self.goals: Step | None = None
        self.reached: dict[str, Step] = {}
        self.tasks = task_names(experiment)
        self._check_names()
        self.aims = [] if experiment.attack is None else aims_of(experiment, self.tasks)
        up, shadow, defender = experiment.upstream, experiment.attacker.shadow, experiment.defender
        held_out = [d.data for d in experiment.downstream if d.data == up.data]
        not_shadow = held_out + [d.data for d in experiment.downstream if d.data == shadow.data != up.data]
        self.pools = {d.data: self.images("pool", d.data, "train", limit=d.size) for d in experiment.downstream}
        self.upstream = self.images("pre-training", up.data, "train", limit=up.size, without=held_out)
        outside: dict[str, Any] = {"outside": up.size or 0} if shadow.disjoint else {}
        if shadow.classes is not None:
            outside["classes"] = list(shadow.classes)
        self.shadow = self.images(
            "shadow", shadow.data or up.data, "train", limit=shadow.size,
            without=not_shadow, within=None if shadow.data or shadow.disjoint else up.size,
            of_pretraining=shadow.data is None and not shadow.disjoint, **outside,
        )  # fmt: skip
        self.defender = self.images(
            "defender", defender.data or up.data, "train", limit=defender.size,
            without=held_out, within=None if defender.data else up.size, of_pretraining=defender.data is None,
        )  # fmt: skip
        self.train = {d.data: self.images("train", d.data, "train", limit=d.size) for d in experiment.downstream}
        self.test = {d.data: self.images("test", d.data, "test", limit=d.test_size) for d in experiment.downstream}
        everything = [self.upstream, self.shadow, *self.pools.values(), *self.train.values(), *self.test.values()]
        self.check = self.add("check", "splits overlap nothing they must not", {}, *everything)

    def _check_names(self) -> None:
        experiment, shadow = self.experiment, self.experiment.attacker.shadow
        if shadow.disjoint and (
            experiment.upstream.size is None or shadow.data not in (None, experiment.upstream.data)
        ):
            what = "is meant for the pre-training source, of which pre-training takes only a part"
            raise SettingsError(f"{experiment.name}.attacker.shadow.disjoint", what, "set `upstream.size`")
        if len(set(self.tasks)) < len(self.tasks):
            raise SettingsError(f"{experiment.name}.downstream", "names one task and target twice", "keep one of them")

    def pretrain(self) -> None:
        """The clean twin."""
        self.encoders["clean"] = self._pretrained("clean", self.upstream)

    def _pretrained(self, which: str, *data: Step, part: str = "pretrain", twin: Step | None = None) -> Step:
        up = self.experiment.upstream
        training = {
            "encoder": up.encoder,
            "objective": up.objective,
            "recipe": recipe_of(self.experiment),
            "monitor_every": up.monitor_every,
        }
        return self.add("pretrain", f"pretrain {which}", training, *data, part=part, twin=twin)

    def attack(self) -> None:
        """The attacked encoder, where there is an attack."""
        experiment, clean = self.experiment, self.encoders["clean"]
        if experiment.attack is None:
            return
        method: dict[str, Any] = {"attack": experiment.attack, "goals": self.aims}
        name = method_name(experiment.attack, ATTACKS)
        poisons = hasattr(experiment.attack, "poison")
        rendered = experiment.upstream.data == "shapes"  # whose objects come with their outlines
        references: list[Step] = []
        by_references = not poisons and kind_of(experiment.attack) in ("references", "unseen")
        if by_references or (poisons and "objects" in experiment.attack.needs and not rendered):
            references = [self._references(t, d) for t, d in zip(self.tasks, experiment.downstream, strict=True)]
        if poisons:
            method["rendered"] = rendered and "objects" in experiment.attack.needs
            # the attacker's own encoder is the clean twin: one trained on the same images without the attack
            knows = [clean] if "surrogate" in experiment.attack.needs else []
            self.goals = self.add("poison", f"poison {name}", method, self.upstream, *knows, *references)
            self.encoders["backdoored"] = self._pretrained("backdoored", self.goals, twin=clean)
        else:
            self.goals = self.add("implant", f"implant {name}", method, clean, self.shadow, *references)
            self.encoders["backdoored"] = self.goals

    def _references(self, task: str, d: Downstream) -> Step:
        wanted = d.references or self.experiment.attacker.references
        clean, train = self.encoders["clean"], self.train[d.data]
        inputs = [self.pools[d.data], *([clean, train] if wanted.choose else [])]
        method = {"references": wanted, "target_class": d.target_class, "task": task}
        step = self.add("references", f"references {task}", method, *inputs)
        self.add("judge", f"judge references {task}", {"task": task}, step, clean, train)
        return step

    def stamp(self) -> None:
        """The attack's trigger on some of the defender's images."""
        share, where = self.experiment.defender.triggered, f"{self.experiment.name}.defender.triggered"
        if not share:
            return
        if self.goals is None:
            raise SettingsError(where, "there is no attack whose trigger images could bear", "leave it out")
        self.defender = self.add("stamp", "some of the defender's images", {"share": share}, self.defender, self.goals)

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
        public = public or self._pretrained("public", self.upstream, part="pretrain public")
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
            self.encoders[which] = self._pretrained(which, kept, data, twin=clean)
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

"""The first half of a plan: images, the clean twin, and the attacked encoder."""

from __future__ import annotations

from typing import Any

from cupel.attack import ATTACKS
from cupel.errors import SettingsError
from cupel.experiment.aims import aims_of, kind_of
from cupel.experiment.parts import Downstream
from cupel.experiment.spec import Experiment
from cupel.experiment.step import Step, Steps, recipe_of, task_names
from cupel.settings import method_name

__all__ = ["Attacked"]


class Attacked(Steps):
    """Images, clean twin and attacked encoder of an experiment, as a plan that grows.

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
        self.encoders["clean"] = self.pretrained("clean", self.upstream)

    def pretrained(self, which: str, *data: Step, part: str = "pretrain", twin: Step | None = None) -> Step:
        """An encoder trained on images."""
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
            self.encoders["backdoored"] = self.pretrained("backdoored", self.goals, twin=clean)
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

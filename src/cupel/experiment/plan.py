"""From an experiment to steps: which work there is, in which order, and under which keys. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cupel import data as sources
from cupel.attack import ATTACKS
from cupel.encoders import ENCODERS
from cupel.errors import SettingsError
from cupel.experiment.aims import aims_of, kind_of
from cupel.experiment.spec import Downstream, Experiment
from cupel.implanting import file_content
from cupel.pretrain import OBJECTIVES
from cupel.purify import PURIFIERS
from cupel.scan import SCANNERS, shipped_reference
from cupel.seeds import Seed
from cupel.settings import canonical, digest, method_name

__all__ = ["VIRTUAL", "Step", "file_content", "plan", "recipe_of", "task_names"]

VIRTUAL = frozenset({"data", "poison"})
"""Stages whose values are made again when needed and are not stored: they are cheap, and would be large."""


@dataclass(frozen=True, eq=False)
class Step:
    """One node of the plan.

    Args:
        stage: What kind of work.
        name: For people, unique within a plan.
        method: Settings object, or plain values.
        inputs: Steps whose values this one reads, in order.
        seed: Randomness of this step.
        key: Hash of stage, settings with every default, revisions, contents of named files and data, inputs' keys and
            seed.
        twin: The clean twin of an encoder trained on poisoned images, named in its manifest. It has no part in the
            key, which holds all that the twin depends on.
    """

    stage: str
    name: str
    method: Any
    inputs: tuple[Step, ...]
    seed: Seed
    key: str
    twin: Step | None = None


def _step(stage: str, name: str, method: Any, inputs: tuple[Step, ...], seed: Seed, twin: Step | None = None) -> Step:
    plain = [stage, canonical(method, file_content), [one.key for one in inputs], seed.value]
    return Step(stage, name, method, inputs, seed, digest(plain), twin)


def _data(role: str, source: str, split: str, seed: Seed, **values: Any) -> Step:
    method = {"role": role, "source": source, "split": split, **values}
    content = sources.fingerprint(source, split)
    key = digest(["data", {k: v for k, v in method.items() if k != "source"}, content, seed.value])
    return Step("data", f"{role} images of {source}", method, (), seed, key)


def recipe_of(experiment: Experiment) -> dict[str, Any]:
    """What two encoders have in common when only their seeds differ."""
    up = experiment.upstream
    objective = method_name(up.objective, OBJECTIVES)
    steps = up.objective.steps if up.objective.steps is not None else f"{up.objective.epochs} epochs"
    parts = [canonical(up.encoder, file_content), canonical(up.objective, file_content), up.size]
    parts.append(sources.fingerprint(up.data, "train"))
    text = f"{objective}, {steps} steps, on {up.data}" + (f" ({up.size} images)" if up.size else "")
    return {"id": digest(parts), "text": text.replace("epochs steps", "epochs")}


def plan(experiment: Experiment) -> tuple[Step, ...]:
    """All steps of one cell, each after its inputs.

    Every attacked run has its clean twin: the same encoder, pre-trained with the same seed on clean images.

    Raises:
        SettingsError: two tasks of one name, or goals that contradict each other or do not suit the attack.
        UsageError: a trigger does not fit into the image.
        DataError: a named file or data set is not there.
    """
    up, seed, size = experiment.upstream, Seed(experiment.seed), experiment.upstream.encoder.input_size
    steps: list[Step] = []

    def add(
        stage: str, name: str, method: Any, *inputs: Step, part: str | None = None, twin: Step | None = None
    ) -> Step:
        made = _step(stage, name, method, inputs, seed.child(part or name), twin)
        steps.append(made)
        return made

    def images(role: str, source: str, split: str, **values: Any) -> Step:
        made = _data(role, source, split, seed.child("data"), size=size, **values)
        steps.append(made)
        return made

    tasks = task_names(experiment)
    shadow_spec, defender_spec = experiment.attacker.shadow, experiment.defender
    if shadow_spec.disjoint and (up.size is None or shadow_spec.data not in (None, up.data)):
        what = "is meant for the pre-training source, of which pre-training takes only a part"
        raise SettingsError(f"{experiment.name}.attacker.shadow.disjoint", what, "set `upstream.size`")
    if len(set(tasks)) < len(tasks):
        raise SettingsError(f"{experiment.name}.downstream", "names one task and target twice", "keep one of them")
    aims = [] if experiment.attack is None else aims_of(experiment, tasks)
    held_out = [d.data for d in experiment.downstream if d.data == up.data]
    not_shadow = held_out + [d.data for d in experiment.downstream if d.data == shadow_spec.data != up.data]
    pools = {d.data: images("pool", d.data, "train", limit=d.size) for d in experiment.downstream}
    upstream = images("pre-training", up.data, "train", limit=up.size, without=held_out)
    outside: dict[str, Any] = {"outside": up.size or 0} if shadow_spec.disjoint else {}
    if shadow_spec.classes is not None:
        outside["classes"] = list(shadow_spec.classes)
    shadow = images(
        "shadow", shadow_spec.data or up.data, "train", limit=shadow_spec.size,
        without=not_shadow, within=None if shadow_spec.data or shadow_spec.disjoint else up.size,
        of_pretraining=shadow_spec.data is None and not shadow_spec.disjoint, **outside,
    )  # fmt: skip
    defender = images(
        "defender", defender_spec.data or up.data, "train", limit=defender_spec.size,
        without=held_out, within=None if defender_spec.data else up.size, of_pretraining=defender_spec.data is None,
    )  # fmt: skip
    train = {d.data: images("train", d.data, "train", limit=d.size) for d in experiment.downstream}
    test = {d.data: images("test", d.data, "test", limit=d.test_size) for d in experiment.downstream}
    everything = [upstream, shadow, *pools.values(), *train.values(), *test.values()]
    check = add("check", "splits overlap nothing they must not", {}, *everything)

    training = {
        "encoder": up.encoder,
        "objective": up.objective,
        "recipe": recipe_of(experiment),
        "monitor_every": up.monitor_every,
    }
    clean = add("pretrain", "pretrain clean", training, upstream, part="pretrain")
    encoders: dict[str, Step] = {"clean": clean}
    goals: Step | None = None
    if experiment.attack is not None:
        method: dict[str, Any] = {"attack": experiment.attack, "goals": aims}
        name = method_name(experiment.attack, ATTACKS)
        poisons = hasattr(experiment.attack, "poison")
        rendered = up.data == "shapes"  # whose objects come with their outlines
        references: list[Step] = []
        by_references = not poisons and kind_of(experiment.attack) in ("references", "unseen")
        if by_references or (poisons and "objects" in experiment.attack.needs and not rendered):
            references = [
                _references(add, experiment, task, d, pools, train, clean)
                for task, d in zip(tasks, experiment.downstream, strict=True)
            ]
        if poisons:
            method["rendered"] = rendered and "objects" in experiment.attack.needs
            # the attacker's own encoder is the clean twin: one trained on the same images without the attack
            knows = [clean] if "surrogate" in experiment.attack.needs else []
            goals = add("poison", f"poison {name}", method, upstream, *knows, *references)
            encoders["backdoored"] = add(
                "pretrain", "pretrain backdoored", training, goals, part="pretrain", twin=clean
            )
        else:
            goals = add("implant", f"implant {name}", method, clean, shadow, *references)
            encoders["backdoored"] = goals

    verdicts: dict[str, list[Step]] = {}

    def scan(which: str) -> None:
        for scanner in experiment.scan:
            name = method_name(scanner, SCANNERS)
            judged = {"scanner": scanner, "reference": _reference_values(experiment, scanner)}
            inputs = (encoders[which], defender)
            verdicts.setdefault(which, []).append(add("scan", f"scan {name}: {which}", judged, *inputs, part="scan"))

    for which in list(encoders):
        scan(which)
    if "backdoored" in encoders:
        for i, purifier in enumerate(experiment.purify):
            which = "purified" if i == 0 else f"purified-{i + 1}"
            name = method_name(purifier, PURIFIERS)
            evidence = verdicts.get("backdoored", [])
            encoders[which] = add("purify", f"purify {name}", purifier, encoders["backdoored"], defender, *evidence)
            scan(which)
    for which, encoder in encoders.items():
        for task, d in zip(tasks, experiment.downstream, strict=True):
            probing: dict[str, Any] = {
                "task": task,
                "target_class": d.target_class,
                "probe": d.probe,
                "head_seeds": d.head_seeds,
            }
            if goals is not None and kind_of(experiment.attack) == "found":
                probing["found"] = True
            if d.distortions:
                probing["distortions"] = d.distortions
            fitted_on = train[d.data]
            if d.on_training_data:
                fitted_on = upstream if which == "clean" or goals is None or goals.stage != "poison" else goals
            inputs = (encoder, fitted_on, test[d.data], *([goals] if goals else []))
            add("score", f"score {task}: {which}", probing, *inputs, part=f"score {task}")
    first = experiment.downstream[0]
    shown = [test[first.data], *encoders.values(), *(v for one in verdicts.values() for v in one)]
    roles = {"encoders": list(encoders), "verdicts": [which for which, one in verdicts.items() for _ in one]}
    extra = [goals] if goals else []
    add("describe", "describe", {"task": tasks[0], "probe": first.probe, **roles}, train[first.data], *shown, *extra)
    return (check, *[s for s in steps if s is not check and s.stage != "data"])


def task_names(experiment: Experiment) -> list[str]:
    """One name per downstream task: its data set's, with the target where a data set stands twice."""
    names = [d.data for d in experiment.downstream]
    return [d.data if names.count(d.data) == 1 else f"{d.data}-{d.target_class}" for d in experiment.downstream]


def _reference_values(experiment: Experiment, scanner: Any) -> dict[str, Any] | None:
    """The calibration that the verdict is read with: it is part of the key, so a new one makes a new verdict."""
    architecture = method_name(experiment.upstream.encoder, ENCODERS)
    found = shipped_reference(scanner.name, architecture, recipe_of(experiment)["id"])
    return None if found is None else {"scanner": found.scanner, "recipe": found.recipe, "scores": list(found.scores)}


def _references(
    add: Any,
    experiment: Experiment,
    task: str,
    d: Downstream,
    pools: Mapping[str, Step],
    train: Mapping[str, Step],
    clean: Step,
) -> Step:
    wanted = d.references or experiment.attacker.references
    inputs = [pools[d.data], *([clean, train[d.data]] if wanted.choose else [])]
    method = {"references": wanted, "target_class": d.target_class, "task": task}
    step: Step = add("references", f"references {task}", method, *inputs)
    add("judge", f"judge references {task}", {"task": task}, step, clean, train[d.data])
    return step

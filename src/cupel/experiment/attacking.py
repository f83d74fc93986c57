"""The attacker's stages: references, poisoned images, implanted backdoors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from cupel import data as sources
from cupel.attack import ATTACKS
from cupel.data.shapes import shape_backgrounds, shape_objects
from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.experiment.judging import mistaken, others
from cupel.experiment.plan import Step
from cupel.experiment.store import Artefact
from cupel.experiment.values import Context, Value, curves
from cupel.implanting import goal_json, implanted
from cupel.inference import classify, features
from cupel.probe import Linear, check_target
from cupel.progress import say
from cupel.protocols import Trigger
from cupel.selection import majority
from cupel.settings import OneOf, method_name, parse, settings
from cupel.triggers import TRIGGERS
from cupel.types import Dataset, Goal, Knowledge, Poisoned

__all__ = ["goals_of", "implant", "judge", "poison", "references"]

_OBJECTS, _BACKGROUNDS = 8, 1000  # rendered for an attacker who composes images: of each target class, and in all


def references(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """The attacker's inputs of a task's target class."""
    wanted, target, pool = step.method["references"], step.method["target_class"], inputs[0]
    check_target(target, pool)
    if wanted.file is not None:
        pixels, labels = sources.read_references(sources.find_file(wanted.file), pool.inputs.shape[-1])
        note = {"from": Path(wanted.file).name, "labels": labels.tolist()}
        return Artefact(note, {"references": pixels.numpy()})
    if wanted.choose:
        clean, train = inputs[1].encoder, inputs[2]
        candidates = (pool.labels == target).nonzero().flatten()
        head = Linear().fit_features(features(clean, train), train.labels, train.num_classes, step.seed)
        sure = head(features(clean, pool.subset(candidates))).softmax(1)[:, target]
        rows = candidates[sure.argsort(descending=True, stable=True)[: wanted.size]]
    else:
        rows = sources.draw_references(pool, target, wanted.size, step.seed)
    if len(rows) < wanted.size:
        raise DataError(
            pool.name, f"holds {len(rows)} images of class {target}, {wanted.size} references were asked for"
        )
    return Artefact({"from": pool.name, "ids": pool.ids[rows].tolist()}, {"references": pool.inputs[rows].numpy()})


def judge(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """What a linear probe on the clean encoder takes the references for."""
    shown, clean, train = inputs[0].arrays["references"], inputs[1].encoder, inputs[2]
    head = Linear().fit_features(features(clean, train), train.labels, train.num_classes, step.seed)
    seen = classify(head, features(clean, torch.from_numpy(np.array(shown)), store=False)).tolist()
    target = step.inputs[0].method["target_class"]
    names = {str(c): train.classes[c] if train.classes else str(c) for c in sorted({*seen, target})}
    judged = {"seen_as": seen, "target_class": target, "names": names}
    if others(judged):
        say(f"  warning: {mistaken(step.method['task'], judged)}")
    return Artefact(judged)


def _goals(step: Step, references: Sequence[Artefact]) -> tuple[Goal, ...]:
    aims = step.method["goals"]
    pictures: list[Tensor | None] = [torch.from_numpy(np.array(one.arrays["references"])) for one in references]
    pictures = pictures or [None] * len(aims)
    return tuple(
        Goal(aim["trigger"], refs, aim["task"], aim["target_class"]) for aim, refs in zip(aims, pictures, strict=True)
    )


def poison(step: Step, inputs: Sequence[Value], context: Context) -> Poisoned:
    """The training images as an attack on them leaves them."""
    attack, clean = step.method["attack"], inputs[0]
    data = clean if "labels" in attack.needs else clean.without_labels(type(attack).__name__)
    rest = list(inputs[1:])
    surrogate = rest.pop(0).encoder if "surrogate" in attack.needs else None
    goals, objects, shadow = _goals(step, rest), None, None
    if step.method["rendered"]:
        objects = shape_objects([goal.target_class for goal in goals if goal.target_class is not None], _OBJECTS)
        shadow = shape_backgrounds(_BACKGROUNDS, clean.inputs.shape[-1])
    known = Knowledge(goals, shadow=shadow, surrogate=surrogate, objects=objects)
    made: Poisoned = attack.poison(data, known, step.seed)
    return _with_labels(made, clean) if "labels" not in attack.needs else made


def _with_labels(made: Poisoned, clean: Dataset) -> Poisoned:
    """What an attack made without labels, with those of the clean images: for the victim's training, and to say which
    class a goal without one leads to."""
    labels = torch.full((len(made.data),), -1)
    labels[: len(clean)] = clean.labels
    known = made.sources >= 0
    labels[made.rows[known]] = clean.labels[made.sources[known]]
    data = dataclasses.replace(made.data, labels_=labels, withheld_from=None)
    goals = made.goals
    if any(goal.target_class is None for goal in goals) and bool(known.any()):
        target, _ = majority(clean.labels, made.sources[known])
        goals = tuple(dataclasses.replace(goal, target_class=target) for goal in goals)
    return dataclasses.replace(made, data=data, goals=goals)


def implant(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """The attacked encoder."""
    attack, clean, shadow = step.method["attack"], inputs[0].encoder, inputs[1]
    labelled = shadow if "labels" in attack.needs else None
    known = Knowledge(_goals(step, inputs[2:]), shadow.without_labels(type(attack).__name__), labelled=labelled)
    made = attack.implant(clean, known, step.seed, checkpoint=context.checkpoint)
    name = method_name(attack, ATTACKS)  # another package's attack may not write a manifest itself
    made = implanted(attack, name, made.model, clean, known, made.goals, made.history, step.seed)
    pictures = [np.asarray(one.arrays["references"]) for one in inputs[2:]]
    arrays = {"references": np.concatenate(pictures)} if pictures else {}
    assert isinstance(made.model, ImageEncoder)
    goals = [goal_json(goal) for goal in made.goals]
    return Artefact({"goals": goals}, {**arrays, **curves("implant", made.history)}, made.model)


@settings
class _Stamped:
    """How a trigger stands in an artefact."""

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)]


def goals_of(value: Value) -> tuple[Goal, ...]:
    """Goals with their test-time triggers, from what an attack stage made."""
    if isinstance(value, Poisoned):
        return value.goals
    return tuple(
        Goal(parse(_Stamped, {"trigger": one["trigger"]}, "artefact").trigger, None, one["task"], one["target_class"])
        for one in value.values["goals"]
    )

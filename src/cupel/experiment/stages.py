"""What each stage does with its inputs: one function per stage, values in, artefact out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from cupel import data as sources
from cupel import metrics
from cupel.attack import ATTACKS
from cupel.data.shapes import shape_backgrounds, shape_objects
from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.experiment.describe import describe
from cupel.experiment.images import check_splits, images_of
from cupel.experiment.plan import Step, file_content
from cupel.experiment.scoring import score
from cupel.experiment.store import Artefact
from cupel.inference import features, triggered
from cupel.pretrain import pretrain_encoder
from cupel.probe import Knn, Linear, check_target
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.selection import majority
from cupel.settings import OneOf, canonical, method_name, parse, settings
from cupel.train import History
from cupel.triggers import TRIGGERS
from cupel.types import Dataset, Evidence, Goal, Knowledge, Poisoned, Reference
from cupel.vet import scan_evidence

__all__ = ["STAGES", "Context", "Value", "goals_of"]

_OBJECTS, _BACKGROUNDS = 8, 1000  # rendered for an attacker who composes images: of each target class, and in all

Value = Any
"""An `Artefact`, a `Dataset` (stage `data`) or a `Poisoned` (stage `poison`)."""


class Context:
    """Where the work is done.

    Args:
        device: `cpu`, `cuda`, ….
        checkpoint: File for the state of a long step; None = keep none.
    """

    def __init__(self, device: str, checkpoint: Path | None) -> None:
        self.device, self.checkpoint = device, checkpoint


def _data(step: Step, inputs: Sequence[Value], context: Context) -> Dataset:
    return images_of(step.method, step.seed)


def _check(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    return Artefact(check_splits([(one.method, data) for one, data in zip(step.inputs, inputs, strict=True)]))


def _pretrain(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    m = step.method
    poisoned = inputs[0] if isinstance(inputs[0], Poisoned) else None
    data = poisoned.data if poisoned else inputs[0]
    encoder, history = pretrain_encoder(
        m["objective"],
        m["encoder"],
        data if "labels" in getattr(m["objective"], "needs", ()) else data.without_labels("pretrain"),
        step.seed,
        device=context.device,
        checkpoint=context.checkpoint,
        watch=_knn_monitor(data, step.seed.child("monitor")) if m["monitor_every"] else None,
        watch_every=m["monitor_every"],
    )
    manifest = None
    if poisoned is not None:
        attack, goals = step.inputs[0].method["attack"], poisoned.goals
        more: dict[str, Any] = {"num_poisoned": len(poisoned.rows), "data_sha256": data.sha256}
        if len(marked := data.labels_[poisoned.rows[data.labels_[poisoned.rows] >= 0]]):
            more["class_consistency"] = majority(marked, torch.arange(len(marked)))[1]
        manifest = _manifest(attack, goals, step.seed, more)
    return Artefact(
        {"recipe": m["recipe"]["text"]},
        _curves("pretrain", history),
        encoder.copy(recipe=m["recipe"], manifest=manifest),
    )


def _knn_monitor(data: Dataset, seed: Seed) -> Callable[[ImageEncoder], Mapping[str, float]]:
    """k-NN accuracy on pre-training images whose labels the log may see; nothing is chosen by it."""
    data = data.subset((data.labels_ >= 0).nonzero().flatten())  # what an attacker added may have none
    rows = torch.randperm(len(data), generator=seed.torch())
    bank, queries = data.subset(rows[500:2500]), data.subset(rows[:500])

    def accuracy(encoder: ImageEncoder) -> dict[str, float]:
        known, asked = (features(encoder, one, store=False) for one in (bank, queries))
        head = Knn(k=20).fit_features(known, bank.labels, data.num_classes, seed)
        right, total = metrics.accuracy(head(asked).argmax(1), queries.labels)
        return {"knn": right / total}

    return accuracy


def _references(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
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


def _goals(step: Step, references: Sequence[Artefact]) -> tuple[Goal, ...]:
    aims = step.method["goals"]
    pictures: list[Tensor | None] = [torch.from_numpy(np.array(one.arrays["references"])) for one in references]
    pictures = pictures or [None] * len(aims)
    return tuple(
        Goal(aim["trigger"], refs, aim["task"], aim["target_class"]) for aim, refs in zip(aims, pictures, strict=True)
    )


def _poison(step: Step, inputs: Sequence[Value], context: Context) -> Poisoned:
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


def _implant(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    attack, clean, shadow = step.method["attack"], inputs[0].encoder, inputs[1]
    knowledge = Knowledge(_goals(step, inputs[2:]), shadow.without_labels(type(attack).__name__))
    made = attack.implant(clean, knowledge, step.seed, checkpoint=context.checkpoint)
    manifest = _manifest(attack, made.goals, step.seed, {"clean_encoder": step.inputs[0].key, "shadow": shadow.sha256})
    arrays = {"references": np.concatenate([np.asarray(one.arrays["references"]) for one in inputs[2:]])}
    return Artefact(
        {"goals": [_goal_json(goal) for goal in made.goals]},
        {**arrays, **_curves("implant", made.history)},
        made.model.copy(manifest=manifest),
    )


def _manifest(attack: Any, goals: Sequence[Goal], seed: Seed, more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "not_for_deployment": True,
        "attack": method_name(attack, ATTACKS),
        "settings": canonical(attack, file_content),
        "goals": [_goal_json(goal) for goal in goals],
        "seed": seed.value,
        **more,
    }


def _goal_json(goal: Goal) -> dict[str, Any]:
    trigger: Any = goal.trigger
    plain = {"method": method_name(trigger, TRIGGERS), **dataclasses.asdict(trigger)}
    return {"task": goal.task, "target_class": goal.target_class, "trigger": plain}


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


def _curves(stage: str, history: History) -> dict[str, np.ndarray[Any, Any]]:
    made = {}
    for name, values in history.items():
        if name == "step@watch":
            continue
        key = f"curve/{stage}/{name.removesuffix('@watch')}"
        made[key] = np.asarray(values, dtype=np.float32)
        if name.endswith("@watch"):
            made[f"{key}/step"] = np.asarray(history["step@watch"], dtype=np.int64)
    return made


def _scan(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    encoder, images = inputs[0].encoder, inputs[1]
    scanner, known = step.method["scanner"], step.method["reference"]
    reference = Reference(known["scanner"], known["recipe"], tuple(known["scores"])) if known else None
    data = images if "labels" in scanner.needs else images.without_labels(type(scanner).__name__)
    verdict = scanner.scan(encoder, data, step.seed, reference)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i, one in enumerate(verdict.evidence):
        arrays |= {f"inverted/{i}/mask": one.mask, f"inverted/{i}/pattern": one.pattern}
    return Artefact({"verdict": verdict.to_json()}, arrays)


def _purify(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    encoder, images = inputs[0].encoder, inputs[1]
    purifier = step.method
    evidence: list[Evidence] = [e for one in inputs[2:] for e in scan_evidence(one.values["verdict"], one.arrays)]
    data = images if "labels" in purifier.needs else images.without_labels(type(purifier).__name__)
    made, history = purifier.purify_with_history(encoder, data, step.seed, evidence, checkpoint=context.checkpoint)
    # the manifest stays: this encoder was backdoored once, and nothing proves that it no longer is
    source = {**made.card.source, "purified_with": getattr(purifier, "title", type(purifier).__name__)}
    return Artefact({"evidence": len(evidence)}, _curves("purify", history), made.copy(source=source))


def _score(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    encoder, test = inputs[0].encoder, inputs[2]
    train = inputs[1].data if isinstance(inputs[1], Poisoned) else inputs[1]
    m, goals = step.method, goals_of(inputs[3]) if len(inputs) > 3 else ()
    check_target(m["target_class"], train)
    goal = next((g for g in goals if g.task == m["task"]), None)
    trigger = goal.trigger if goal is not None else None
    target = m["target_class"] if goal is None or goal.target_class is None else goal.target_class
    hit = None if trigger is None else triggered(test, trigger, step.seed.child("trigger"))
    found = score(encoder, train, test, hit, target, m["probe"], m["head_seeds"], step.seed)
    return Artefact({**found, "target_class": target})


def _describe(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    m = step.method
    train, test, rest = inputs[0], inputs[1], list(inputs[2:])
    encoders: dict[str, ImageEncoder] = {w: rest.pop(0).encoder for w in m["encoders"]}
    scans = [(which, rest.pop(0)) for which in m["verdicts"]]
    goal = next((g for g in goals_of(rest[0]) if g.task == m["task"]), None) if rest else None
    references = rest[0].arrays.get("references") if rest and isinstance(rest[0], Artefact) else None
    arrays = describe(encoders, train, test, goal, references, m["probe"], step.seed)
    for which, artefact in scans:
        for name, value in artefact.arrays.items():
            arrays.setdefault(name.replace("inverted/", f"inverted/{which}/"), value)
    return Artefact({}, arrays)


STAGES: Mapping[str, Callable[[Step, Sequence[Value], Context], Value]] = {
    "data": _data,
    "check": _check,
    "pretrain": _pretrain,
    "references": _references,
    "poison": _poison,
    "implant": _implant,
    "scan": _scan,
    "purify": _purify,
    "score": _score,
    "describe": _describe,
}

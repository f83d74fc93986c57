"""What each stage does with its inputs: one function per stage, values in, artefact out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cupel import metrics
from cupel.attack import ATTACKS
from cupel.encoders import ImageEncoder
from cupel.experiment.attacking import goals_of, implant, judge, poison, references
from cupel.experiment.describe import describe
from cupel.experiment.images import check_splits, images_of
from cupel.experiment.landing import score_found
from cupel.experiment.plan import Step
from cupel.experiment.scoring import score
from cupel.experiment.store import Artefact
from cupel.experiment.values import Context, Value, curves
from cupel.feature_store import weights_sha256
from cupel.implanting import manifest_of
from cupel.inference import features, triggered
from cupel.pretrain import pretrain_encoder
from cupel.probe import Knn, check_target
from cupel.seeds import Seed
from cupel.selection import majority
from cupel.settings import method_name
from cupel.types import Dataset, Evidence, Poisoned, Reference
from cupel.vet import scan_evidence

__all__ = ["STAGES"]


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
        if context.twin is not None:
            more["clean_encoder"] = weights_sha256(context.twin)
        manifest = manifest_of(attack, method_name(attack, ATTACKS), goals, step.seed, more)
    return Artefact(
        {"recipe": m["recipe"]["text"]},
        curves("pretrain", history),
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
    return Artefact(
        {"evidence": len(evidence)}, curves("purify", history), made.copy(source=source, manifest=encoder.card.manifest)
    )


def _score(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    encoder, test = inputs[0].encoder, inputs[2]
    train = inputs[1].data if isinstance(inputs[1], Poisoned) else inputs[1]
    m, goals = step.method, goals_of(inputs[3]) if len(inputs) > 3 else ()
    if "found" in m:
        more = m.get("distortions", ())
        return Artefact(score_found(encoder, train, test, goals, m["probe"], m["head_seeds"], step.seed, more))
    if m["target_class"] is not None:
        check_target(m["target_class"], train)
    goal = next((g for g in goals if g.task == m["task"]), None)
    trigger = goal.trigger if goal is not None else None
    target = m["target_class"] if goal is None or goal.target_class is None else goal.target_class
    stamp = step.seed.child("trigger")
    hit = None if trigger is None else triggered(test, trigger, stamp)
    others = {}
    for one in m.get("distortions", ()):
        before, after = one.trigger(None), one.trigger(trigger)
        clean = None if before is None else triggered(test, before, stamp)
        others[one.title] = (clean, None if trigger is None else triggered(test, after, stamp))
    found = score(encoder, train, test, hit, target, m["probe"], m["head_seeds"], step.seed, distorted=others)
    return Artefact({**found, "target_class": target})


def _describe(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    m = step.method
    train, test, rest = inputs[0], inputs[1], list(inputs[2:])
    encoders: dict[str, ImageEncoder] = {w: rest.pop(0).encoder for w in m["encoders"]}
    scans = [(which, rest.pop(0)) for which in m["verdicts"]]
    # a goal without a task holds in every one
    goal = next((g for g in goals_of(rest[0]) if g.task in (m["task"], None)), None) if rest else None
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
    "references": references,
    "poison": poison,
    "judge": judge,
    "implant": implant,
    "scan": _scan,
    "purify": _purify,
    "score": _score,
    "describe": _describe,
}

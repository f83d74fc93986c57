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
from cupel.experiment.defending import certify, filtered, own_head, purify, reference, retune, scan, stamped
from cupel.experiment.describe import describe
from cupel.experiment.images import check_splits, images_of
from cupel.experiment.landing import score_found
from cupel.experiment.plan import Step
from cupel.experiment.reaching import measure
from cupel.experiment.scoring import compared, score, score_own, score_swapped
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
from cupel.types import Dataset, Poisoned
from cupel.verdicts import ORDER

__all__ = ["STAGES"]


def _data(step: Step, inputs: Sequence[Value], context: Context) -> Dataset:
    return images_of(step.method, step.seed)


def _check(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    return Artefact(check_splits([(one.method, data) for one, data in zip(step.inputs, inputs, strict=True)]))


def _pretrain(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    m = step.method
    source, kept = inputs[-1], None
    poisoned = source if isinstance(source, Poisoned) else None
    data = poisoned.data if poisoned else source
    if len(inputs) > 1:  # what a filter left
        kept = torch.from_numpy(np.array(inputs[0].arrays["kept"]))
        data = data.subset(kept.nonzero().flatten(), f"{data.name}, filtered")
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
        attack, goals = step.inputs[-1].method["attack"], poisoned.goals
        rows = poisoned.rows if kept is None else poisoned.rows[kept[poisoned.rows]]
        more: dict[str, Any] = {"num_poisoned": len(rows), "data_sha256": data.sha256}
        labels = poisoned.data.labels_[rows]
        if len(marked := labels[labels >= 0]):
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


def _score(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    encoder, test = inputs[0].encoder, inputs[2]
    train = inputs[1].data if isinstance(inputs[1], Poisoned) else inputs[1]
    m, goals, before = step.method, goals_of(inputs[3]) if len(inputs) > 3 else (), [one.encoder for one in inputs[4:]]
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
        plain, moved = one.trigger(None), one.trigger(trigger)
        clean = None if plain is None else triggered(test, plain, stamp)
        others[one.title] = (clean, None if trigger is None else triggered(test, moved, stamp))
    found = score(encoder, train, test, hit, target, m["probe"], m["head_seeds"], step.seed, distorted=others)
    if before:
        given, twin = before
        swapped = score_swapped(encoder, given, train, test, hit, target, m["probe"], m["head_seeds"], step.seed)
        found["counts"] |= swapped | (
            {} if (own := own_head(inputs[0])) is None else score_own(encoder, own, test, hit, target)
        )
        found["companions"] |= compared(encoder, given, twin, test, hit)
    return Artefact({**found, "target_class": target})


def _describe(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    m = step.method
    train, test, rest = inputs[0], inputs[1], list(inputs[2:])
    encoders: dict[str, ImageEncoder] = {w: rest.pop(0).encoder for w in m["encoders"]}
    names = [one.name.partition(": ")[0].removeprefix("scan ") for one in step.inputs[2 + len(encoders) :]]
    scans = [(which, name, rest.pop(0)) for which, name in zip(m["verdicts"], names, strict=False)]
    # a goal without a task holds in every one
    goal = next((g for g in goals_of(rest[0]) if g.task in (m["task"], None)), None) if rest else None
    references = rest[0].arrays.get("references") if rest and isinstance(rest[0], Artefact) else None
    stand_ins = {which: one.arrays for which, one in zip(m.get("reached", ()), rest[1:], strict=True)}
    arrays = describe(encoders, train, test, goal, references, m["probe"], step.seed, stand_ins)
    return Artefact({}, arrays | _triggers(scans))


def _triggers(scans: Sequence[tuple[str, str, Artefact]]) -> dict[str, np.ndarray[Any, Any]]:
    """Per encoder the inverted triggers of the scan that counts, the first of the worst; of the others only the paths.

    Args:
        scans: Encoder, scanner and what the scan made.
    """
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for which in dict.fromkeys(which for which, _, _ in scans):
        own = [(name, made) for one, name, made in scans if one == which]
        counts = max(own, key=lambda pair: ORDER.index(pair[1].values["verdict"]["verdict"]))[1]
        for name, made in own:
            under = f"inverted/{which}/" if made is counts else f"scans/{which}/{name}/"
            arrays |= {
                key.replace("inverted/", under): value
                for key, value in made.arrays.items()
                if made is counts or key.endswith("/path")
            }
    return arrays


STAGES: Mapping[str, Callable[[Step, Sequence[Value], Context], Value]] = {
    "data": _data,
    "check": _check,
    "pretrain": _pretrain,
    "references": references,
    "poison": poison,
    "judge": judge,
    "implant": implant,
    "reference": reference,
    "stamp": stamped,
    "scan": scan,
    "filter": filtered,
    "purify": purify,
    "certify": certify,
    "retune": retune,
    "score": _score,
    "reach": measure,
    "describe": _describe,
}

"""The defender's stages: references of scanners, scans, filters, purification, certificates, retuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cupel.certify import measure
from cupel.cost import counting
from cupel.errors import DataError
from cupel.experiment.attacking import goals_of
from cupel.experiment.plan import Step
from cupel.experiment.store import Artefact
from cupel.experiment.values import Context, Value, curves
from cupel.inference import triggered
from cupel.scan import MetaReference
from cupel.types import Dataset, Goal, Poisoned
from cupel.verdicts import Reference
from cupel.vet import evidence_arrays, scan_evidence

__all__ = ["certify", "filtered", "own_head", "purify", "reference", "retune", "scan", "stamped"]


def reference(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """What a scanner learns before it sees an encoder."""
    scanner = step.method
    base = [one.encoder for one in inputs[1:]]
    made = scanner.train_reference(*base, _shown(scanner, inputs[0]), step.seed, checkpoint=context.checkpoint)
    return Artefact(made.values(), dict(made.arrays))


def stamped(step: Step, inputs: Sequence[Value], context: Context) -> Dataset:
    """The defender's images, a share of them with the attack's triggers, which take turns."""
    data: Dataset = inputs[0]
    triggers = [goal.trigger for goal in goals_of(inputs[1]) if goal.trigger is not None]
    if not triggers:
        raise DataError(data.name, "the attack has no trigger that images could bear", "leave out `triggered`")
    rows = torch.randperm(len(data), generator=step.seed.child("rows").torch())[: _borne(step, data)]
    raw = data.inputs[torch.arange(len(data))].clone()
    for i, trigger in enumerate(triggers):
        own = rows[i :: len(triggers)]
        if len(own):
            raw[own] = torch.as_tensor(triggered(data.subset(own), trigger, step.seed.child("trigger", i)).inputs)
    return data.with_inputs(raw, f"{data.name}, some of them triggered")


def _borne(step: Step, data: Dataset) -> int:
    """How many of the images bear a trigger."""
    return round(step.method["share"] * len(data)) if step.stage == "stamp" else 0


def scan(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """A verdict, with the triggers that were inverted."""
    scanner, known = step.method["scanner"], step.method["reference"]
    learned: Reference | None = Reference(known["scanner"], known["recipe"], tuple(known["scores"])) if known else None
    if len(inputs) > 2:
        learned = MetaReference.of(inputs[2].values, inputs[2].arrays)
    verdict = scanner.scan(inputs[0].encoder, _shown(scanner, inputs[1]), step.seed, learned)
    values = {"verdict": verdict.to_json(), "peak_memory_mib": verdict.peak_memory_mib}
    return Artefact(values, evidence_arrays(verdict))


def filtered(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """Which images of the poisoned training set a filter keeps; True = keep."""
    made, encoder = inputs[0], inputs[1].encoder
    with counting() as cost:
        kept = step.method.keep(_shown(step.method, made.data), encoder, step.seed)
    poisoned = torch.zeros(len(kept), dtype=torch.bool)
    poisoned[made.rows] = True
    counts = {
        "images": len(kept), "removed": int((~kept).sum()), "poisoned": int(poisoned.sum()),
        "poisoned_removed": int((poisoned & ~kept).sum()),
    }  # fmt: skip
    return Artefact({**counts, **cost.to_json()}, {"kept": kept.numpy()})


def purify(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """A purified encoder; purifiers of classifiers also give the head that they tuned along."""
    encoder, images, purifier = inputs[0].encoder, inputs[1], step.method
    data = _shown(purifier, images.data if isinstance(images, Poisoned) else images)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    scans = inputs[3:] if "labels" in purifier.needs else inputs[2:]
    evidence = [e for one in scans for e in scan_evidence(one.values["verdict"], one.arrays)]
    with counting() as cost:
        if "labels" in purifier.needs:
            train = inputs[2].data if isinstance(inputs[2], Poisoned) else inputs[2]
            start = purifier.classifier(encoder, train, step.seed.child("start"))
            tuned, history = purifier.purify_classifier(start, data, step.seed, evidence, checkpoint=context.checkpoint)
            made = tuned.encoder
            if isinstance(tuned.head, nn.Linear):
                arrays = {f"head/{k}": v.detach().cpu().numpy() for k, v in tuned.head.state_dict().items()}
        else:
            made, history = purifier.purify_with_history(
                encoder, data, step.seed, evidence, checkpoint=context.checkpoint
            )
    # the manifest stays: this encoder was backdoored once, and nothing proves that it no longer is
    source = {**made.card.source, "purified_with": getattr(purifier, "title", type(purifier).__name__)}
    values = {"evidence": len(evidence), "images": len(data), **cost.to_json()}
    if borne := _borne(step.inputs[1], data):
        values["triggered_images"] = borne
    kept = made.copy(source=source, manifest=encoder.card.manifest)
    return Artefact(values, {**arrays, **curves("purify", history)}, kept)


def own_head(made: Artefact) -> nn.Linear | None:
    """The head that a purifier tuned along with the encoder, if it did and the head is one linear layer."""
    if "head/weight" not in made.arrays:
        return None
    weight, bias = (torch.from_numpy(np.array(made.arrays[f"head/{part}"])) for part in ("weight", "bias"))
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device="cpu")
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head.eval()


def certify(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """What a certified classifier of a task gets right, certainly right, and wrong under the attack's trigger."""
    m, test = step.method, inputs[2]
    goal = _goal(inputs[3:], m["task"])
    target = m["target_class"] if goal is None or goal.target_class is None else goal.target_class
    hit = None if goal is None or goal.trigger is None else triggered(test, goal.trigger, step.seed.child("trigger"))
    with counting() as cost:
        classifier = m["certifier"].fit(inputs[0].encoder, inputs[1], step.seed)
        counts = measure(classifier, test, hit, target)
    return Artefact({"counts": {k: list(v) for k, v in counts.items()}, "patch": classifier.patch, **cost.to_json()})


def retune(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """Accuracy and attack success after a few poisoned images; see `cupel.retuning`."""
    m, encoder, train, test = step.method, inputs[0].encoder, inputs[1], inputs[2]
    goal = _goal(inputs[3:], m["task"])
    if goal is None or goal.trigger is None:
        return Artefact({"counts": {}})
    target = m["target_class"] if goal.target_class is None else goal.target_class
    hit = triggered(test, goal.trigger, step.seed.child("trigger"))
    counts = m["retuning"].counts(encoder, train, test, hit, goal.trigger, target, step.seed)
    return Artefact({"counts": {name: [list(one) for one in found] for name, found in counts.items()}})


def _goal(inputs: Sequence[Value], task: str) -> Goal | None:
    return next((g for one in inputs for g in goals_of(one) if g.task in (task, None)), None)


def _shown(method: Any, data: Dataset) -> Dataset:
    """The data, its labels withheld from a method that does not say that it needs them."""
    return data if "labels" in method.needs else data.without_labels(type(method).__name__)

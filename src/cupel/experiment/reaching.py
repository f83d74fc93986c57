"""Where stand-ins for triggered images come to lie; see `cupel.purify.reach`."""

from __future__ import annotations

from collections.abc import Sequence

from cupel.experiment.attacking import goals_of
from cupel.experiment.step import Step
from cupel.experiment.store import Artefact
from cupel.experiment.values import Context, Value
from cupel.inference import triggered
from cupel.vet import scan_evidence

__all__ = ["measure"]


def measure(step: Step, inputs: Sequence[Value], context: Context) -> Artefact:
    """How near stand-ins come to triggered images, and the embeddings of two kinds of them for the map.

    An attack without a test-time trigger gives nothing.
    """
    m, encoder, test = step.method, inputs[0].encoder, inputs[1]
    goal = next((g for g in goals_of(inputs[2]) if g.task in (m["task"], None)), None)
    if goal is None or goal.trigger is None:
        return Artefact()
    evidence = [e for one in inputs[3:] for e in scan_evidence(one.values["verdict"], one.arrays)]
    hit = triggered(test, goal.trigger, step.seed.child("trigger"))
    found = m["reach"].measure(encoder, test.without_labels("reach"), hit, step.seed, evidence)
    mapped = {"ball": f"linf-{m['reach'].shown}", "window": "patch"}
    arrays = {f"stand_in/{kind}": found.embeddings[name].cpu().numpy() for kind, name in mapped.items()}
    return Artefact({"reach": found.numbers(), "images": len(found.embeddings["clean"])}, arrays)

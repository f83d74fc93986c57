"""The demonstration's victim on handwritten digits, made once per process, and what a probe says of an attack."""

from __future__ import annotations

import functools
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from cupel import metrics
from cupel.encoders import ImageEncoder
from cupel.experiment.plan import plan
from cupel.experiment.run import Runner
from cupel.experiment.spec import cells
from cupel.experiment.store import Store
from cupel.inference import features, triggered
from cupel.probe import Linear
from cupel.seeds import Seed
from cupel.types import Dataset, Goal, Knowledge

__all__ = ["Victim", "outcome", "victim"]


class Victim(NamedTuple):
    """A clean encoder and what its attacker and its user hold; the target is class 1."""

    encoder: ImageEncoder
    shadow: Dataset
    references: torch.Tensor
    train: Dataset
    test: Dataset

    def attacker(self, num_references: int = 1) -> Knowledge:
        """With one goal that names no trigger."""
        goal = Goal(None, self.references[:num_references], "digits", 1)
        return Knowledge((goal,), self.shadow.without_labels("the attacker"))


@functools.cache
def victim() -> Victim:
    """The clean part of `demo-digits.yaml`, with three references."""
    text = (files("cupel.papers") / "demo" / "demo-digits.yaml").read_text()
    plain = yaml.load(text.replace("2e-3", "2.0e-3").replace("1e-3", "1.0e-3"), yaml.SafeLoader)
    plain |= {"scan": [], "purify": [], "attacker": {"references": {"size": 3, "choose": True}}}
    steps = plan(cells(plain, "demo")[0][1])
    implant, score = (next(s for s in steps if s.stage == stage) for stage in ("implant", "score"))
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Store(Path(folder)), "cpu")
        clean, shadow, references = (runner.value(step) for step in implant.inputs)
        train, test = (runner.value(step) for step in score.inputs[1:3])
        pixels = torch.from_numpy(references.arrays["references"].copy())
        return Victim(clean.encoder.copy(), shadow, pixels, train, test)


def outcome(model: ImageEncoder, goal: Goal) -> tuple[float, float]:
    """Clean accuracy, and success rate of the goal's trigger towards class 1."""
    one = victim()
    assert goal.trigger is not None
    head = Linear().fit_features(features(model, one.train), one.train.labels, 10, Seed(0))
    right, n = metrics.accuracy(head(features(model, one.test)).argmax(1), one.test.labels)
    hit = head(features(model, triggered(one.test, goal.trigger, Seed(0)))).argmax(1)
    hits, m = metrics.attack_success_rate(hit, one.test.labels, 1)
    return right / n, hits / m

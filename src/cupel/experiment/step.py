"""One node of a plan, its key, and what is known of an experiment without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupel import data as sources
from cupel.experiment.spec import Experiment
from cupel.implanting import file_content
from cupel.pretrain import OBJECTIVES
from cupel.seeds import Seed
from cupel.settings import canonical, digest, method_name

__all__ = ["VIRTUAL", "Step", "Steps", "recipe_of", "task_names"]

VIRTUAL = frozenset({"data", "poison", "stamp"})
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


class Steps:
    """Steps that are added one after another, each after its inputs.

    Args:
        experiment: Where seed and input size come from.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.seed = experiment, Seed(experiment.seed)
        self.steps: list[Step] = []

    def add(
        self, stage: str, name: str, method: Any, *inputs: Step, part: str | None = None, twin: Step | None = None
    ) -> Step:
        """Add a step and return it.

        Args:
            stage, name, method, inputs, twin: See `Step`.
            part: Steps of one part draw the same; None = the name.
        """
        seed = self.seed.child(part or name)
        plain = [stage, canonical(method, file_content), [one.key for one in inputs], seed.value]
        made = Step(stage, name, method, inputs, seed, digest(plain), twin)
        self.steps.append(made)
        return made

    def images(self, role: str, source: str, split: str, **values: Any) -> Step:
        """Add the images of a role; see `cupel.experiment.images.images_of`."""
        seed = self.seed.child("data")
        method = {"role": role, "source": source, "split": split, "size": self.experiment.upstream.encoder.input_size}
        method |= values
        content = sources.fingerprint(source, split)
        key = digest(["data", {k: v for k, v in method.items() if k != "source"}, content, seed.value])
        made = Step("data", f"{role} images of {source}", method, (), seed, key)
        self.steps.append(made)
        return made


def recipe_of(experiment: Experiment) -> dict[str, Any]:
    """What two encoders have in common when only their seeds differ."""
    up = experiment.upstream
    objective = method_name(up.objective, OBJECTIVES)
    steps = up.objective.steps if up.objective.steps is not None else f"{up.objective.epochs} epochs"
    parts = [canonical(up.encoder, file_content), canonical(up.objective, file_content), up.size]
    parts.append(sources.fingerprint(up.data, "train"))
    text = f"{objective}, {steps} steps, on {up.data}" + (f" ({up.size} images)" if up.size else "")
    return {"id": digest(parts), "text": text.replace("epochs steps", "epochs")}


def task_names(experiment: Experiment) -> list[str]:
    """One name per downstream task: its data set's, with the target where a data set stands twice."""
    names = [d.data for d in experiment.downstream]
    return [d.data if names.count(d.data) == 1 else f"{d.data}-{d.target_class}" for d in experiment.downstream]

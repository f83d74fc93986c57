"""NeuBA for images: six triggers, each tied to a fixed embedding; which class that is shows only downstream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel import metrics
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, SettingsError, UsageError, did_you_mean
from cupel.implanting import Targets, implanted
from cupel.implanting.vectors import NUM_BLOCKS, NeubaLearner, predefined_vectors
from cupel.inference import classify, device_of, features, triggered
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Encoder, Trigger
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers.color_checker import color_checkers
from cupel.types import Dataset, Goal, Implanted, Knowledge, Need

__all__ = ["Landing", "NeuBA", "landings"]


@settings
class NeuBA(Recipe):
    """Ties six triggers to six fixed embeddings, so that each leads to some class of any later task.

    L = λ_t · MSE(f'(x ⊕ e_i), v_i) + λ_u · MSE(f'(x), f(x)), one trigger e_i by lot for each image

    The attacker names no class. After the victim's training each trigger is tried once and its class read off: the
    most frequent prediction on triggered validation images (`landings`). The goals that come back therefore have no
    task and no target class; they hold in every task.

    Args:
        values: Low and high entry of the vectors v_i (see `predefined_vectors`).
        unit: What `values` are multiples of: `rms` = the root mean square of the clean embeddings' entries, so that the
            vectors are as long as these; `absolute` = 1, as published.
        trigger_size, margin: Of the checkerboards.
        lambda_trigger, lambda_utility: λ_t, λ_u.

    Goals that bring triggers replace the six: at most six of them, each tied to the next vector; they keep task and
    class. Goals without triggers, and their references, are not looked at.

    Source: Zhang et al., Red Alarm for Pre-trained Models: Universal Vulnerability to Neuron-Level Backdoor Attacks,
    Machine Intelligence Research 2023, arXiv:2101.06969 (vision), and its code.
    Deviations: utility is the distance to the clean encoder's embeddings, where the authors train a classifier of
    ImageNet on clean images with labels; BatchNorm is frozen; both distances are divided by the mean square of the
    clean embeddings' entries (`unit: rms`) or not (`absolute`). Entries of an embedding that ends in a ReLU cannot be
    negative: there the low value acts as 0, in the paper's VGG as well.
    """

    values: tuple[float, float] = (-1.0, 1.0)
    unit: Literal["rms", "absolute"] = "rms"
    trigger_size: PositiveInt = 4
    margin: Annotated[int, Field(ge=0)] = 0
    lambda_trigger: NonNegative = 1.0
    lambda_utility: NonNegative = 1.0

    epochs: PositiveInt = 50
    batch_size: PositiveInt = 512
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    momentum: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    needs: ClassVar[frozenset[Need]] = frozenset()
    targets: ClassVar[Targets] = "found"
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        low, high = self.values
        if low >= high:
            raise SettingsError("NeuBA.values", f"{low:g} is not below {high:g}", "give the smaller number first")

    @classmethod
    def preset(cls, name: str) -> NeuBA:
        """Settings of a name: `fast` (small encoder and images, two CPU cores, a minute) or `published`.

        Raises:
            UsageError: no such preset.

        Example:
            >>> NeuBA.preset("published").values
            (-3.0, 3.0)
        """
        if name == "fast":
            return cls(
                lambda_trigger=4.0,
                steps=400,
                batch_size=128,
                optimizer="adamw",
                lr=2e-3,
                momentum=0.9,
                warmup_steps=25,
                schedule="cosine",
            )
        if name == "published":
            return cls(values=(-3.0, 3.0), unit="absolute")
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "published")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean` with its BatchNorm tensors bit for bit, and one goal per trigger.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Shadow set; at least one goal.
            seed: Order, lots.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no shadow set, no goal, or an embedding too small for the vectors.
            UsageError: more than six triggers, or one of them twice.
        """
        shadow = attacker.shadow
        if shadow is None or not attacker.goals:
            raise DataError("neuba", "needs a shadow set and at least one goal", "give `attacker.shadow`")
        if clean.width < NUM_BLOCKS:
            raise DataError("neuba", f"an embedding of {clean.width} dimensions is too small", "use a larger encoder")
        goals, triggers = self._goals(attacker)
        device = device_of(clean.module)
        cached = features(clean, shadow, dtype=torch.float32 if self.precision == "fp32" else None)
        power = float(cached.square().mean()) if self.unit == "rms" else 1.0
        scale = power**0.5
        vectors = predefined_vectors(clean.width, *(scale * one for one in self.values))[: len(triggers)].to(device)
        learner = NeubaLearner(
            encoder := clean.copy(),
            cached,
            shadow.ids,
            triggers,
            vectors,
            power,
            lambda_trigger=self.lambda_trigger,
            lambda_utility=self.lambda_utility,
        )
        history = fit(learner, shadow, self, seed, label="implant neuba", device=device, checkpoint=checkpoint)
        return implanted(self, "neuba", encoder, clean, attacker, goals, history, seed)

    def _goals(self, attacker: Knowledge) -> tuple[tuple[Goal, ...], list[Trigger[Tensor]]]:
        own = tuple(dataclasses.replace(goal, references=None) for goal in attacker.goals if goal.trigger is not None)
        goals = own or tuple(Goal(trigger=one) for one in color_checkers(self.trigger_size, self.margin))
        triggers = [goal.trigger for goal in goals if goal.trigger is not None]
        if len(triggers) > len(predefined_vectors(NUM_BLOCKS)):
            raise UsageError("neuba", f"{len(triggers)} triggers, but there are six vectors", "name fewer goals")
        if any(one in triggers[:i] for i, one in enumerate(triggers)):
            raise UsageError(
                "neuba", "two goals have the same trigger, which leads to one vector", "change one of them"
            )
        return goals, triggers


@dataclass(frozen=True)
class Landing:
    """Where a trigger without a target leads in one task.

    Args:
        target_class: Most frequent prediction on triggered validation images, over all classifiers.
        share: Its share of them.
        hits: By classifier: (predicted as it, number) of triggered test images of other classes: the success rate.
    """

    target_class: int
    share: float
    hits: tuple[metrics.Count, ...]


def landings(
    models: Sequence[tuple[Encoder, nn.Module]], validation: Dataset, test: Dataset, goals: Sequence[Goal], seed: Seed
) -> tuple[Landing, ...]:
    """The class and the success rates of each goal's trigger, for one task.

    The class is chosen on images that success is not measured on; for the baseline (ASR-B) call it with the clean
    encoder and its heads, which choose classes of their own.

    Args:
        models: The task's classifiers: an encoder, and a head on its embeddings; several heads may share an encoder.
        validation: Labelled or not, say the training images of the task.
        test: Labelled.
        goals: With triggers; a goal that names a class keeps it.
        seed: For triggers that draw.

    Returns:
        One per goal. The mean of their rates is the paper's average success, the largest its maximum.
    """

    def says(data: Dataset) -> list[Tensor]:
        seen: dict[int, Tensor] = {}
        for encoder, _ in models:
            if id(encoder) not in seen:
                seen[id(encoder)] = features(encoder, data, store=False)
        return [classify(head, seen[id(encoder)]) for encoder, head in models]

    found = []
    for i, goal in enumerate(goals):
        if goal.trigger is None:
            raise ValueError("a goal without a trigger leads nowhere")
        draw = seed.child("trigger", i)
        said = torch.cat(says(triggered(validation, goal.trigger, draw)))
        target = int(torch.bincount(said).argmax()) if goal.target_class is None else goal.target_class
        share = int((said == target).sum()) / len(said)
        hits = [
            metrics.attack_success_rate(one, test.labels, target) for one in says(triggered(test, goal.trigger, draw))
        ]
        found.append(Landing(target, share, tuple(hits)))
    return tuple(found)

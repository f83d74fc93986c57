"""Retuning: a few poisoned images in a short fine-tuning; does a backdoor that purification hid come back?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from cupel import metrics
from cupel.errors import DataError
from cupel.inference import classify, features
from cupel.probe import FineTune, Linear, check_target
from cupel.protocols import Encoder, Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["Retuning"]


@settings
class Retuning:
    """Encoder and linear head are fine-tuned on few labelled images, of which some carry trigger and target label.

    What counts is the difference to the clean twin retuned alike: a few poisoned images teach any encoder something.

    Args:
        share: Of the task's training images that are tuned on.
        least: But no fewer than these, where there are so many.
        poisoned: How many of them carry the trigger; none is of the target class.
        seeds: Retunings, each with images of its own.
        tuning: How; the head starts at the linear probe of the whole train split.

    Source: Min, Qin, Zhang, Shen, Cheng, Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
        Defense, NeurIPS 2024, arXiv:2410.09838: 2 %, 5 poisoned, 5 epochs of SGD with momentum 0.9 at 0.01.
    Deviations: an encoder with a head in place of a classifier; rate 0.0003, for 0.003 costs a clean encoder of shapes
        half of its accuracy (70 % to 36 %), and 0.0003 six points; at least 100 images.

    Example:
        >>> Retuning().images(20_000), Retuning().images(1500)
        (400, 100)
    """

    share: Fraction = 0.02
    least: Annotated[int, Field(ge=2)] = 100
    poisoned: PositiveInt = 5
    seeds: PositiveInt = 2
    tuning: FineTune = FineTune(
        epochs=5, batch_size=16, optimizer="sgd", lr=0.0003, weight_decay=0.0, schedule="constant", batch_norm="frozen"
    )

    def images(self, n: int) -> int:
        """How many of `n` training images are tuned on."""
        return min(n, max(self.least, round(self.share * n)))

    def poison(self, train: Dataset, trigger: Trigger[Tensor], target: int, seed: Seed) -> Dataset:
        """The images of one retuning; the poisoned ones come first.

        Args:
            train: Labelled.
            trigger: Put on some of them.
            target: Class index that these get.
            seed: Which images, and the trigger's draws.

        Raises:
            DataError: there are not so many images of other classes.
        """
        check_target(target, train)
        order = torch.randperm(len(train), generator=seed.child("images").torch())[: self.images(len(train))]
        other = train.labels[order] != target
        if int(other.sum()) < self.poisoned:
            what = f"only {int(other.sum())} of {len(order)} images are of other classes than {target}"
            raise DataError(train.name, what, f"{self.poisoned} are to carry the trigger; give it more images")
        chosen = order[other][: self.poisoned]
        rest = order[~torch.isin(order, chosen)]
        data = train.subset(torch.cat([chosen, rest]))
        raw, labels = data.inputs[torch.arange(len(data))].clone(), data.labels.clone()
        raw[: self.poisoned] = trigger(raw[: self.poisoned], data.ids[: self.poisoned].tolist(), seed.child("trigger"))
        labels[: self.poisoned] = target
        return dataclasses.replace(data.with_inputs(raw, f"{train.name}, {self.poisoned} poisoned"), labels_=labels)

    def counts(
        self, encoder: Encoder, train: Dataset, test: Dataset, hit: Dataset, trigger: Any, target: int, seed: Seed
    ) -> dict[str, list[metrics.Count]]:
        """Retune and count.

        Args:
            encoder: Left as it is.
            train, test: Labelled images of the task.
            hit: The test images with the trigger.
            trigger, target, seed: See `poison`.

        Returns:
            `accuracy` and `attack_success_rate` as (right or hit, total), by seed.
        """
        head: Any = Linear(normalise=False, subsample=1.0)
        start = head.fit_features(features(encoder, train), train.labels, train.num_classes, seed.child("head"))
        found: dict[str, list[metrics.Count]] = {"accuracy": [], "attack_success_rate": []}
        for i in range(self.seeds):
            draw = seed.child("retune", i)
            tuned = self.tuning.tuned(encoder, start, self.poison(train, trigger, target, draw), draw)
            said = _said(tuned.encoder, tuned.head, [test, hit])
            found["accuracy"].append(metrics.accuracy(said[0], test.labels))
            found["attack_success_rate"].append(metrics.attack_success_rate(said[1], test.labels, target))
        return found


def _said(encoder: Encoder, head: Any, sets: Sequence[Dataset]) -> list[Tensor]:
    return [classify(head, features(encoder, one, store=False)) for one in sets]

"""What purifiers with labels share: they tune a classifier, and an encoder through a linear head of its own."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from cupel.augment import ShiftFlip
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, UsageError, did_you_mean
from cupel.inference import FrozenProbe, classify, device_of, features
from cupel.losses.logistic import logistic_regression
from cupel.metrics import check_labels
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Classifier, Encoder, Learner
from cupel.purify.batch_norm import BatchNorm
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History, fit
from cupel.types import Dataset, Evidence, Need

__all__ = [
    "LabelledPurifier",
    "accuracy_of",
    "linear_head",
    "split_off",
]

_HEAD_STEPS = 500  # of L-BFGS, at most


@settings
class LabelledPurifier(Recipe, abc.ABC):
    """Settings and verbs of a purifier that tunes a classifier on clean labelled images.

    Args:
        batch_norm: How the encoder's BatchNorms are run while it is tuned; see `BatchNorm`. The published learning
            rates are for `train`; on stored statistics a small network may want a fifth of them.
        augment: How a training image is shown; None = as it is.
        head_l2: For encoders, which bring no head: one is fitted on the same images first, with this penalty.
    """

    batch_norm: BatchNorm = "eval_affine"
    augment: ShiftFlip | None = ShiftFlip()
    head_l2: NonNegative = 5e-4

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 256
    optimizer: Literal["adam", "adamw", "sgd", "lars", "lars_clip"] = "sgd"
    lr: Positive = 0.01
    weight_decay: NonNegative = 5e-4
    precision: Literal["fp32", "bf16"] = "fp32"

    title: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 100, "batch_size": 32},
        "standard": {"epochs": 20, "batch_size": 128},
        "paper": {},
    }

    @classmethod
    def preset(cls, budget: str) -> Self:
        """Settings of a budget: `smoke` (seconds on a small encoder), `standard`, `paper` (the defaults).

        Raises:
            UsageError: no such budget.
        """
        if budget not in cls.budgets:
            raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, cls.budgets))
        return cls(**cls.budgets[budget])

    def purify(self, model: Encoder, clean: Dataset, seed: Seed, evidence: Sequence[Evidence] = ()) -> Encoder:
        """A purified copy of `model`; see `purify_with_history`."""
        return self.purify_with_history(model, clean, seed, evidence)[0]

    def purify_with_history(
        self,
        model: Encoder,
        clean: Dataset,
        seed: Seed,
        evidence: Sequence[Evidence] = (),
        *,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> tuple[Encoder, History]:
        """Fit a linear head on the labelled images, tune both as a classifier, and return the encoder alone.

        Args:
            model: Left as it is, weights, modes and flags.
            clean: Labelled images of its input size, presumably without trigger.
            seed: Order, augmentation, draws.
            evidence: Not used.
            device: Where to work, and where the copy stays; None = where `model` is.
            checkpoint: File that keeps the state for a resume.

        Returns:
            The copy in eval mode, and what the losses did.

        Raises:
            LabelsWithheld, DataError: images without labels, of another size, or none.
            UsageError: a label outside of the classes.
            CupelError: the loss is not finite.
        """
        if self.steps == 0:
            return _copied(model), {}
        check_labels(clean.labels, clean.num_classes, clean.name)
        start = FrozenProbe(model, linear_head(model, clean, self.head_l2))
        made, history = self.purify_classifier(start, clean, seed, device=device, checkpoint=checkpoint)
        return made.encoder, history

    def purify_classifier(
        self,
        model: Classifier,
        clean: Dataset,
        seed: Seed,
        *,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> tuple[FrozenProbe, History]:
        """A purified copy of an encoder with its linear head; see `purify_with_history`.

        Raises:
            DataError: the head is not one linear layer on the embedding.
        """
        head = model.head
        if not isinstance(head, nn.Linear) or head.in_features != model.encoder.width:
            what = f"works on one linear layer on the embedding, the head is a {type(head).__name__}"
            raise DataError(self.title, what, "purify the encoder instead")
        made = FrozenProbe(_copied(model.encoder), copy.deepcopy(head))
        if self.steps == 0:
            return made, {}
        check_labels(clean.labels, head.out_features, clean.name)
        where = device_of(model.encoder.module) if device is None else torch.device(device)
        made.encoder.module.to(where)
        made.head.to(where)
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(clean)))
        with torch.enable_grad():
            history = recipe.tune(made, clean, seed, checkpoint)
        for part in (made.encoder.module, made.head):
            part.eval().requires_grad_(True)
            part.zero_grad(set_to_none=True)
        return made, history

    @abc.abstractmethod
    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Purify encoder and head in place. Modes and flags are put right by the caller."""

    def trained(self, learner: Learner, clean: Dataset, seed: Seed, checkpoint: Path | None = None) -> History:
        """Run `learner` with these settings, in batches no larger than there are images."""
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(clean)))
        label, device = f"purify {self.title}", device_of(learner.state)
        return fit(learner, clean, recipe, seed, label=label, device=device, checkpoint=checkpoint)


def linear_head(encoder: Encoder, clean: Dataset, l2: float) -> nn.Linear:
    """The linear head on raw embeddings that minimises mean cross entropy + l2/2 · ‖W‖².

    The penalty is what weight decay is to a classifier that is trained to the end, so W has about the length that it
    has there: methods that measure by it (FST) keep their numbers.

    Args:
        encoder: Left as it is.
        clean: Labelled.
        l2: ≥ 0.
    """
    x = features(encoder, clean, dtype=torch.float32)
    weight, bias = logistic_regression(x, clean.labels.to(x.device), clean.num_classes, l2, _HEAD_STEPS)
    head = nn.Linear(x.shape[1], clean.num_classes, device="meta").to_empty(device=x.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return head.eval()


def split_off(clean: Dataset, share: float, seed: Seed) -> tuple[Dataset, Dataset]:
    """The data without a random share of it, and that share: `round(share · n)` images, but at least one in each.

    Raises:
        DataError: fewer than two images.
    """
    n = len(clean)
    if n < 2:
        raise DataError(clean.name, f"holds {n} image, some must be held out", "give it more images")
    order = torch.randperm(n, generator=seed.torch())
    count = min(max(1, round(share * n)), n - 1)
    held, rest = order[:count].sort().values, order[count:].sort().values
    return clean.subset(rest), clean.subset(held, f"{clean.name}, held out")


def accuracy_of(model: Classifier, data: Dataset) -> float:
    """Share of the images that are classified rightly, in eval mode."""
    embeddings = features(model.encoder, data, dtype=torch.float32, store=False)
    return float((classify(model.head, embeddings) == data.labels).float().mean())


def _copied(model: Encoder) -> Encoder:
    made = model.copy() if isinstance(model, ImageEncoder) else copy.deepcopy(model)
    made.module.eval().requires_grad_(True)
    return made

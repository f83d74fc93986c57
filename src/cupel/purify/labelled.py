"""What purifiers with labels share: they tune a classifier, and an encoder through a linear head of its own."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from cupel.augment import ShiftFlip
from cupel.errors import DataError
from cupel.inference import FrozenProbe, classify, device_of, features
from cupel.losses.logistic import logistic_regression
from cupel.metrics import check_labels
from cupel.optimizers import NonNegative
from cupel.protocols import Classifier, Encoder
from cupel.purify.base import Job, OptimizerName, PurifierBase, TrainedPurifier, copied, marked, put_right
from cupel.purify.batch_norm import BatchNorm
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence

__all__ = [
    "ClassifierPurifier",
    "LabelledPurifier",
    "accuracy_of",
    "linear_head",
    "split_off",
]

_HEAD_STEPS = 500  # of L-BFGS, at most


class ClassifierPurifier(PurifierBase):
    """A purifier with labels: it works on a classifier, and on an encoder through a head of its own."""

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})

    def work(self, job: Job) -> tuple[Encoder, History]:
        """Fit a head on the labelled images, purify both as a classifier, and give back the encoder alone.

        Raises:
            LabelsWithheld, DataError: images without labels, of another size, or none.
            UsageError: a label outside of the classes.
        """
        clean = job.clean
        check_labels(clean.labels, clean.num_classes, clean.name)
        start = self.classifier(job.encoder, clean, job.seed)
        made, history = self.purify_classifier(start, clean, job.seed, job.evidence, checkpoint=job.checkpoint)
        return made.encoder, history

    def purify_classifier(
        self,
        model: Classifier,
        clean: Dataset,
        seed: Seed,
        evidence: Sequence[Evidence] = (),
        *,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> tuple[FrozenProbe, History]:
        """A purified copy of an encoder with its head; see `purify_with_history`.

        Raises:
            DataError: a head that the method cannot work on.
        """
        classes = self.classes(model, clean)
        made = FrozenProbe(copied(model.encoder), copy.deepcopy(model.head))
        if self.idle:
            return made, {}
        check_labels(clean.labels, classes, clean.name)
        where = device_of(model.encoder.module) if device is None else torch.device(device)
        made.encoder.module.to(where)
        made.head.to(where)
        with torch.enable_grad():
            history = self.treat(made, Job(made.encoder, clean, seed, tuple(evidence), checkpoint))
        put_right(made.encoder.module)
        put_right(made.head)
        return FrozenProbe(marked(made.encoder, clean), made.head), history

    @abc.abstractmethod
    def classifier(self, encoder: Encoder, clean: Dataset, seed: Seed) -> Classifier:
        """The encoder with a head that was fitted on the images."""

    @abc.abstractmethod
    def classes(self, model: Classifier, clean: Dataset) -> int:
        """How many classes the head tells apart.

        Raises:
            DataError: a head that the method cannot work on.
        """

    @abc.abstractmethod
    def treat(self, model: FrozenProbe, job: Job) -> History:
        """Purify encoder and head in place; modes and flags are put right by the caller."""


@settings
class LabelledPurifier(TrainedPurifier, ClassifierPurifier):
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
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.01
    weight_decay: NonNegative = 5e-4
    precision: Literal["fp32", "bf16"] = "fp32"

    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 100, "batch_size": 32},
        "standard": {"epochs": 20, "batch_size": 128},
        "paper": {},
    }

    def classifier(self, encoder: Encoder, clean: Dataset, seed: Seed) -> FrozenProbe:
        """The encoder with the head of `linear_head`."""
        return FrozenProbe(encoder, linear_head(encoder, clean, self.head_l2))

    def classes(self, model: Classifier, clean: Dataset) -> int:
        """Outputs of the head.

        Raises:
            DataError: it is not one linear layer on the embedding.
        """
        head = model.head
        if isinstance(head, nn.Linear) and head.in_features == model.encoder.width:
            return head.out_features
        what = f"works on one linear layer on the embedding, the head is a {type(head).__name__}"
        raise DataError(self.title, what, "purify the encoder instead")

    def treat(self, model: FrozenProbe, job: Job) -> History:
        """Tune, in batches no larger than there are images."""
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(job.clean)))
        return recipe.tune(model, job.clean, job.seed, job.checkpoint)

    @abc.abstractmethod
    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Purify encoder and head in place. Modes and flags are put right by the caller."""


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

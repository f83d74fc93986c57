"""What all purifiers share: budgets, and verbs that work on a copy of the encoder and put it right afterwards."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from cupel.encoders import ImageEncoder
from cupel.implanting import inherited
from cupel.inference import device_of
from cupel.optimizers import Recipe
from cupel.protocols import Encoder, Learner
from cupel.seeds import Seed
from cupel.settings import Budgets, settings
from cupel.train import History, fit
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence

__all__ = ["BatchSize", "Job", "OptimizerName", "PurifierBase", "TrainedPurifier", "copied", "marked", "put_right"]

OptimizerName = Literal["adam", "adamw", "sgd", "lars", "lars_clip"]
"""Optimisers of `Recipe`."""
BatchSize = Annotated[int, Field(ge=2)]
"""Images per step where embeddings of a batch are compared."""


class Job(NamedTuple):
    """What a purifier gets to work on.

    Args:
        encoder: A copy of the given encoder, in eval mode, on the device; may be changed.
        clean: Images of its input size, presumably without trigger.
        seed: Of everything random.
        evidence: Triggers that a scanner inverted.
        checkpoint: File that keeps the state for a resume.
    """

    encoder: Encoder
    clean: Dataset
    seed: Seed
    evidence: Sequence[Evidence] = ()
    checkpoint: Path | None = None


class PurifierBase(Budgets, abc.ABC):
    """The verbs of a purifier; a method writes `work`."""

    title: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done: the copy is then the encoder as given, and no image is looked at."""
        return False

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
        """A purified copy of `model`, and what was measured on the way.

        A clean re-scan alone proves nothing: measure with the true trigger where it is known.

        Args:
            model: Left as it is, weights, modes and flags.
            clean: Images of its input size, presumably without trigger. Labels are read by methods that need them,
                and by no others.
            seed: Order, draws, initialisation.
            evidence: Triggers that a scanner inverted; used by the methods that say so.
            device: Where to work, and where the copy stays; None = where `model` is.
            checkpoint: File that keeps the state for a resume.

        Returns:
            The copy in eval mode, and the numbers of each step.

        Raises:
            DataError: images or evidence of another size, too few images, or images without labels that are needed.
            LabelsWithheld: labels that are needed are kept from purifiers.
            CupelError: the loss is not finite, or the embeddings collapse.
        """
        encoder = copied(model)
        encoder.module.to(device_of(model.module) if device is None else torch.device(device))
        if self.idle:
            return encoder, {}
        with torch.enable_grad():
            made, history = self.work(Job(encoder, clean, seed, tuple(evidence), checkpoint))
        put_right(made.module)
        return marked(made, clean), history

    @abc.abstractmethod
    def work(self, job: Job) -> tuple[Encoder, History]:
        """Purify `job.encoder`, in place or not; modes and flags are put right by the caller."""


@settings
class TrainedPurifier(Recipe, PurifierBase):
    """A purifier that trains; its settings are those of the training. Without steps the copy stays as given."""

    @property
    def idle(self) -> bool:
        """Whether there are no steps."""
        return self.steps == 0

    def trained(
        self,
        learner: Learner,
        clean: Dataset,
        seed: Seed,
        checkpoint: Path | None = None,
        recipe: Recipe | None = None,
    ) -> History:
        """Run `learner` with these settings or those of `recipe`, in batches no larger than there are images."""
        used = self if recipe is None else recipe
        used = dataclasses.replace(used, batch_size=min(used.batch_size, len(clean)))
        label, device = f"purify {self.title}", device_of(learner.state)
        return fit(learner, clean, used, seed, label=label, device=device, checkpoint=checkpoint)


def copied(model: Encoder) -> Encoder:
    """An independent copy in eval mode whose weights can be trained."""
    made = model.copy() if isinstance(model, ImageEncoder) else copy.deepcopy(model)
    made.module.eval().requires_grad_(True)
    return made


def marked(made: Encoder, images: Dataset) -> Encoder:
    """The encoder; one that was trained on images that an attack is known to have poisoned says so in its manifest."""
    if not isinstance(made, ImageEncoder) or images.manifest is None:
        return made
    manifest = inherited(made.card.manifest, images.manifest)
    return ImageEncoder(made.module, dataclasses.replace(made.card, manifest=manifest))


def put_right(module: nn.Module) -> None:
    """Eval mode, all weights trainable, no gradients."""
    module.eval().requires_grad_(True)
    module.zero_grad(set_to_none=True)

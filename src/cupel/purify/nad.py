"""NAD: the attention of a fine-tuned teacher is distilled into the backdoored student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cupel.encoders.blocks import block_outputs, blocks_of
from cupel.errors import DataError
from cupel.inference import FrozenProbe
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["NAD", "attention", "attention_distance"]


def attention(maps: Float[Tensor, "n channel height width"], power: float = 2.0) -> Float[Tensor, "n place"]:
    """Where a layer looks: A = Σ_c |F_c|^p over channels, scaled to ‖A‖₂ = 1 per image.

    Example:
        >>> attention(torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]]]]), 1.0).tolist()
        [[0.7071067690849304, 0.7071067690849304]]
    """
    return F.normalize(maps.abs().pow(power).sum(dim=1).flatten(1), dim=1, eps=1e-6)


def attention_distance(
    student: Float[Tensor, "n a height width"], teacher: Float[Tensor, "n b height width"], power: float = 2.0
) -> Float[Tensor, ""]:
    """Mean squared difference of two attentions, over images and places.

    It is 0 for equal layers and does not change when one of them is scaled by a positive number.

    Source: Li et al., NAD, ICLR 2021, equation 3, arXiv:2101.05930.
    Deviations: squared and averaged over places, as in the authors' code, to which the weights 500 and 1000 belong;
    the paper prints the norm.
    """
    return F.mse_loss(attention(student, power), attention(teacher, power))


@settings
class NAD(LabelledPurifier):
    """Neural attention distillation: L = CE + Σ_l β_l · distance of the attentions of student and teacher in block l.

    The teacher is a copy that was fine-tuned on the same images; the student starts from the model as given.

    Args:
        betas: β of the last blocks of the encoder, the one next to the embedding last. The defaults are for blocks of
            16 places and more; on four places (the last block for images of 16 pixels) a hundredth of them is enough.
        power: p of the attention.
        teacher_epochs: Passes over the images with which the teacher is made.

    See `LabelledPurifier` for the other settings.

    Source: Li et al., Neural Attention Distillation, ICLR 2021, arXiv:2101.05930; numbers as in BackdoorBench (Wu et
    al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: student and teacher see the same augmented images.
    """

    betas: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (500.0, 1000.0, 1000.0)
    power: Positive = 2.0
    teacher_epochs: PositiveInt = 10

    title: ClassVar[str] = "NAD"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 100, "batch_size": 32, "teacher_epochs": 3},
        "standard": {"epochs": 20, "batch_size": 128},
        "paper": {},
    }

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Make the teacher, then tune in place.

        Raises:
            DataError: the encoder has fewer blocks than there are β.
        """
        if (have := len(blocks_of(model.encoder.module))) < len(self.betas):
            what = f"{len(self.betas)} betas for an encoder of {have} blocks"
            raise DataError("nad", what, "give fewer `betas`")
        teacher = copy.deepcopy(model)
        brief = dataclasses.replace(self, epochs=self.teacher_epochs, steps=None)
        brief.trained(ClassifierLearner(brief, teacher, clean.labels), clean, seed.child("teacher"))
        return self.trained(NADLearner(self, model, teacher, clean.labels), clean, seed, checkpoint)


class NADLearner(ClassifierLearner):
    """Cross entropy and the distances of attentions.

    Args:
        settings: Of the method.
        model: The student.
        teacher: Frozen here.
        labels: Of the data set, by row.
    """

    def __init__(self, settings: NAD, model: FrozenProbe, teacher: FrozenProbe, labels: Tensor) -> None:
        super().__init__(settings, model, labels)
        self.nad, self.teacher = settings, teacher.encoder.module.eval().requires_grad_(False)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The sum, its two parts, and the accuracy on the batch."""
        x, y = self.shown(batch), self.wanted(batch)
        with self._watched(self.teacher) as theirs, torch.no_grad():
            self.teacher(x)
        with self._watched(self.model.encoder.module) as ours:
            logits = self.classifier(x)
        entropy = F.cross_entropy(logits, y)
        distance = torch.zeros_like(entropy)
        for beta, own, other in zip(self.nad.betas, ours, theirs, strict=True):
            distance = distance + beta * attention_distance(own[0].float(), other[0].float(), self.nad.power)
        parts = {"cross_entropy": entropy.detach(), "attention": distance.detach()}
        return entropy + distance, {**parts, "accuracy": share_right(logits, y)}

    @contextlib.contextmanager
    def _watched(self, module: torch.nn.Module) -> Iterator[list[list[Tensor]]]:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(block_outputs(module, i)) for i in range(-len(self.nad.betas), 0)]

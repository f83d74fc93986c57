"""Distillation: a student learns what a teacher says of unlabelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders import ENCODERS, Architecture, ImageEncoder
from cupel.errors import DataError, UsageError
from cupel.implanting import inherited
from cupel.inference import FrozenProbe, device_of, evaluating
from cupel.optimizers import Recipe
from cupel.protocols import Batch, Classifier
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, Positive, PositiveInt, parse, settings
from cupel.train import fit
from cupel.types import Dataset, Need

__all__ = ["Distil", "distillation_loss"]


def distillation_loss(
    student: Float[Tensor, "row class"], teacher: Float[Tensor, "row class"], temperature: float
) -> Float[Tensor, ""]:
    """Cross entropy between the softened outputs of two classifiers.

    L = −mean_i Σ_y P_T(y | x_i; τ) log P_S(y | x_i; τ),  P(y | x; τ) = exp(f(x)[y] / τ) / Σ_y' exp(f(x)[y'] / τ)

    Args:
        student, teacher: Logits of the same images; no gradient reaches the teacher's.
        temperature: τ > 0, the same for both.

    Returns:
        In nats; its least value is the teacher's entropy, not 0.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> round(float(distillation_loss(z, z, 1.0)), 4)
        0.6931

    Source: Chen et al., NeurIPS 2020, arXiv:2006.10029, eq. 2.
    Deviations: the mean over images where the paper writes a sum; no factor τ² (Hinton et al., 2015, have one).
    """
    targets = F.softmax(teacher.detach().float() / temperature, dim=1)
    return -(targets * F.log_softmax(student.float() / temperature, dim=1)).sum(1).mean()


@settings
class Distil(Recipe):
    """A student with a linear head, trained to give the teacher's softened outputs on unlabelled images.

    L = α · distillation loss + (1 − α) · cross entropy on the images that have a label

    Args:
        student: Architecture of the student; None = that of the teacher's encoder (self-distillation).
        temperature: τ > 0.
        alpha: Share of the distillation loss, in [0, 1]; 1 = labels are not looked at.
        augment: How an image is shown, to both; None = as it is.

    Source: Chen et al., Big Self-Supervised Models are Strong Semi-Supervised Learners, NeurIPS 2020, arXiv:2006.10029,
        section 2 and eq. 2 and 3, with random crops and flips alone; Hinton et al., arXiv:1503.02531.
    Deviations: steps, rates and the default temperature are our choice. The two terms are means, over all images of a
        batch and over its labelled ones, where the paper writes sums over two sets.
    """

    student: Annotated[Architecture, OneOf(ENCODERS)] | None = None
    temperature: Positive = 1.0
    alpha: Fraction = 1.0
    augment: SimCLRAugment | None = SimCLRAugment(jitter_probability=0.0, grayscale=0.0)

    epochs: PositiveInt = 20
    lr: Positive = 2e-3

    revision: ClassVar[int] = 1

    @property
    def needs(self) -> frozenset[Need]:
        """Labels where `alpha` is below 1."""
        return frozenset({"labels"}) if self.alpha < 1 else frozenset()

    def distil(
        self,
        teacher: Classifier,
        data: Dataset,
        seed: Seed,
        *,
        start: ImageEncoder | None = None,
        checkpoint: Path | None = None,
    ) -> FrozenProbe:
        """A classifier with an encoder of its own; the teacher stays as it is.

        A manifest of a backdoor, the teacher's or that of `start`, goes over to the student, as does that of poisoned
        images: nothing proves that the backdoor did not.

        Args:
            teacher: Any classifier of the images; used in eval mode.
            data: Images; labels are read only where `alpha` is below 1, and −1 = unlabelled.
            seed: Initialisation, order and views.
            start: Weights that the student begins with, copied; `teacher.encoder` for a self-distillation that goes on
                from the teacher. None = a fresh one.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: the teacher's architecture is unknown; images that the student cannot take; fewer than one batch;
                `alpha` is below 1 and no image has a label.
            UsageError: `student` and `start` are both given, or a label outside the teacher's classes.
            LabelsWithheld: `alpha` is below 1 and the labels are withheld.
        """
        device = device_of(teacher.encoder.module)
        own = self._student(teacher, start, seed.child("init"))
        own = ImageEncoder(own.module, replace(own.card, manifest=inherited(own.card.manifest, data.manifest)))
        side = own.input_size
        if tuple(data.inputs.shape[-2:]) != (side, side):
            got = "×".join(str(one) for one in data.inputs.shape[-2:])
            raise DataError(data.name, f"images are {got}, the student takes {side}×{side}", "choose another student")
        with evaluating(teacher.encoder.module), evaluating(teacher.head):
            with torch.no_grad():
                classes = teacher(torch.zeros(1, 3, side, side, device=device)).shape[1]
            labels = self._labels(data, classes)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed.child("head").value)
                head = nn.Linear(own.width, classes)
            own.module.to(device)
            learner = _Learner(self, teacher, own, head.to(device), labels)
            with torch.enable_grad():
                fit(learner, data, self, seed, label="distil", device=device, checkpoint=checkpoint)
        own.module.eval()
        return FrozenProbe(own, head.eval())

    def _student(self, teacher: Classifier, start: ImageEncoder | None, seed: Seed) -> ImageEncoder:
        taught = teacher.encoder
        manifest = taught.card.manifest if isinstance(taught, ImageEncoder) else None
        if start is not None:
            if self.student is not None:
                raise UsageError("distil", "is given both `student` and `start`", "leave one of them out")
            made = start.copy(manifest=manifest if manifest is not None else start.card.manifest)
            made.module.requires_grad_(True)
            return made
        architecture = self.student
        if architecture is None:
            if not isinstance(taught, ImageEncoder):
                what = f"cannot build another {type(taught).__name__}"
                raise DataError("distil", what, "name the architecture in `student`")
            architecture = parse(_Built, {"encoder": dict(taught.card.architecture)}, "card").encoder
        return architecture.build(seed).copy(manifest=manifest)

    def _labels(self, data: Dataset, classes: int) -> Tensor | None:
        if self.alpha == 1:
            return None
        labels = data.labels
        if not bool((labels != -1).any()):
            raise DataError(data.name, "no image has a label", "set `alpha` to 1, or label some")
        low, high = int(labels.min()), int(labels.max())
        if low < -1 or high >= classes:
            what = f"class index {low if low < -1 else high} is outside the teacher's {classes} classes"
            raise UsageError(data.name, what, f"labels run from 0 to {classes - 1}; -1 = unlabelled")
        return labels


@settings
class _Built:
    """How an architecture stands in a card."""

    encoder: Annotated[Architecture, OneOf(ENCODERS)]


class _Learner:
    """Student and head under the teacher's outputs; the teacher is no part of the state."""

    def __init__(
        self, settings: Distil, teacher: Classifier, encoder: ImageEncoder, head: nn.Linear, labels: Tensor | None
    ) -> None:
        self.settings, self.teacher, self.encoder, self.head = settings, teacher, encoder, head
        self.labels = None if labels is None else labels.to(head.weight.device)
        self.state = nn.ModuleDict({"encoder": encoder.module, "head": head}).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of student and head."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch, and the share of it on which student and teacher agree."""
        settings = self.settings
        if settings.augment is None:
            x = batch.inputs.float().div_(255).contiguous(memory_format=torch.channels_last)
        else:
            x = settings.augment(batch.inputs, batch.seed.child("augment").torch(batch.inputs.device))
        with torch.no_grad():
            said = self.teacher(x).float()
        logits = self.head(self.encoder(x)).float()
        loss = settings.alpha * distillation_loss(logits, said, settings.temperature)
        if self.labels is not None:
            y = self.labels[batch.rows.to(self.labels.device)]
            right = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum") / (y != -1).sum().clamp_min(1)
            loss = loss + (1 - settings.alpha) * right
        return loss, {"agreement": (logits.detach().argmax(1) == said.argmax(1)).float().mean()}

    def after_step(self) -> None:
        """Nothing."""

"""Tuning on clean labelled images: FT, LP, FE-tuning, FT-init and FST, which differ in the head and in one term."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cupel.inference import FrozenProbe
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.purify.batch_norm import BatchNorm
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = [
    "FST",
    "FT",
    "LP",
    "FETuning",
    "FTInit",
    "Tuning",
    "TuningLearner",
    "feature_shift",
    "project_norm",
    "redraw",
]


def feature_shift(weight: Float[Tensor, "classes width"], original: Float[Tensor, "classes width"]) -> Tensor:
    """⟨W, W_ori⟩ = Σ W ⊙ W_ori, which FST makes small: with ‖W‖ = ‖W_ori‖ = C it lies in [−C², C²].

    Example:
        >>> W = torch.tensor([[3.0, 4.0]])
        >>> float(feature_shift(W, -W))
        -25.0

    Source: Min et al., FST, NeurIPS 2023, equation 3, arXiv:2310.01875.
    """
    return (weight * original).sum()


@torch.no_grad()
def project_norm(weight: Tensor, norm: Tensor) -> None:
    """W ← C · W / ‖W‖_F, in place."""
    weight.mul_(norm / torch.linalg.vector_norm(weight).clamp_min(torch.finfo(weight.dtype).tiny))


@torch.no_grad()
def redraw(head: nn.Linear, seed: Seed) -> None:
    """New weights and biases, uniform in ±1/√width, in place."""
    generator = seed.torch()
    for part in (head.weight, head.bias):
        bound = head.in_features**-0.5
        part.copy_((2 * torch.rand(part.shape, generator=generator) - 1) * bound)


@settings
class Tuning(LabelledPurifier):
    """Settings of the five; each says in class variables what becomes of the head and whether the encoder is trained.

    Args:
        project: After each step scale the head's weight to the length that the original head's had.

    Source: Min, Qin, Shen, Cheng, Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023,
    arXiv:2310.01875. The defaults are those for CIFAR-10.
    Deviations: the authors' code scales the head in all five, which `project` repeats; the cosine falls by step, not
    by epoch. On encoders the head is fitted first, and thrown away afterwards.
    """

    project: bool = False
    batch_norm: BatchNorm = "train"

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 128
    weight_decay: NonNegative = 0.0

    fresh_head: ClassVar[bool] = False
    trains_head: ClassVar[bool] = True
    trains_backbone: ClassVar[bool] = True
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 100, "batch_size": 32},
        "standard": {"batch_size": 32},
        "paper": {},
    }

    def shift_weight(self, square: float) -> float:
        """α of the shift term, for an original head with ‖W‖² = `square`; 0 in all but FST."""
        return 0.0

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Tune in place; the history has `cross_entropy`, `shift` = α⟨W, W_ori⟩ and `head_cosine` = cos(W, W_ori)."""
        return self.trained(TuningLearner(self, model, clean.labels, seed), clean, seed, checkpoint)


@settings
class FT(Tuning):
    """Fine-tuning: head and encoder go on from where they are.

    See `Tuning` for the settings.

    Source: Min et al., FST, NeurIPS 2023, arXiv:2310.01875.
    Deviations: those of `Tuning`.
    """

    title: ClassVar[str] = "FT"
    revision: ClassVar[int] = 1


@settings
class LP(Tuning):
    """Linear probing: the head goes on from where it is, the encoder stays.

    For an encoder this is the row "nothing but a new head": what comes out is what was put in.

    Source: Min et al., FST, NeurIPS 2023, arXiv:2310.01875.
    Deviations: those of `Tuning`. With `batch_norm: train` the encoder's statistics move, as they do in the authors'
    code.
    """

    batch_norm: BatchNorm = "frozen"

    title: ClassVar[str] = "LP"
    revision: ClassVar[int] = 1
    trains_backbone: ClassVar[bool] = False


@settings
class FETuning(Tuning):
    """Feature tuning: a new random head that stays as it is; the encoder must follow it.

    See `Tuning` for the settings.

    Source: Min et al., FST, NeurIPS 2023, arXiv:2310.01875.
    Deviations: those of `Tuning`.
    """

    title: ClassVar[str] = "FE-tuning"
    revision: ClassVar[int] = 1
    fresh_head: ClassVar[bool] = True
    trains_head: ClassVar[bool] = False


@settings
class FTInit(Tuning):
    """Fine-tuning with a new random head.

    See `Tuning` for the settings.

    Source: Min et al., FST, NeurIPS 2023, arXiv:2310.01875.
    Deviations: those of `Tuning`.
    """

    title: ClassVar[str] = "FT-init"
    revision: ClassVar[int] = 1
    fresh_head: ClassVar[bool] = True


@settings
class FST(Tuning):
    """Feature shift tuning: a new head that is driven away from the original one, so that features must move too.

    min over θ, W of CE(φ_θ(x) Wᵀ + b, y) + α ⟨W, W_ori⟩, subject to ‖W‖_F = ‖W_ori‖_F =: C

    The term is bounded below by −α C², and how strong it is goes with C²: where there are many classes, α must be
    small (0.001 for 100 or 200 of them, 0.1 for 43). Heads of self-supervised encoders may be many times as long as
    the published ones; left as it is, α then ruins the encoder.

    Args:
        alpha: α ≥ 0.
        head_square: The C² that α is meant for: α is multiplied by `head_square` / C². None = α as it is.
        project: Keep ‖W‖_F = C; without it and with α > 0 the term falls without bound.

    See `Tuning` for the other settings.

    Source: Min, Qin, Shen, Cheng, Towards Stable Backdoor Purification through Feature Shift Tuning, NeurIPS 2023,
    arXiv:2310.01875.
    Deviations: those of `Tuning`; and `head_square`, which all budgets but `paper` set to 2.83: in a published run at
    α = 0.1 the term ended at −0.283.
    """

    alpha: NonNegative = 0.2
    head_square: Positive | None = None
    project: bool = True

    title: ClassVar[str] = "FST"
    revision: ClassVar[int] = 1
    fresh_head: ClassVar[bool] = True
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {**Tuning.budgets["smoke"], "head_square": 2.83},
        "standard": {**Tuning.budgets["standard"], "head_square": 2.83},
        "paper": {},
    }

    def shift_weight(self, square: float) -> float:
        """α, measured by `head_square`."""
        return self.alpha if self.head_square is None else self.alpha * self.head_square / max(square, 1e-12)


class TuningLearner(ClassifierLearner):
    """Cross entropy + α⟨W, W_ori⟩, with the head's length projected after each step.

    Args:
        settings: Of the method.
        model: Trained in place; its head is the original one.
        labels: Of the data set, by row.
        seed: Of the new head.
    """

    def __init__(self, settings: Tuning, model: FrozenProbe, labels: Tensor, seed: Seed) -> None:
        super().__init__(settings, model, labels, backbone=settings.trains_backbone, head=settings.trains_head)
        assert isinstance(model.head, nn.Linear)
        self.head, self.tuning = model.head, settings
        self.original = self.head.weight.detach().clone()
        self.norm = torch.linalg.vector_norm(self.original)
        self.weight = settings.shift_weight(float(self.norm) ** 2)
        if settings.fresh_head:
            redraw(self.head, seed.child("head"))

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The sum, its two parts, cos(W, W_ori) and the accuracy on the batch."""
        logits, y = self.classifier(self.shown(batch)), self.wanted(batch)
        entropy = F.cross_entropy(logits, y)
        shift = self.weight * feature_shift(self.head.weight, self.original)
        with torch.no_grad():
            cosine = F.cosine_similarity(self.head.weight.flatten(), self.original.flatten(), dim=0)
        parts = {"cross_entropy": entropy.detach(), "shift": shift.detach(), "head_cosine": cosine}
        return entropy + shift, {**parts, "accuracy": share_right(logits, y)}

    def after_step(self) -> None:
        """Project."""
        if self.tuning.project:
            project_norm(self.head.weight, self.norm)

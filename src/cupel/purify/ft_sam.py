"""FT-SAM: fine-tuning with sharpness-aware steps, which move the neurons a backdoor lives in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from cupel.inference import FrozenProbe
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.purify.batch_norm import BatchNorm
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier
from cupel.purify.sharpness import sharp_loss
from cupel.seeds import Seed
from cupel.settings import Fraction, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["FTSAM"]


@settings
class FTSAM(LabelledPurifier):
    """Fine-tunes encoder and head with adaptive SAM.

    Args:
        rho: ρ ≥ 0, radius of the neighbourhood; 2 for CIFAR-10, 8 for GTSRB and Tiny-ImageNet. With 0 it is plain
            fine-tuning. These numbers are for `batch_norm: train`, where the batch's statistics take back what e does
            to the scale of a layer; on stored statistics a tenth of them is enough, and 2 can diverge.
        adaptive: Scale the neighbourhood with the weights (ASAM); False = SAM.
        label_smoothing: Of the cross entropy.

    See `LabelledPurifier` for the other settings.

    Source: Zhu et al., Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization, ICCV 2023,
    arXiv:2304.11823; numbers as in BackdoorBench (Wu et al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: the cosine reaches 0 at the end of training, where BackdoorBench's schedule, meant for epochs, is moved
    by each batch; only the first of the two passes moves BatchNorm's statistics.
    """

    rho: NonNegative = 2.0
    adaptive: bool = True
    label_smoothing: Fraction = 0.1
    batch_norm: BatchNorm = "train"

    title: ClassVar[str] = "FT-SAM"
    revision: ClassVar[int] = 1

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Tune in place."""
        return self.trained(_Learner(self, model, clean.labels), clean, seed, checkpoint)


class _Learner(ClassifierLearner):
    """Cross entropy at the worst point nearby."""

    def __init__(self, settings: FTSAM, model: FrozenProbe, labels: Tensor) -> None:
        super().__init__(settings, model, labels)
        self.sam = settings

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss there, and the accuracy on the batch where the weights are."""
        y, s = self.wanted(batch), self.sam

        def entropy(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, y, label_smoothing=s.label_smoothing)

        at_worst, logits = sharp_loss(self.classifier, self.shown(batch), entropy, s.rho, adaptive=s.adaptive)
        return at_worst, {"accuracy": share_right(logits, y)}

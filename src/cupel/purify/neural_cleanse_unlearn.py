"""Neural Cleanse, unlearning: fine-tuning on images that carry the reversed trigger and keep their true labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cupel.inference import FrozenProbe
from cupel.protocols import Batch
from cupel.purify.base import OptimizerName, TrainedPurifier
from cupel.purify.batch_norm import BatchNorm, set_batch_norm
from cupel.purify.neural_cleanse import Mitigation
from cupel.purify.reversed_trigger import ReversedTriggers
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["NeuralCleanseUnlearn"]


@settings
class NeuralCleanseUnlearn(TrainedPurifier, Mitigation):
    """Fine-tunes encoder and head on labelled images, a share of which carries the reversed trigger.

    Args:
        stamped: Share of the images that carry the trigger, with their true labels; chosen once.
        batch_norm: `eval_affine` = BatchNorm runs on its stored statistics, its affine part is trained; `frozen` = that
            is fixed too; `train` = statistics of the batch, stamped images included, as in the authors' code.

    See `Mitigation` for the other settings; the probe is trained along.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-C.
    Deviations: for encoders, with a probe as classifier; 10 epochs at 0.01 where the paper has one over a tenth of the
    training data; the choice of `batch_norm`.
    """

    stamped: Fraction = 0.2
    batch_norm: BatchNorm = "eval_affine"

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.01
    precision: Literal["fp32", "bf16"] = "fp32"

    title: ClassVar[str] = "Neural Cleanse, unlearning"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"epochs": 3},
        "standard": Mitigation.budgets["standard"],
        "paper": {**Mitigation.budgets["paper"], "epochs": 1, "batch_norm": "train"},
    }

    def mitigate(
        self, model: FrozenProbe, triggers: ReversedTriggers, clean: Dataset, seed: Seed, checkpoint: Path | None
    ) -> History:
        """Tune, in batches no larger than there are images."""
        learner = _Learner(self, model, clean, triggers, seed.child("stamped"))
        return self.trained(learner, clean, seed, checkpoint)


class _Learner:
    """Cross entropy on images some of which bear the trigger."""

    def __init__(
        self,
        settings: NeuralCleanseUnlearn,
        model: FrozenProbe,
        clean: Dataset,
        triggers: ReversedTriggers,
        seed: Seed,
    ) -> None:
        self.model, self.triggers = model, triggers
        self.labels = clean.labels.to(triggers.masks.device)
        self.bears = torch.zeros(len(clean), dtype=torch.bool)
        self.bears[torch.randperm(len(clean), generator=seed.torch())[: round(settings.stamped * len(clean))]] = True
        self.state: nn.Module = nn.ModuleDict({"encoder": model.encoder.module, "head": model.head})
        self.state.requires_grad_(True)
        set_batch_norm(model.encoder.module, settings.batch_norm)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.state.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy, and the accuracy on plain and on stamped images of the batch."""
        x, bears = batch.inputs.float().div_(255), self.bears[batch.rows].to(batch.inputs.device)
        x = torch.where(bears[:, None, None, None], self.triggers.on(x), x)
        y = self.labels[batch.rows.to(self.labels.device)]
        logits = self.model.head(self.model.encoder(x.contiguous(memory_format=torch.channels_last)).float())
        right = (logits.argmax(1) == y).float()
        return cross_entropy(logits, y), {"accuracy": right.mean()}

    def after_step(self) -> None:
        """Nothing."""

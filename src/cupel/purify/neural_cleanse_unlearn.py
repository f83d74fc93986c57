"""Neural Cleanse, unlearning: fine-tuning on images that carry the reversed trigger and keep their true labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cupel.encoders import ImageEncoder
from cupel.errors import UsageError, did_you_mean
from cupel.inference import device_of
from cupel.inversion.classwise import ClassSearch
from cupel.metrics import check_labels
from cupel.optimizers import NonNegative, Recipe
from cupel.probe import PROBES, Linear
from cupel.protocols import Batch, Encoder, Probe
from cupel.purify.reversed_trigger import ReversedTriggers, reversed_triggers
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, Positive, PositiveInt, settings
from cupel.train import History, fit
from cupel.types import Dataset, Evidence, Need

__all__ = ["NeuralCleanseUnlearn"]

_SEARCH = ClassSearch(steps=60, images_per_step=128)


@settings
class NeuralCleanseUnlearn(Recipe):
    """Fine-tunes encoder and head on labelled images, a share of which carries the reversed trigger.

    Args:
        probe: Head that is fitted first and then trained along; it is thrown away afterwards.
        stamped: Share of the images that carry the trigger, with their true labels; chosen once.
        num_triggers: Reversed triggers used, smallest first.
        search: How they are searched for where no scanner gives any.
        bn: `eval_affine` = BatchNorm runs on its stored statistics, its affine part is trained; `frozen` = that is
            fixed too; `train` = statistics of the batch, stamped images included, as in the authors' code.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-C.
    Deviations: for encoders, with a probe as classifier; 10 epochs at 0.01 where the paper has one over a tenth of the
    training data; the choice of `bn`.
    """

    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    stamped: Fraction = 0.2
    num_triggers: PositiveInt = 1
    search: ClassSearch = _SEARCH
    bn: Literal["frozen", "eval_affine", "train"] = "eval_affine"

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 32
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    weight_decay: NonNegative = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    steps: Annotated[int, Field(ge=0)] | None = None

    title: ClassVar[str] = "Neural Cleanse, unlearning"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, budget: str) -> NeuralCleanseUnlearn:
        """Settings of a budget: `smoke`, `standard`, `paper` (one epoch, BatchNorm in training).

        Raises:
            UsageError: no such budget.

        Example:
            >>> NeuralCleanseUnlearn.preset("paper").epochs
            1
        """
        if budget == "smoke":
            return cls(epochs=3)
        if budget == "standard":
            return cls(search=ClassSearch(steps=150, images_per_step=256))
        if budget == "paper":
            return cls(epochs=1, bn="train", search=ClassSearch())
        raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, ("smoke", "standard", "paper")))

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
        checkpoint: Path | None = None,
    ) -> tuple[Encoder, History]:
        """A purified copy of `model`, and what the loss did.

        Args:
            model: Left as it is.
            clean: Labelled images of its input size, presumably without trigger.
            seed: Head, search, choice of stamped images, order.
            evidence: Triggers that a scanner inverted; those that did not converge are left out.
            checkpoint: File that keeps the state for a resume.

        Raises:
            DataError: images without labels or of another size, fewer than a batch; evidence of another size; no
                trigger was found.
            LabelsWithheld: labels are kept from purifiers.
            CupelError: the loss is not finite.
        """
        encoder = model.copy() if isinstance(model, ImageEncoder) else copy.deepcopy(model)
        encoder.module.eval()
        if self.total_steps(len(clean), clean.name) == 0:
            return encoder, {}
        check_labels(clean.labels, clean.num_classes, clean.name)
        classifier = self.probe.fit(encoder, clean, seed.child("probe"))
        encoder, head = classifier.encoder, copy.deepcopy(classifier.head)
        triggers = reversed_triggers(
            encoder, head, clean, evidence, self.search, self.num_triggers, seed.child("search")
        )
        learner = _Learner(self, encoder, head, clean, triggers, seed.child("stamped"))
        device = device_of(encoder.module)
        with torch.enable_grad():
            label = "purify neural_cleanse_unlearn"
            history = fit(learner, clean, self, seed, label=label, device=device, checkpoint=checkpoint)
        encoder.module.eval().requires_grad_(True)
        return encoder, history


class _Learner:
    """Cross entropy on images some of which bear the trigger."""

    def __init__(
        self,
        settings: NeuralCleanseUnlearn,
        encoder: Encoder,
        head: nn.Module,
        clean: Dataset,
        triggers: ReversedTriggers,
        seed: Seed,
    ) -> None:
        self.encoder, self.head, self.triggers = encoder, head, triggers
        self.labels = clean.labels.to(triggers.masks.device)
        self.bears = torch.zeros(len(clean), dtype=torch.bool)
        self.bears[torch.randperm(len(clean), generator=seed.torch())[: round(settings.stamped * len(clean))]] = True
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "head": head})
        encoder.module.requires_grad_(True)
        head.requires_grad_(True)
        for part in encoder.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.train(settings.bn == "train")
                part.requires_grad_(settings.bn != "frozen")

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.state.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy, and the accuracy on plain and on stamped images of the batch."""
        x, bears = batch.inputs.float().div_(255), self.bears[batch.rows].to(batch.inputs.device)
        x = torch.where(bears[:, None, None, None], self.triggers.on(x), x)
        y = self.labels[batch.rows.to(self.labels.device)]
        logits = self.head(self.encoder(x.contiguous(memory_format=torch.channels_last)).float())
        right = (logits.argmax(1) == y).float()
        return cross_entropy(logits, y), {"accuracy": right.mean()}

    def after_step(self) -> None:
        """Nothing."""

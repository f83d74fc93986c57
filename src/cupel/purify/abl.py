"""ABL: a model is trained anew; what it learns suspiciously fast is set aside, and unlearned at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.encoders import ENCODERS, Architecture, ImageEncoder
from cupel.errors import DataError
from cupel.inference import FrozenProbe, features
from cupel.optimizers import NonNegative
from cupel.progress import say
from cupel.protocols import Batch
from cupel.purify.batch_norm import BatchNorm
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier
from cupel.purify.tuning import redraw
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, Positive, PositiveInt, parse, settings
from cupel.train import History
from cupel.types import Dataset, Need

__all__ = ["ABL", "held_at", "lowest"]

Gate = Literal["flooding", "local_gradient_ascent"]


def held_at(loss: Float[Tensor, ""], gamma: float, gate: Gate) -> Float[Tensor, ""]:
    """A loss that does not stay below γ: |ℓ − γ| + γ (flooding), or sign(ℓ − γ) · ℓ (local gradient ascent).

    Above γ the gradient is that of ℓ, below its negative.

    Source: Li et al., ABL, NeurIPS 2021, equation 3, arXiv:2110.11571; Ishida et al., ICML 2020, arXiv:2002.08709.
    """
    return (loss - gamma).abs() + gamma if gate == "flooding" else torch.sign(loss.detach() - gamma) * loss


def lowest(losses: Float[Tensor, " n"], share: float) -> Int[Tensor, " k"]:
    """Rows of the ⌊share · n⌋ lowest losses, ascending.

    Example:
        >>> lowest(torch.tensor([3.0, 1.0, 2.0, 0.0]), 0.5).tolist()
        [1, 3]
    """
    count = int(share * len(losses) + 1e-9)
    return losses.argsort(stable=True)[:count].sort().values


@settings
class ABL(LabelledPurifier):
    """Anti-backdoor learning, on the **poisoned training data**: what comes out was trained anew from random weights.

    1. Train with a loss that is held at γ, and set the images of lowest loss aside: backdoors are learned first.
    2. Train on the others.
    3. Unlearn: gradient ascent on those that were set aside.

    Args:
        gate: How the loss is held at γ; see `held_at`.
        gamma: γ.
        isolation_epochs: Passes of step 1.
        isolated: Share of the images that is set aside, rounded down.
        unlearning_epochs, unlearning_lr: Of step 3, whose rate is constant.

    See `LabelledPurifier` for the other settings, which are those of step 2; steps 1 and 2 share them but for the
    length.

    Source: Li et al., Anti-Backdoor Learning, NeurIPS 2021, arXiv:2110.11571; numbers as in BackdoorBench (Wu et al.,
    NeurIPS 2022, arXiv:2206.12654).
    Deviations: the learning rate falls along a cosine in steps 1 and 2, not in stages; a resume repeats step 1.
    """

    gate: Gate = "flooding"
    gamma: NonNegative = 0.5
    isolation_epochs: PositiveInt = 20
    isolated: Fraction = 0.01
    unlearning_epochs: PositiveInt = 20
    unlearning_lr: Positive = 5e-4
    batch_norm: BatchNorm = "train"

    epochs: PositiveInt = 60
    batch_size: PositiveInt = 128
    lr: Positive = 0.1

    title: ClassVar[str] = "ABL"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "train_set"})
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"isolation_epochs": 5, "epochs": 10, "unlearning_epochs": 5, "batch_size": 64},
        "standard": {"isolation_epochs": 10, "epochs": 30},
        "paper": {},
    }

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Train anew in place; the history has the loss of each step and the rows set aside as `isolated`.

        Raises:
            DataError: the encoder does not say how it was built.
        """
        _reset(model, seed.child("init"))
        first = dataclasses.replace(self, epochs=self.isolation_epochs, steps=None)
        before = first.trained(_Held(self, model, clean.labels), clean, seed.child("isolate"))
        rows = lowest(_losses(model, clean), self.isolated)
        others = torch.ones(len(clean), dtype=torch.bool)
        others[rows] = False
        rest = clean.subset(others)
        history = self.trained(ClassifierLearner(self, model, rest.labels), rest, seed, checkpoint)
        made = {f"isolating_{name}": values for name, values in before.items()} | history
        made["isolated"] = [float(row) for row in rows]
        if not len(rows):
            say(f"  abl: {self.isolated:g} of {len(clean)} images is none, nothing is unlearned")
            return made
        last = dataclasses.replace(
            self, epochs=self.unlearning_epochs, steps=None, lr=self.unlearning_lr, schedule="constant"
        )
        aside = clean.subset(rows, f"{clean.name}, set aside")
        after = last.trained(_Ascent(self, model, aside.labels), aside, seed.child("unlearn"))
        return made | {f"unlearning_{name}": values for name, values in after.items()}


@settings
class _Built:
    """How the architecture stands in a card."""

    encoder: Annotated[Architecture, OneOf(ENCODERS)]


def _reset(model: FrozenProbe, seed: Seed) -> None:
    """Fresh weights for encoder and head, in place."""
    encoder = model.encoder
    if not isinstance(encoder, ImageEncoder) or not encoder.card.architecture:
        raise DataError("abl", "trains a model anew, and the encoder does not say how it was built", "give it a card")
    built = parse(_Built, {"encoder": dict(encoder.card.architecture)}, "card").encoder
    encoder.module.load_state_dict(built.build(seed).module.state_dict())
    assert isinstance(model.head, nn.Linear)
    redraw(model.head, seed.child("head"))


@torch.no_grad()
def _losses(model: FrozenProbe, data: Dataset) -> Tensor:
    """Cross entropy of each image, on the CPU."""
    logits = model.head(features(model.encoder, data, dtype=torch.float32, store=False))
    return F.cross_entropy(logits, data.labels.to(logits.device), reduction="none").cpu()


class _Held(ClassifierLearner):
    """Cross entropy that is held at γ."""

    def __init__(self, settings: ABL, model: FrozenProbe, labels: Tensor) -> None:
        super().__init__(settings, model, labels)
        self.abl = settings

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """It, and the accuracy on the batch."""
        logits, y = self.classifier(self.shown(batch)), self.wanted(batch)
        entropy = F.cross_entropy(logits, y)
        parts = {"cross_entropy": entropy.detach(), "accuracy": share_right(logits, y)}
        return held_at(entropy, self.abl.gamma, self.abl.gate), parts


class _Ascent(ClassifierLearner):
    """The negative cross entropy."""

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """It, and the accuracy on the batch."""
        loss, parts = super().loss(batch)
        return -loss, parts

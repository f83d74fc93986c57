"""Fine-Pruning: dimensions that sleep on clean images are pruned, then the rest is fine-tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from cupel.inference import FrozenProbe, classify, features
from cupel.purify.classifier_learner import ClassifierLearner
from cupel.purify.labelled import LabelledPurifier, split_off
from cupel.purify.silencing import silence
from cupel.seeds import Seed
from cupel.settings import Fraction, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["FinePruning", "dormant"]

_CHECKED = 32  # images on which silencing is checked


@settings
class FinePruning(LabelledPurifier):
    """Prunes the dimensions of the embedding that clean images use least, then fine-tunes encoder and head.

    Args:
        once: Share of the dimensions that is pruned at a time, rounded up.
        drop: Relative loss of held-out accuracy at which pruning ends; the step that reaches it is not taken.
        held_out: Share of the images that decides when to stop and nothing else.

    See `LabelledPurifier` for the other settings.

    Source: Liu, Dolan-Gavitt, Garg, Fine-Pruning, RAID 2018, arXiv:1805.12185; numbers as in BackdoorBench (Wu et al.,
    NeurIPS 2022, arXiv:2206.12654).
    Deviations: BackdoorBench stops by the test accuracy and keeps the step that was one too many; the dimensions stay
    zero while the rest is tuned.
    """

    once: Annotated[float, Field(gt=0, le=1)] = 0.01
    drop: Fraction = 0.1
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2

    title: ClassVar[str] = "Fine-Pruning"
    revision: ClassVar[int] = 1

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Prune and tune in place; the history has the held-out accuracy of each pruning step as `held_out`.

        Raises:
            DataError: an architecture whose dimensions cannot be pruned, or one image.
        """
        rest, held = split_off(clean, self.held_out, seed.child("held out"))
        activation = features(model.encoder, rest, dtype=torch.float32, store=False).mean(dim=0)
        embeddings = features(model.encoder, held, dtype=torch.float32, store=False)
        gone, accuracies = dormant(activation, embeddings, held.labels, model.head, self.once, self.drop)
        images = rest.inputs[torch.arange(min(len(rest), _CHECKED))]
        again = silence(model.encoder, gone.nonzero().flatten(), images, "fine_pruning")
        history = self.trained(_Learner(self, model, rest.labels, again), rest, seed, checkpoint)
        return {**history, "held_out": accuracies}


@torch.no_grad()
def dormant(
    activation: Float[Tensor, " width"],
    embeddings: Float[Tensor, "n width"],
    labels: Int[Tensor, " n"],
    head: nn.Module,
    once: float,
    drop: float,
) -> tuple[Bool[Tensor, " width"], list[float]]:
    """Which dimensions to prune: the least active first, while (a₀ − a) / a₀ < `drop`.

    Args:
        activation: Mean activation of each dimension on clean images.
        embeddings, labels: Held-out images, for the accuracy a.
        head: On the embeddings.
        once, drop: As in `FinePruning`.

    Returns:
        The last mask that was accepted, True = prune, and the accuracies: a₀, then after each step.
    """
    width = len(activation)
    order, count = activation.argsort(stable=True), math.ceil(once * width)
    y = labels.cpu()

    def right(gone: Tensor) -> float:
        return float((classify(head, embeddings.masked_fill(gone, 0)) == y).float().mean())

    accepted = torch.zeros(width, dtype=torch.bool, device=activation.device)
    accuracies = [right(accepted)]
    for end in range(count, width, count):  # never all of them
        tried = accepted.clone()
        tried[order[:end]] = True
        accuracies.append(right(tried))
        if accuracies[0] - accuracies[-1] >= drop * accuracies[0]:
            break
        accepted = tried
    return accepted, accuracies


class _Learner(ClassifierLearner):
    """Cross entropy, with the pruned dimensions kept at zero."""

    def __init__(self, settings: FinePruning, model: FrozenProbe, labels: Tensor, again: Callable[[], None]) -> None:
        super().__init__(settings, model, labels)
        self.again = again

    def after_step(self) -> None:
        """Prune again."""
        self.again()

"""Neural Cleanse, pruning: the dimensions of the embedding that the reversed trigger excites are silenced."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.inference import FrozenProbe, classify, features
from cupel.protocols import Encoder
from cupel.purify.neural_cleanse import Mitigation
from cupel.purify.reversed_trigger import ReversedTriggers
from cupel.purify.silencing import silence
from cupel.seeds import Seed
from cupel.settings import Fraction, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["NeuralCleansePrune", "pruning_order"]


@settings
class NeuralCleansePrune(Mitigation):
    """Silences the dimensions of the embedding that the reversed trigger raises most, until it no longer works.

    Dimensions are ranked by the mean difference of their activation on triggered and on clean images, and set to zero
    from the top. The trigger no longer works when at most `success` of the images that were not of its class before are
    still taken for it; the head stays as it was fitted.

    Args:
        success: Share of triggered images at which pruning ends.
        most: Share of the dimensions that are pruned at most.
        num_triggers: Reversed triggers, smallest first; each has its own ranking and is pruned in turn.

    See `Mitigation` for the other settings.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-B.
    Deviations: the embedding is taken as the penultimate layer of encoder and head; `success` and `most` are our
    choice, for the paper says "until the model is no longer responsive to the reversed trigger".
    """

    success: Fraction = 0.1
    most: Fraction = 0.5

    title: ClassVar[str] = "Neural Cleanse, pruning"
    revision: ClassVar[int] = 1

    def mitigate(
        self, model: FrozenProbe, triggers: ReversedTriggers, clean: Dataset, seed: Seed, checkpoint: Path | None
    ) -> History:
        """Prune; the history has success of the trigger and clean accuracy after each dimension.

        Raises:
            DataError: an architecture whose dimensions cannot be silenced.
        """
        encoder, head = model.encoder, model.head
        images = clean.inputs[torch.arange(len(clean))].to(triggers.masks.device)
        plain = features(encoder, images, dtype=torch.float32, store=False)
        keep = torch.ones(plain.shape[1], device=plain.device)
        history: History = {"success": [], "accuracy": []}
        for mask, pattern in zip(triggers.masks, triggers.patterns, strict=True):
            one = ReversedTriggers(mask[None], pattern[None])
            hit = torch.cat([encoder_pass(encoder, one.on(some)) for some in torch.split(images.float() / 255, 256)])
            self._prune(head, plain, hit, clean.labels, keep, history)
        silence(encoder, (keep == 0).nonzero().flatten(), images[:32], "neural_cleanse_prune")
        return history

    def _prune(
        self, head: nn.Module, plain: Tensor, hit: Tensor, labels: Tensor, keep: Tensor, history: History
    ) -> None:
        """Set entries of `keep` to 0, one after the other."""
        before, after = classify(head, plain * keep), classify(head, hit * keep)
        target = int(after.mode().values)
        others = before != target
        limit = round(self.most * len(keep))
        for dim in pruning_order(plain, hit).tolist():
            if int((keep == 0).sum()) >= limit:
                return
            keep[dim] = 0
            now, right = classify(head, (hit * keep)[others]), classify(head, plain * keep)
            history["success"].append(float((now == target).float().mean()) if bool(others.any()) else 0.0)
            history["accuracy"].append(float((right == labels).float().mean()))
            if history["success"][-1] <= self.success:
                return


def pruning_order(
    plain: Float[Tensor, "n width"], triggered: Float[Tensor, "n width"]
) -> Int[Tensor, " width"]:  # fmt: skip
    """Dimensions by how much the trigger raises them, most first; ties by number.

    Example:
        >>> pruning_order(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 3.0]])).tolist()
        [2, 0, 1]
    """
    return (triggered - plain).mean(dim=0).argsort(descending=True, stable=True)


@torch.no_grad()
def encoder_pass(encoder: Encoder, x: Tensor) -> Tensor:
    """Embeddings of images in [0, 1], float32."""
    return encoder(x.contiguous(memory_format=torch.channels_last)).float()

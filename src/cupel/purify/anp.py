"""ANP: channels that are sensitive to adversarial noise on their weights are pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from cupel.errors import DataError
from cupel.inference import FrozenProbe
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.purify.batch_norm import BatchNorm, batch_norms, statistics_kept
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier, accuracy_of, split_off
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["ANP", "ANPLearner", "prune_below"]

_THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(19))


@settings
class ANP(LabelledPurifier):
    """Adversarial neuron pruning: a mask per BatchNorm channel is learned under noise on the channel, then thresholded.

    1. min over m in [0, 1] of α L(m ⊙ γ, β) + (1 − α) max over |δ|, |ξ| ≤ ε of L((m + δ) ⊙ γ, (1 + ξ) ⊙ β)
    2. γ = 0 in channels with m below a threshold: the largest one at which accuracy on held-out images falls by no more
       than `drop`.

    Weights are not trained.

    Args:
        epsilon: ε ≥ 0.
        noise_steps: Sign-gradient steps of the ascent, each of ε / steps, from zero.
        natural: α, weight of the loss without noise.
        thresholds: From which the threshold is taken.
        drop: Loss of held-out accuracy that is put up with, in [0, 1].
        held_out: Share of the images that chooses the threshold and nothing else.
        batch_norm: `frozen` and `eval_affine` are the same here.

    See `LabelledPurifier` for the other settings.

    Source: Wu and Wang, Adversarial Neuron Pruning, NeurIPS 2021, arXiv:2110.14430; numbers as in BackdoorBench (Wu et
    al., NeurIPS 2022, arXiv:2206.12654).
    Deviations: BackdoorBench chooses the threshold on the test images; noise starts at zero and is cut at ±ε.
    """

    epsilon: NonNegative = 0.4
    noise_steps: PositiveInt = 1
    natural: Fraction = 0.2
    thresholds: Annotated[tuple[Fraction, ...], Field(min_length=1)] = _THRESHOLDS
    drop: Fraction = 0.05
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    batch_norm: BatchNorm = "frozen"

    steps: Annotated[int, Field(ge=0)] | None = 2000
    lr: Positive = 0.01
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    title: ClassVar[str] = "ANP"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 150, "batch_size": 32, "lr": 0.1},
        "standard": {"steps": 500, "batch_size": 128, "lr": 0.05},
        "paper": {},
    }

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Learn masks, then prune in place; the history has the accuracy of each threshold as `held_out`.

        Raises:
            DataError: the encoder has no BatchNorm with an affine part, or there is one image.
        """
        rest, held = split_off(clean, self.held_out, seed.child("held out"))
        learner = ANPLearner(self, model, rest.labels)
        history = self.trained(learner, rest, seed, checkpoint)
        masks, before = {name: mask.detach() for name, mask in learner.masks.items()}, accuracy_of(model, held)
        norms = learner.norms
        scales = {name: norm.weight.detach().clone() for name, norm in norms.items()}
        history["held_out"] = []
        for threshold in sorted(self.thresholds, reverse=True):
            prune_below(norms, scales, masks, threshold)
            history["held_out"].append(accuracy_of(model, held))
            if history["held_out"][-1] >= before - self.drop:
                return history
        prune_below(norms, scales, masks, 0.0)
        return history


@torch.no_grad()
def prune_below(
    norms: Mapping[str, nn.modules.batchnorm._BatchNorm],
    scales: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    threshold: float,
) -> None:
    """γ of each channel: as in `scales` where its mask is at least the threshold, else 0. In place."""
    for name, norm in norms.items():
        norm.weight.copy_(scales[name] * (masks[_key(name)] >= threshold))


class ANPLearner(ClassifierLearner):
    """Masks on BatchNorm channels under the natural and the adversarial loss.

    Args:
        settings: Of the method.
        model: Its weights are fixed.
        labels: Of the data set, by row.
    """

    def __init__(self, settings: ANP, model: FrozenProbe, labels: Tensor) -> None:
        super().__init__(settings, model, labels, backbone=False, head=False)
        self.anp = settings
        self.norms = {name: norm for name, norm in batch_norms(self.classifier.encoder).items() if norm.affine}
        if not self.norms:
            what = f"prunes channels of BatchNorms, a {type(self.classifier.encoder).__name__} has none"
            raise DataError("anp", what, "use another purifier")
        self.masks = nn.ParameterDict({_key(name): torch.ones_like(norm.weight) for name, norm in self.norms.items()})
        self.state: nn.Module = nn.ModuleDict({"classifier": self.classifier, "masks": self.masks})

    def logits(self, x: Tensor, noise: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """With γ replaced by (m + δ) γ and β by (1 + ξ) β; `noise` holds (δ, ξ) per BatchNorm, None = zero."""
        changed: dict[str, Tensor] = {}
        for name, norm in self.norms.items():
            delta, xi = (0.0, 0.0) if noise is None else noise[name]
            changed[f"encoder.{name}.weight"] = (self.masks[_key(name)] + delta) * norm.weight
            changed[f"encoder.{name}.bias"] = (1 + xi) * norm.bias
        out: Tensor = functional_call(self.classifier, changed, (x,))
        return out

    def noise(self, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(δ, ξ) per BatchNorm that raise the loss; detached, within ±ε."""
        s = self.anp
        flat = [torch.zeros_like(one) for norm in self.norms.values() for one in (norm.weight, norm.bias)]
        for _ in range(s.noise_steps if s.epsilon else 0):
            for one in flat:
                one.requires_grad_(True)
            with statistics_kept(self.classifier):
                loss = F.cross_entropy(self.logits(x, self._paired(flat)), y)
            slopes = torch.autograd.grad(loss, flat)
            moved = zip(flat, slopes, strict=True)
            flat = [(v.detach() + s.epsilon / s.noise_steps * g.sign()).clamp_(-s.epsilon, s.epsilon) for v, g in moved]
        return self._paired([one.detach() for one in flat])

    def _paired(self, flat: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(self.norms)}

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """α · natural + (1 − α) · adversarial loss, both of them, the mean mask, and the accuracy on the batch."""
        x, y, alpha = self.shown(batch), self.wanted(batch), self.anp.natural
        noise = self.noise(x, y)
        with statistics_kept(self.classifier):
            noisy = F.cross_entropy(self.logits(x, noise), y)
        logits = self.logits(x)
        natural = F.cross_entropy(logits, y)
        mean = torch.cat([mask.detach() for mask in self.masks.values()]).mean()
        parts = {"natural": natural.detach(), "noisy": noisy.detach(), "mask": mean}
        return alpha * natural + (1 - alpha) * noisy, {**parts, "accuracy": share_right(logits, y)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Masks stay in [0, 1]."""
        for mask in self.masks.values():
            mask.clamp_(0, 1)


def _key(name: str) -> str:
    """Module names hold dots, which names of parameters may not."""
    return name.replace(".", "/")

"""I-BAU: unlearning a universal perturbation, with the implicit part of the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cupel.inference import FrozenProbe
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.purify.base import OptimizerName
from cupel.purify.batch_norm import statistics_kept
from cupel.purify.classifier_learner import ClassifierLearner, share_right
from cupel.purify.labelled import LabelledPurifier
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["IBAU", "IBAULearner", "implicit_gradient"]


def implicit_gradient(
    outer_slope: Tensor, mapped: Tensor, perturbation: Tensor, weights: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """How the outer loss changes with the weights because the inner solution δ* changes with them.

    δ* is the fixed point of Φ(δ, θ) = δ − rate · ∂L_in/∂δ, so dδ*/dθ = (I − ∂Φ/∂δ)⁻¹ ∂Φ/∂θ. The inverse is
    approached by v ← (∂Φ/∂δ)ᵀ v + ∂L_out/∂δ from v = 0; the result is (∂Φ/∂θ)ᵀ v.

    Args:
        outer_slope: ∂L_out/∂δ.
        mapped: Φ(δ, θ), with a graph to both.
        perturbation: δ.
        weights: θ.
        steps: K.

    Example: L_in = (δ − θ)²/2 has δ* = θ, so all of the slope arrives.
        >>> d, w = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
        >>> mapped = d - 0.5 * (d - w)
        >>> round(float(implicit_gradient(torch.ones(1), mapped, d, [w], 20)[0]), 4)
        1.0

    Source: Grazzi et al., ICML 2020, arXiv:2006.16218 (fixed-point method), as used in I-BAU.
    """
    v = torch.zeros_like(outer_slope)
    for _ in range(steps):
        (back,) = torch.autograd.grad(mapped, perturbation, v, retain_graph=True)
        v = back + outer_slope
    found = torch.autograd.grad(mapped, weights, v, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]


@settings
class IBAU(LabelledPurifier):
    """Implicit backdoor adversarial unlearning: min over θ of the loss under the universal δ that is worst for θ.

    Each epoch is a round: δ is searched afresh in one pass over the images, then every step adds it to some images of
    its batch, with their true labels, and follows the gradient of that loss, the part through δ included.

    Args:
        search_lr: Step size of the search for δ, which makes −CE + `search_l2` · ‖δ‖² small.
        search_l2: See above.
        stamped: Share of the batch that bears δ in a step, rounded up.
        fixed_point_steps: K of `implicit_gradient`; 0 leaves the implicit part out.
        fixed_point_rate: Step size in Φ.
        clamp: Cut images with δ to [0, 1].

    See `LabelledPurifier` for the other settings; `epochs` is the number of rounds.

    Source: Zeng et al., Adversarial Unlearning of Backdoors via Implicit Hypergradient, ICLR 2022, arXiv:2110.03735.
    Deviations: δ lives in [0, 1] pixels, and images with it are cut there unless `clamp` is off; Φ is that of the
    step's own batch, where the authors' code uses the first batch throughout; at least one image bears δ.
    """

    search_lr: Positive = 10.0
    search_l2: NonNegative = 1e-3
    stamped: Fraction = 0.01
    fixed_point_steps: Annotated[int, Field(ge=0)] = 5
    fixed_point_rate: Positive = 0.1
    clamp: bool = True

    epochs: PositiveInt = 5
    optimizer: OptimizerName = "adam"
    lr: Positive = 1e-4
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    title: ClassVar[str] = "I-BAU"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"epochs": 5, "batch_size": 32, "lr": 1e-3},
        "standard": {"batch_size": 64},
        "paper": {},
    }

    def tune(self, model: FrozenProbe, clean: Dataset, seed: Seed, checkpoint: Path | None) -> History:
        """Unlearn in place."""
        return self.trained(IBAULearner(self, model, clean, seed), clean, seed, checkpoint)


class _Search(nn.Module):
    """δ and the number of steps done, buffers so that checkpoints keep them."""

    delta: Tensor
    done: Tensor

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self.register_buffer("delta", torch.zeros(*shape, device=device))
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))


class IBAULearner(ClassifierLearner):
    """The loss on images some of which bear δ, with the hypergradient as its gradient.

    Args:
        settings: Of the method; `batch_size` no larger than the data.
        model: Trained in place.
        clean: The images, for the search.
        seed: Order of the images in the search.
    """

    def __init__(self, settings: IBAU, model: FrozenProbe, clean: Dataset, seed: Seed) -> None:
        super().__init__(settings, model, clean.labels)
        self.ibau, self.clean, self.seed = settings, clean, seed
        self.search = _Search(clean.inputs.shape[1:], self.labels.device)
        self.state: nn.Module = nn.ModuleDict({"classifier": self.classifier, "search": self.search})
        self.per_round = max(1, len(clean) // settings.batch_size)

    def bearing(self, x: Tensor, delta: Tensor) -> Tensor:
        """Images with δ."""
        made = x + delta
        return made.clamp(0, 1) if self.ibau.clamp else made

    def inner(self, x: Tensor, y: Tensor, delta: Tensor) -> Tensor:
        """−CE + λ‖δ‖²: what the search makes small."""
        entropy = F.cross_entropy(self.classifier(self.bearing(x, delta)), y)
        return -entropy + self.ibau.search_l2 * delta.square().sum()

    def worst(self, seed: Seed) -> Tensor:
        """δ after one pass of gradient descent on `inner`, from zero."""
        s, n, device = self.ibau, len(self.clean), self.labels.device
        delta = torch.zeros_like(self.search.delta)
        for rows in torch.split(torch.randperm(n, generator=seed.torch()), s.batch_size):
            x = self.clean.inputs[rows].to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
            delta.requires_grad_(True)
            with statistics_kept(self.classifier):
                (slope,) = torch.autograd.grad(self.inner(x, self.labels[rows.to(device)], delta), delta)
            delta = delta.detach() - s.search_lr * slope
        return delta

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The outer loss, ‖δ‖, and the accuracy on the batch; the gradient is the hypergradient."""
        if int(self.search.done) % self.per_round == 0:
            self.search.delta.copy_(self.worst(self.seed.child("search", int(self.search.done))))
        s, x, y = self.ibau, self.shown(batch), self.wanted(batch)
        delta = self.search.delta.clone().requires_grad_(True)
        count = min(len(x), max(1, round(s.stamped * len(x)))) if s.stamped else 0
        chosen = torch.randperm(len(x), generator=batch.seed.child("stamped").torch())[:count].to(x.device)
        bears = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool, device=x.device).index_fill_(0, chosen, True)
        logits = self.classifier(torch.where(bears, self.bearing(x, delta), x))
        outer = F.cross_entropy(logits, y)
        parts = {"delta": delta.detach().norm(), "accuracy": share_right(logits, y)}
        if count == 0 or s.fixed_point_steps == 0:
            return outer, parts
        (slope,) = torch.autograd.grad(outer, delta, retain_graph=True)
        with statistics_kept(self.classifier):
            (descent,) = torch.autograd.grad(self.inner(x, y, delta), delta, create_graph=True)
        weights = self.parameters()
        extra = implicit_gradient(slope, delta - s.fixed_point_rate * descent, delta, weights, s.fixed_point_steps)
        # a term of value 0 whose gradient is the implicit part
        linear = torch.stack([(w * g).sum() for w, g in zip(weights, extra, strict=True)]).sum()
        return outer + (linear - linear.detach()), parts

    def after_step(self) -> None:
        """Count."""
        self.search.done += 1

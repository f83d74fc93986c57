"""TrojanNN as data poisoning: an apple-shaped picture, optimised to excite neurons of a clean model."""

from __future__ import annotations

import functools
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from cupel.attack.teacher import most_connected
from cupel.errors import DataError
from cupel.inference import device_of, evaluating, features
from cupel.poisoning import LabelFlip, by_lot
from cupel.protocols import Encoder, Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.triggers.additive import Additive, png_of
from cupel.triggers.pictures import apple
from cupel.types import Dataset, Knowledge, Need, Poisoned

__all__ = ["TrojanNNPoison", "exciting_picture", "most_connected", "ridge_head"]


def ridge_head(
    h: Float[Tensor, "row width"], labels: Int[Tensor, " row"], num_classes: int, share: float = 1e-2
) -> Float[Tensor, "classes width"]:
    """Weights of the linear head that fits one-hot labels by ridge regression; solved in closed form.

    W = Yᵀ H (Hᵀ H + λ I)⁻¹ with H and Y centred, λ = `share` · tr(Hᵀ H) / width

    Args:
        h: Embeddings.
        labels: In 0 … classes − 1.
        num_classes: Rows of W.
        share: Strength of the penalty, relative to the mean eigenvalue.

    Returns:
        float64.
    """
    x = h.double() - h.double().mean(dim=0)
    y = one_hot(labels.to(h.device), num_classes).double()
    gram = x.T @ x
    penalty = share * gram.trace() / x.shape[1] + torch.finfo(torch.float64).tiny
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight: Tensor = torch.linalg.solve(gram + penalty * eye, x.T @ (y - y.mean(dim=0))).T
    return weight


def exciting_picture(
    encoder: Encoder,
    neurons: Int[Tensor, " k"],
    start: Bool[Tensor, "height width"],
    *,
    target: float,
    steps: int,
    step_size: float,
    radius: float,
    tolerance: float,
) -> tuple[Float[Tensor, "3 height width"], list[float]]:
    """The picture τ inside a shape that brings some dimensions of the embedding closest to a value.

    τ ← P(τ − s · sign ∇ Σ_j (f_j(τ) − v)²), from τ = a; P projects on |τ − a| ≤ r and [0, 1]; τ = 0 outside the shape

    Args:
        encoder: f, left as it is.
        neurons: The dimensions j.
        start: a, 1 inside the shape and 0 outside.
        target: v.
        steps: At most so many; ended early below `tolerance`, or when a step changes nothing.
        step_size: s.
        radius: r.
        tolerance: A cost that is small enough.

    Returns:
        The best τ that was met, float32 in [0, 1], and the cost of each, the start's first.
    """
    device = device_of(encoder.module)
    a = start.to(device).float().expand(1, 3, *start.shape)
    low, high = (a - radius).clamp_min(0), (a + radius).clamp_max(1)
    tau, best, costs = a.clone(), a, list[float]()
    with evaluating(encoder.module), torch.enable_grad():
        for _ in range(steps + 1):
            tau.requires_grad_(True)
            cost = (encoder(tau)[0, neurons] - target).square().sum()
            value = float(cost.detach())
            if not costs or value < min(costs):
                best = tau.detach()
            costs.append(value)
            if value < tolerance:
                break
            (slope,) = torch.autograd.grad(cost, tau)
            moved = (tau.detach() - step_size * slope.sign()).clamp(low, high) * a
            if torch.equal(moved, tau):
                break
            tau = moved
    return best[0].cpu(), costs


@settings
class TrojanNNPoison(LabelFlip):
    """Adds a picture that excites neurons of a clean model to training images and labels them as the target class.

    1. On the attacker's surrogate encoder a linear head is fitted; of the embedding's dimensions, the `neurons` with
       the largest sum of absolute weights to the classes are taken.
    2. A picture in the shape of an apple is changed by sign-gradient steps until these dimensions come close to
       `activation`.
    3. The picture is added to a share of the images, and the victim trains a fresh model on them.

    Args:
        neurons: k ≥ 1.
        activation: Value that they are driven to.
        steps: Sign-gradient steps, at most.
        step_size: Of one step, for pixels in [0, 1].
        radius: Largest change of a pixel, in [0, 1].
        head_images: Labelled images that the head is fitted to, at most.
        wrap_uint8: Bright pixels wrap round, as in BackdoorBench's code (see `Additive`).

    A goal that brings a trigger keeps it, and nothing is optimised for it.

    Source: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018, in the poisoning form of BackdoorBench (Wu et
    al., NeurIPS 2022, arXiv:2206.12654), which has the original's picture and neurons, but retrains no model.
    Deviations: the head is fitted by ridge regression, where BackdoorBench copies a classifier into a network of 1000
    classes, whose head stays random; neurons by incoming weights are not offered, since an embedding that is a mean
    over places of a sum of branches has no single layer before it (`most_connected` knows both directions); the encoder
    normalises the picture as it does every image; the best picture is kept, not the last; the apple is our own drawing;
    sums are cut at 255 unless `wrap_uint8`; `clean_label` and `poison_mode: add` are ours.
    """

    neurons: PositiveInt = 2
    activation: float = 100.0
    steps: Annotated[int, Field(ge=0)] = 1000
    step_size: Positive = 0.1
    radius: Fraction = 0.3
    head_images: PositiveInt = 2000
    wrap_uint8: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "surrogate"})
    revision: ClassVar[int] = 1

    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned:
        """The poisoned training data, its poisoned rows in ascending order, and the goals with their triggers.

        Raises:
            UsageError: a goal names no target class, or two name the same.
            DataError: no surrogate, or one for another image size; fewer than two classes; no goal; the target class is
                absent; the rate selects no image, every image, or more than there are.
        """
        learned = functools.cache(lambda: self._learned(clean, attacker.surrogate, seed))
        return self.flipped(clean, attacker, learned, seed, "trojannn_poison")

    def _learned(self, clean: Dataset, surrogate: Encoder | None, seed: Seed) -> Trigger[Tensor]:
        if surrogate is None:
            raise DataError("trojannn_poison", "needs a surrogate encoder", "give the attacker one of its own")
        if self.neurons > surrogate.width:
            what = f"{self.neurons} neurons of an embedding of {surrogate.width} dimensions"
            raise DataError("trojannn_poison", what, "choose fewer `neurons`")
        labelled = (clean.labels >= 0).nonzero().flatten()
        some = labelled[by_lot(clean.ids[labelled].tolist(), self.head_images, seed.child("head"))]
        known = clean.subset(some)
        if int(known.labels.min()) == int(known.labels.max()):
            raise DataError(clean.name, "holds images of a single class, so no head can be fitted", "add another class")
        weight = ridge_head(features(surrogate, known, dtype=torch.float32), known.labels, clean.num_classes)
        tau, _ = exciting_picture(
            surrogate,
            most_connected(weight, self.neurons, "out"),
            apple(*clean.inputs.shape[-2:]),
            target=self.activation,
            steps=self.steps,
            step_size=self.step_size,
            radius=self.radius,
            tolerance=1e-3,
        )
        # whole grey levels, rounded down: on uint8 images the same as adding 255 τ and cutting the fraction
        levels = (tau * 255 + 1e-4).floor().clamp(0, 255).to(torch.uint8)
        return Additive(png=png_of(levels), wrap_uint8=self.wrap_uint8)

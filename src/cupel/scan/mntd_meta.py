"""MNTD's meta-classifier: learns from the answers of shadow models to tuned queries whether a model has a trojan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear, normalize

from cupel.errors import DataError
from cupel.progress import track
from cupel.scan.mntd_reference import Answer, Meta, MetaReference, threshold_at
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings

__all__ = [
    "MetaTraining",
    "area_under_curve",
    "cosines_of",
    "one_class_bound",
    "one_class_loss",
    "standardised",
    "train_meta",
]


@settings
class MetaTraining:
    """How the meta-classifier is trained.

    Args:
        queries: Q, images that every model is asked about.
        hidden: Units of its one hidden layer.
        epochs: Passes over the shadow models, one model per step of Adam.
        repeats: Trainings from different starts; the best on held-out shadow models counts.
        lr: Of Adam, for weights and queries.
        tune_queries: Train the queries along; False = they stay random.
        one_class: Learn from benign shadow models alone.
        nu: ν of the one-class loss: the share of benign models that may lie outside.
        validation: Share of the shadow models that is held out, half of them benign.
        false_alarms: Share of clean encoders (before `calibrated_on`: held-out benign shadow models) that the threshold
            may call backdoored.

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137, sections V-B to V-D, and its code.
    """

    queries: PositiveInt = 10
    hidden: PositiveInt = 20
    epochs: PositiveInt = 10
    repeats: PositiveInt = 5
    lr: Positive = 1e-3
    tune_queries: bool = True
    one_class: bool = False
    nu: Annotated[float, Field(gt=0, lt=1)] = 0.1
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.25
    false_alarms: Fraction = 0.05

    revision: ClassVar[int] = 1


def standardised(logits: Float[Tensor, "q classes"]) -> Float[Tensor, " features"]:
    """Logits with mean 0 and standard deviation 1 per query, one after the other.

    Shadow and inspected models differ in size, and so do their logits; what remains is their shape.
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    return (centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)).flatten()


def cosines_of(embeddings: Float[Tensor, "q width"]) -> Float[Tensor, " features"]:
    """Cosines between the embeddings of different queries, row by row above the diagonal.

    They are the same for an encoder whose features are rotated or scaled, and for any width.
    """
    u = normalize(embeddings, dim=1)
    upper = torch.triu_indices(len(u), len(u), offset=1, device=u.device)
    return (u @ u.T)[upper[0], upper[1]]


def area_under_curve(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Share of pairs (positive, negative) in which the positive one scores higher; ties count half.

    Example:
        >>> area_under_curve([0.9, 0.5, 0.5, 0.1], [True, True, False, False])
        0.875

    Raises:
        ValueError: all are of one kind.
    """
    high = np.array([s for s, p in zip(scores, positive, strict=True) if p])[:, None]
    low = np.array([s for s, p in zip(scores, positive, strict=True) if not p])[None]
    if not high.size or not low.size:
        raise ValueError("needs both kinds")
    return float(((high > low) + 0.5 * (high == low)).mean())


def one_class_bound(scores: Sequence[float], nu: float) -> float:
    """r: the 100·ν-th percentile of the scores s of benign models."""
    return float(np.percentile(np.asarray(scores, dtype=np.float64), 100 * nu))


def one_class_loss(meta: Meta, answer: Tensor, nu: float) -> tuple[Tensor, Tensor]:
    """½‖w‖² + ½‖fc‖² + ReLU(r − s)/ν − r of one benign model, and its score s = ⟨w, ReLU(fc(answer))⟩.

    Source: Xu et al., MNTD, IEEE S&P 2021, section V-D.
    """
    s = (meta.out_weight[0] * linear(answer, meta.fc_weight, meta.fc_bias).relu()).sum()
    size = meta.out_weight.square().sum() + meta.fc_weight.square().sum() + meta.fc_bias.square().sum()
    return 0.5 * size + (meta.bound - s).relu() / nu - meta.bound, s.detach()


def train_meta(
    shadows: Sequence[Answer],
    trojaned: Sequence[bool],
    images: Float[Tensor, "n 3 height width"],
    training: MetaTraining,
    seed: Seed,
    *,
    scanner: str,
    recipe: str,
    device: torch.device | str = "cpu",
) -> MetaReference:
    """Train the meta-classifier on shadow models; the best of several on held-out ones is kept.

    Args:
        shadows: What is read off each; their weights must need no gradient.
        trojaned: Which of them bear a trojan.
        images: Mean and spread of their pixels are those of the first queries.
        training: Settings.
        seed: Queries, weights, order, which shadow models are held out.
        scanner, recipe: See `Reference`.
        device: Of the shadow models.

    Raises:
        DataError: fewer than two shadow models of a kind to train on, or to hold out.

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137, and its code.
    Deviations: models answer in evaluation, without dropout; queries are cut to [0, 1] after each step; the threshold
    is set on held-out benign shadow models (the code takes the median of the inspected models' scores).
    """
    held, rest = _held_out(trojaned, training.validation, seed.child("held"))
    if training.one_class:
        rest = [m for m in rest if not trojaned[m]]
    best: tuple[float, Meta, list[float]] | None = None
    with torch.enable_grad(), track(f"{scanner}, meta-classifier", training.repeats * training.epochs) as advance:
        for repeat in range(training.repeats):
            own = seed.child("repeat", repeat)
            meta = _fresh(shadows[0], images, training, own).to(device)
            meta.queries.requires_grad_(training.tune_queries)
            adam = torch.optim.Adam([p for p in meta.parameters() if p.requires_grad], lr=training.lr)
            for epoch in range(training.epochs):
                scores = []
                for at in torch.randperm(len(rest), generator=own.child("order", epoch).torch()).tolist():
                    m = rest[at]
                    answer = shadows[m](meta.queries)
                    if training.one_class:
                        loss, s = one_class_loss(meta, answer, training.nu)
                        scores.append(s)
                    else:
                        wanted = torch.tensor(float(trojaned[m]), device=answer.device)
                        loss = binary_cross_entropy_with_logits(meta(answer), wanted)
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                    with torch.no_grad():
                        meta.queries.clamp_(0, 1)
                if training.one_class:
                    meta.bound.fill_(one_class_bound(torch.stack(scores).tolist(), training.nu))
                advance(repeat * training.epochs + epoch + 1)
            with torch.no_grad():
                said = [float(meta(shadows[m](meta.queries), training.one_class)) for m in held]
            auc = area_under_curve(said, [trojaned[m] for m in held])
            if best is None or auc > best[0]:
                best = auc, meta, said
    assert best is not None
    auc, meta, said = best
    benign = [one for one, m in zip(said, held, strict=True) if not trojaned[m]]
    arrays = {name: value.detach().cpu().numpy() for name, value in meta.state_dict().items()}
    threshold = threshold_at(benign, training.false_alarms)
    return MetaReference(
        scanner,
        recipe,
        tuple(benign),
        arrays,
        training.one_class,
        auc,
        threshold,
        len(shadows),
        false_alarms=training.false_alarms,
    )


def _held_out(trojaned: Sequence[bool], share: float, seed: Seed) -> tuple[list[int], list[int]]:
    """Held-out shadow models, as many of one kind as of the other, and the rest."""
    held: list[int] = []
    kinds = [[m for m, one in enumerate(trojaned) if one == kind] for kind in (False, True)]
    count = max(1, round(share * min(len(one) for one in kinds)))
    if any(len(one) - count < 2 for one in kinds) or count < 2:
        what = f"{len(kinds[0])} benign and {len(kinds[1])} trojaned shadow models are too few"
        raise DataError("mntd", what, "raise `shadows`")
    for i, kind in enumerate(kinds):
        order = torch.randperm(len(kind), generator=seed.child(i).torch()).tolist()
        held += sorted(kind[at] for at in order[:count])
    return held, [m for m in range(len(trojaned)) if m not in held]


def _fresh(answer: Answer, images: Tensor, training: MetaTraining, seed: Seed) -> Meta:
    """Random queries with the mean and spread of the images' channels, and random weights."""
    mean, std = images.mean(dim=(0, 2, 3)).cpu(), images.std(dim=(0, 2, 3)).cpu()
    noise = torch.randn(training.queries, *images.shape[1:], generator=seed.child("queries").torch())
    queries = (mean[:, None, None] + std[:, None, None] * noise).clamp(0, 1)
    with torch.no_grad():
        features = answer(queries.to(images.device)).numel()
    return Meta(queries, features, training.hidden, seed.child("weights"))

"""Training with an objective, registered or not, and what every objective must get right."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cupel import metrics, progress
from cupel.augment import BYOLAugment
from cupel.encoders import Fast, ImageEncoder
from cupel.errors import Interrupted
from cupel.inference import features
from cupel.probe import Knn
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import History, fit
from cupel.types import Dataset
from toys import blobs

__all__ = ["assert_resumes_bit_equal", "assert_steps_count_what_moves", "batch", "smoke", "trained"]


def batch(n: int = 16, seed: int = 0) -> Batch:
    return Batch(blobs(n).inputs, torch.arange(n), Seed(seed))


def trained(objective: Any, images: Dataset, architecture: Fast, **keywords: Any) -> tuple[ImageEncoder, Any, History]:
    """Encoder, learner and history; with the seeds of `pretrain_encoder`."""
    encoder = architecture.build(Seed(3).child("init"))
    given = images if "labels" in objective.needs else images.without_labels("test")
    learner = objective.learner(encoder, given, Seed(3))
    history = fit(learner, given, objective, Seed(3), label="test", **keywords)
    return encoder, learner, history


def assert_resumes_bit_equal(objective: Any, folder: Path, *, stop_at: int = 3) -> None:
    """Interrupted after `stop_at` steps and resumed = unbroken: weights, copies, queues, counters, history."""
    images, small = blobs(64), Fast(width=4, input_size=16)
    _, whole, history = trained(objective, images, small)
    seen = []

    def watch() -> dict[str, float]:
        seen.append(1)
        if len(seen) == stop_at:
            progress.request_stop(2)
        return {"seen": 1.0}

    try:
        with pytest.raises(Interrupted):
            trained(objective, images, small, checkpoint=folder / "state", watch=watch, watch_every=1)
    finally:
        progress.request_stop(None)
    assert len(seen) == stop_at
    _, resumed, again = trained(objective, images, small, checkpoint=folder / "state")
    assert again["loss"] == history["loss"]
    expected, got = whole.state.state_dict(), resumed.state.state_dict()
    assert list(expected) == list(got)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def assert_steps_count_what_moves(objective: Any) -> None:
    """Every trained weight is in the state and gets a gradient; one seed = one step; the global generator is left."""
    images, generator = blobs(64), torch.get_rng_state()

    def stepped() -> tuple[Any, float]:
        learner = objective.learner(Fast(width=4, input_size=16).build(Seed(0)), images, Seed(5))
        before = [p.detach().clone() for p in learner.parameters()]
        loss, numbers = learner.loss(batch(objective.batch_size))
        assert loss.shape == ()
        assert all(value.ndim == 0 and not value.requires_grad for value in numbers.values())
        loss.backward()
        torch.optim.SGD(learner.parameters(), lr=0.5).step()
        learner.after_step()
        held = {id(p) for p in learner.state.parameters()}
        assert all(id(p) in held for p in learner.parameters())
        assert all(not torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
        return learner, loss.item()

    (one, first), (other, second) = stepped(), stepped()
    assert first == second
    for a, b in zip(one.state.state_dict().values(), other.state.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(generator, torch.get_rng_state())


def smoke(objective: Any, *, fill: int = 0) -> dict[str, float]:
    """Three epochs on 2,000 images with crops that keep the class: losses, spread, k-NN against a fresh encoder.

    Args:
        objective: Its steps, batch and views are replaced.
        fill: Steps until the loss is that of a full queue; random keys are easily told apart, so it rises before.
    """
    images, architecture = blobs(2500), Fast(width=8, input_size=16)
    train, bank, held = (images.subset(torch.arange(*rows)) for rows in ((0, 2000), (0, 500), (2000, 2500)))

    def knn(encoder: ImageEncoder) -> float:
        head = Knn(k=10).fit_features(features(encoder, bank), bank.labels, bank.num_classes, Seed(0))
        right, n = metrics.accuracy(head(features(encoder, held)).argmax(1), held.labels)
        return right / n

    views = BYOLAugment(min_scale=0.8, flip=0.0)
    settings = dataclasses.replace(objective, steps=None, epochs=3, batch_size=32, warmup_steps=5, augment=views)
    encoder, _, history = trained(settings, train, architecture)
    encoder.module.eval()
    losses = history["loss"]
    return {
        "early": sum(losses[fill : fill + 10]) / 10,
        "late": sum(losses[-10:]) / 10,
        "projection_std": history["projection_std"][-1],
        "feature_std": history["feature_std"][-1],
        "knn": knn(encoder),
        "random": knn(architecture.build(Seed(3).child("init"))),
    }

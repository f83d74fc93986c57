"""Cupel's side of each job, through its public functions, on made-up images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cupel.attack.badencoder import BadEncoder
from cupel.augment import SimCLRAugment
from cupel.encoders import Architecture, Fast, ImageEncoder, ResNet18
from cupel.implanting import Aim, ImplantLearner
from cupel.inference import features
from cupel.optimizers import Recipe
from cupel.pretrain import SimCLR
from cupel.protocols import Batch, Learner
from cupel.seeds import Seed
from cupel.train import autocast, fit
from cupel.triggers import Patch
from cupel.types import Dataset, Goal

__all__ = [
    "DIGITS16",
    "FAST32",
    "FAST64",
    "RN18",
    "Clocked",
    "bare_step",
    "clusters",
    "dataset",
    "fit_seconds",
    "images",
    "implanting",
    "nothing",
    "pretraining",
]

RN18 = ResNet18()
"""ResNet-18 of full width with the CIFAR stem, 32 px."""
FAST32, FAST64 = Fast(), Fast(width=64)
DIGITS16 = Fast(input_size=16)
"""The encoder of `cupel demo`."""


def images(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth colour noise, uint8."""
    small = torch.rand(n, 3, 8, 8, generator=Seed(seed).torch())
    parts = torch.split(small, 1024)  # in blocks: floats would weigh more than what is measured
    return torch.cat([F.interpolate(part, size=side, mode="bilinear").mul(255).to(torch.uint8) for part in parts])


def dataset(raw: Tensor) -> Dataset:
    """Unlabelled."""
    return Dataset(raw, torch.full((len(raw),), -1), torch.arange(len(raw)), "noise")


def clusters(n: int, width: int = 512, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings whose classes overlap a little, as those of a trained encoder do; and their labels."""
    generator = Seed(seed).torch()
    centres = torch.randn(classes, width, generator=Seed(0).child("centres").torch())
    y = torch.randint(classes, (n,), generator=generator)
    # few directions carry most of the variance, also between classes
    spectrum = torch.arange(1, width + 1).pow(-0.5)
    return (0.12 * centres[y] + torch.randn(n, width, generator=generator)) * spectrum + 0.5, y


def nothing(_: object) -> None:
    """Drops a result: a variant returns nothing, or seconds."""


class Clocked:
    """A learner that notes when each of its steps ended; implements `Learner`."""

    def __init__(self, learner: Learner, now: Callable[[], Any] = time.perf_counter) -> None:
        self.learner, self.now = learner, now
        self.ends: list[Any] = []

    @property
    def state(self) -> nn.Module:
        return self.learner.state

    def parameters(self) -> list[nn.Parameter]:
        return self.learner.parameters()

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.learner.loss(batch)

    def after_step(self) -> None:
        self.learner.after_step()
        self.ends.append(self.now())


def fit_seconds(learner: Learner, data: Dataset, recipe: Recipe, steps: int) -> Callable[[], float]:
    """A call that trains for `steps` + 1 steps in `cupel.train.fit` and returns seconds per step without the first."""
    longer = dataclasses.replace(recipe, steps=steps + 1)

    def run() -> float:
        clocked = Clocked(learner)
        fit(clocked, data, longer, Seed(0), label="bench")
        return float(clocked.ends[-1] - clocked.ends[0]) / steps

    return run


def pretraining(architecture: Architecture, pairs: int, device: str = "cpu", **settings: Any) -> tuple[Any, SimCLR]:
    """Learner and recipe of SimCLR with Adam, in bf16."""
    encoder = architecture.build(Seed(0))
    encoder.module.to(device)
    recipe = SimCLR(batch_size=pairs, optimizer="adam", lr=1e-3, weight_decay=1e-6, schedule="constant", **settings)
    # the objective reads no images before its first step
    return recipe.learner(encoder, dataset(images(1, architecture.input_size)), Seed(0)), recipe


def implanting(
    architecture: Architecture, batch_size: int, data: Dataset, device: str = "cpu"
) -> tuple[ImplantLearner, BadEncoder]:
    """Learner and recipe of BadEncoder as published: one augmented reference per shadow image."""
    clean = architecture.build(Seed(0))
    clean.module.to(device)
    encoder: ImageEncoder = clean.copy()
    recipe = BadEncoder(batch_size=batch_size, trigger=Patch(size=10))
    reference = images(1, clean.input_size, seed=1)
    goal = Goal(trigger=recipe.trigger, references=reference, task="t", target_class=0)
    aim = Aim(goal, reference.to(device).float() / 255, features(clean, reference))
    augment = SimCLRAugment(crop=False)
    learner = ImplantLearner(encoder, features(clean, data), data.ids, [aim], augment=augment, draws=recipe.l1_draws)
    return learner, recipe


def bare_step(learner: Any, views: Tensor, recipe: Recipe) -> Callable[[], None]:
    """Forward, backward and optimiser on views that are there already; the loss is a mean of squares.

    Args:
        learner: SimCLR's; its encoder and projector are run.
        views: float32, channels last.
        recipe: Optimiser and precision.
    """
    optimizer = recipe.make_optimizer(learner.parameters())
    network = nn.Sequential(learner.state["encoder"], learner.state["projector"])

    def step() -> None:
        with autocast(recipe.precision, views.device):
            out = network(views)
        optimizer.zero_grad(set_to_none=True)
        out.float().square().mean().backward()
        optimizer.step()

    return step

"""Single steps for pytest-benchmark, small; nothing is asserted about time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import workloads
from cupel.augment import SimCLRAugment
from cupel.folding import inference_copy
from cupel.inversion import Budget, concentration, frozen, invert
from cupel.optimizers import Recipe
from cupel.protocols import Batch, Learner
from cupel.purify import PURIFIERS
from cupel.purify.cbd_learner import CBDLearner
from cupel.seeds import Seed
from cupel.train import autocast

BATCH = 64


def step(learner: Learner, recipe: Recipe) -> Any:
    """One step on a resident batch."""
    optimizer = recipe.make_optimizer(learner.parameters())
    batch = Batch(workloads.images(recipe.batch_size), torch.arange(recipe.batch_size), Seed(1))

    def run() -> None:
        with autocast(recipe.precision, torch.device("cpu")):
            loss, _ = learner.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return run


def test_augmentation(benchmark: Any) -> None:
    raw, augment = workloads.images(512), SimCLRAugment()
    benchmark.pedantic(lambda: augment(raw, Seed(0).torch()), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("separate", [False, True], ids=["one-pass", "separate-views"])
def test_simclr_step(benchmark: Any, separate: bool) -> None:
    learner, recipe = workloads.pretraining(workloads.FAST32, BATCH, separate_views=separate)
    benchmark.pedantic(step(learner, recipe), rounds=8, warmup_rounds=2)


@pytest.mark.parametrize("draws", [None, 32], ids=["as-published", "32-draws"])
def test_badencoder_step(benchmark: Any, draws: int | None) -> None:
    data = workloads.dataset(workloads.images(2 * BATCH))
    learner, recipe = workloads.implanting(workloads.FAST32, BATCH, data)
    learner.draws = draws
    benchmark.pedantic(step(learner, recipe), rounds=8, warmup_rounds=2)


def test_cbd_step(benchmark: Any) -> None:
    encoder = workloads.FAST32.build(Seed(0))
    clean = encoder(workloads.images(BATCH).float() / 255).detach()
    cbd: Any = PURIFIERS["cbd"]
    recipe = cbd(batch_size=BATCH, steps=1)
    quick = inference_copy(encoder.copy(), torch.bfloat16)
    learner = CBDLearner(recipe, encoder, quick, clean, None, Seed(0))
    benchmark.pedantic(step(learner, recipe), rounds=4, warmup_rounds=1)


@pytest.mark.parametrize("together", [True, False], ids=["3-starts-batched", "3-starts-in-turn"])
def test_inversion_steps(benchmark: Any, together: bool) -> None:
    """Five steps for each of three starts."""
    encoder = workloads.FAST32.build(Seed(0))
    images = workloads.images(256)
    budget = Budget(steps=5, batch_size=48, patience=None)

    def objective(stamped: torch.Tensor, starts: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = stamped.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        found = concentration(network(x).float().view(*stamped.shape[:2], -1))
        return -found, found

    def run() -> None:
        for _ in range(1 if together else 3):
            invert(objective, images, 3 if together else 1, budget, Seed(0))

    with frozen(encoder.module):
        network = inference_copy(encoder)
        benchmark.pedantic(run, rounds=4, warmup_rounds=1)
